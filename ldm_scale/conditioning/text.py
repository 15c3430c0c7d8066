"""Captions: OpenCLIP's byte-pair tokens through CLIP's text transformer, trained jointly with the UNet.

The architecture is that of CLIP's text tower (causal, pre-LN, final LN; arXiv:2103.00020, section 2.4), so that an
export is a `CLIPTextModel`. The context is the final LN's output for all tokens, as in SD-1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_scale.config.schema import TextConditioningConfig


def _quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


END_TOKEN = 49407
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": _quick_gelu}


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and those before it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, M, width) to (B, M, width)."""
        b, m, c = x.shape
        q, k, v = self.to_qkv(x).view(b, m, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.to_out(y.transpose(1, 2).reshape(b, m, c))  # type: ignore[no-any-return]


class TextBlock(nn.Module):
    """Causal self-attention and a two-layer network, each pre-normalised and added to its input."""

    def __init__(self, config: TextConditioningConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = CausalSelfAttention(config.width, config.num_heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width)
        self.mlp_out = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, M, width) to (B, M, width)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp_out(self.activation(self.mlp_in(self.norm2(x))))  # type: ignore[no-any-return]


class TextEncoder(nn.Module):
    """tau_theta for captions: token numbers to the context of the UNet's cross-attention."""

    def __init__(self, config: TextConditioningConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Parameter(torch.empty(config.max_tokens, config.width))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """Context of tokens. Shapes: (B, max_tokens) int64 to (B, max_tokens, width)."""
        x = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)  # type: ignore[no-any-return]


@cache
def _tokenizer(max_tokens: int) -> Any:
    """OpenCLIP's tokenizer; imported on first use because open_clip takes seconds to load."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=max_tokens)


def tokenize(captions: Sequence[str], max_tokens: int) -> Tensor:
    """Start token, byte pairs, then end tokens; longer captions are cut and keep their end token.

    OpenCLIP fills with 0, which is also the token of "!"; filling with the end token, as SD-1 does, lets transformers'
    CLIPTokenizer give the same tokens for every caption.
    Shapes: returns (len(captions), max_tokens) int64.
    """
    tokens: Tensor = _tokenizer(max_tokens)(list(captions))
    ended = (tokens == END_TOKEN).cumsum(dim=1) > 0
    return tokens.masked_fill(ended, END_TOKEN)
