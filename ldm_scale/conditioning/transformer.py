"""The pre-LN transformer over tokens behind every context that is trained jointly with the UNet.

Two published layouts are settings of it: CLIP's text tower (causal, biased projections; arXiv:2103.00020, section 2.4)
and the bidirectional encoder of arXiv:2112.10752, appendix E.2.1 (queries, keys and values without bias, heads whose
width is free of the model's). Padding is not masked in either, as in the published models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": _quick_gelu}


class SelfAttention(nn.Module):
    """Multi-head attention of each token to all, or (causal) to itself and those before it."""

    def __init__(self, width: int, num_heads: int, head_dim: int, *, causal: bool, bias: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.to_qkv = nn.Linear(width, 3 * num_heads * head_dim, bias=bias)
        self.to_out = nn.Linear(num_heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, M, width) to (B, M, width)."""
        b, m, _ = x.shape
        q, k, v = self.to_qkv(x).view(b, m, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.to_out(y.transpose(1, 2).reshape(b, m, -1))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer network, each pre-normalised and added to its input."""

    def __init__(
        self, width: int, num_heads: int, head_dim: int, *, activation: str, causal: bool, qkv_bias: bool
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads, head_dim, causal=causal, bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, M, width) to (B, M, width)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp_out(self.activation(self.mlp_in(self.norm2(x))))  # type: ignore[no-any-return]


class TokenTransformer(nn.Module):
    """Token numbers to one vector per token: learned embeddings and positions, blocks, a final norm."""

    def __init__(
        self,
        num_tokens: int,
        max_tokens: int,
        width: int,
        depth: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        activation: str = "gelu",
        causal: bool = False,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(num_tokens, width)
        self.position_embedding = nn.Parameter(torch.empty(max_tokens, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(
                width,
                num_heads,
                head_dim or width // num_heads,
                activation=activation,
                causal=causal,
                qkv_bias=qkv_bias,
            )
            for _ in range(depth)
        )
        self.norm_out = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """Shapes: (B, M) int64 with M up to max_tokens, to (B, M, width)."""
        x = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)  # type: ignore[no-any-return]
