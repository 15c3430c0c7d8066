"""Attention layers of the UNet and of the autoencoder's middle.

Layouts: x_BCHW pixels or latents, x_BTC tokens; heads are split as (B, heads, T, head_dim) views without a copy.
Self-attention projects q, k and v in one matrix product. The keys and values of all cross-attention layers come from
the same context, so one `ContextProjection` makes them all: fewer, larger products.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ldm_scale.models.fused import Attention, FeedForward, GroupNorm

KeysValues = tuple[Tensor, Tensor]  # of the context, (B, M, C) each: one cross-attention layer's


def tokens_from_image(x_BCHW: Tensor) -> Tensor:
    """(B, H * W, C) tokens in row-major order; a view when x is channels_last."""
    b, c, h, w = x_BCHW.shape
    return x_BCHW.permute(0, 2, 3, 1).reshape(b, h * w, c)


def image_from_tokens(x_BTC: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) in channels_last layout, the inverse of `tokens_from_image`."""
    b, _, c = x_BTC.shape
    return x_BTC.reshape(b, height, width, c).permute(0, 3, 1, 2)


def _split_heads(x_BTC: Tensor, num_heads: int) -> Tensor:
    b, t, _ = x_BTC.shape
    return x_BTC.view(b, t, num_heads, -1).transpose(1, 2)


def _merge_heads(x_BNTD: Tensor) -> Tensor:
    b, n, t, d = x_BNTD.shape
    return x_BNTD.transpose(1, 2).reshape(b, t, n * d)


class SelfAttention(nn.Module):
    """Multi-head attention of tokens among themselves."""

    def __init__(self, channels: int, num_heads: int, bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=bias)
        self.attention = Attention(channels // num_heads)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, T, C) to (B, T, C)."""
        q, k, v = (_split_heads(part, self.num_heads) for part in self.to_qkv(x).chunk(3, dim=-1))
        return self.to_out(_merge_heads(self.attention(q, k, v)))  # type: ignore[no-any-return]


class ContextProjection(nn.Module):
    """Keys and values of a network's cross-attention layers, all from the context in one matrix product."""

    def __init__(self, context_dim: int, layer_channels: list[int]) -> None:
        super().__init__()
        self.layer_channels = layer_channels
        self.to_kv = nn.Linear(context_dim, 2 * sum(layer_channels), bias=False)

    def forward(self, context: Tensor) -> list[KeysValues]:
        """The layers' keys and values, (B, M, C) each. Shapes: context (B, M, d_tau)."""
        # One split, not one per layer: its backward is one concatenation.
        parts = self.to_kv(context).split([channels for channels in self.layer_channels for _ in "kv"], dim=-1)
        return list(zip(parts[::2], parts[1::2], strict=True))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to the context (arXiv:2112.10752, section 3.3)."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.attention = Attention(channels // num_heads)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context_kv: KeysValues) -> Tensor:
        """Shapes: x (B, T, C), context_kv (B, M, C) twice, one layer's of `ContextProjection`; returns (B, T, C)."""
        q = _split_heads(self.to_q(x), self.num_heads)
        k, v = (_split_heads(part, self.num_heads) for part in context_kv)
        return self.to_out(_merge_heads(self.attention(q, k, v)))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and GEGLU feed-forward, each pre-normalised and added to its input."""

    def __init__(self, channels: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = SelfAttention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = CrossAttention(channels, num_heads)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, dropout)

    def forward(self, x: Tensor, context_kv: KeysValues) -> Tensor:
        """Shapes: x (B, T, C), context_kv (B, M, C) twice; returns (B, T, C)."""
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), context_kv)
        return x + self.feed_forward(self.norm3(x))  # type: ignore[no-any-return]


class SpatialTransformer(nn.Module):
    """Transformer blocks on the pixels of a feature map, with a residual connection around them.

    The projections in and out are linear layers in every model: SD-1's 1x1 convolutions are the same function
    (`UNetConfig.linear_projection` only says in which of the two shapes an export writes them).
    Source: arXiv:2112.10752, appendix E.2.1.
    """

    def __init__(self, channels: int, num_heads: int, depth: int, norm_groups: int, dropout: float) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6, activation=None)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, num_heads, dropout) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context_kv: Sequence[KeysValues]) -> Tensor:
        """Shapes: x (B, C, H, W), context_kv one pair of (B, M, C) per block; returns (B, C, H, W)."""
        height, width = x.shape[2:]
        tokens = self.proj_in(tokens_from_image(self.norm(x)))
        for block, kv in zip(self.blocks, context_kv, strict=True):
            tokens = block(tokens, kv)
        return x + image_from_tokens(self.proj_out(tokens), height, width)


class ImageSelfAttention(nn.Module):
    """Self-attention over all pixels of a feature map: the middle of the autoencoder, and UNets without context.

    Source: arXiv:2105.05233, section 3 (the UNet's, with several heads and its norm's eps).
    """

    def __init__(self, channels: int, norm_groups: int, num_heads: int = 1, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps, activation=None)
        self.attention = SelfAttention(channels, num_heads, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) to (B, C, H, W)."""
        height, width = x.shape[2:]
        return x + image_from_tokens(self.attention(tokens_from_image(self.norm(x))), height, width)
