"""Attention layers of the UNet and of the autoencoder's middle.

Layouts: x_BCHW pixels or latents, x_BTC tokens; heads are split as (B, heads, T, head_dim) views without a copy.
Self-attention projects q, k and v in one matrix product, cross-attention k and v: fewer, larger products.
"""

from __future__ import annotations

from torch import Tensor, nn

from ldm_kernels import attention
from ldm_scale.models.fused import FeedForward, GroupNorm


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
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, T, C) to (B, T, C)."""
        q, k, v = (_split_heads(part, self.num_heads) for part in self.to_qkv(x).chunk(3, dim=-1))
        return self.to_out(_merge_heads(attention(q, k, v)))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to the context (arXiv:2112.10752, section 3.3)."""

    def __init__(self, channels: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Shapes: x (B, T, C), context (B, M, d_tau); returns (B, T, C)."""
        q = _split_heads(self.to_q(x), self.num_heads)
        k, v = (_split_heads(part, self.num_heads) for part in self.to_kv(context).chunk(2, dim=-1))
        return self.to_out(_merge_heads(attention(q, k, v)))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and GEGLU feed-forward, each pre-normalised and added to its input."""

    def __init__(self, channels: int, num_heads: int, context_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = SelfAttention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = CrossAttention(channels, num_heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, dropout)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Shapes: x (B, T, C), context (B, M, d_tau); returns (B, T, C)."""
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), context)
        return x + self.feed_forward(self.norm3(x))  # type: ignore[no-any-return]


class SpatialTransformer(nn.Module):
    """Transformer blocks on the pixels of a feature map, with a residual connection around them.

    The projections in and out are linear layers in every model: SD-1's 1x1 convolutions are the same function
    (`UNetConfig.linear_projection` only says in which of the two shapes an export writes them).
    Source: arXiv:2112.10752, appendix E.2.1.
    """

    def __init__(
        self, channels: int, num_heads: int, context_dim: int, depth: int, norm_groups: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6, activation=None)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, num_heads, context_dim, dropout) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Shapes: x (B, C, H, W), context (B, M, d_tau); returns (B, C, H, W)."""
        height, width = x.shape[2:]
        tokens = self.proj_in(tokens_from_image(self.norm(x)))
        for block in self.blocks:
            tokens = block(tokens, context)
        return x + image_from_tokens(self.proj_out(tokens), height, width)


class ImageSelfAttention(nn.Module):
    """Single-head self-attention over all pixels of a feature map: the middle of the autoencoder."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6, activation=None)
        self.attention = SelfAttention(channels, num_heads=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) to (B, C, H, W)."""
        height, width = x.shape[2:]
        return x + image_from_tokens(self.attention(tokens_from_image(self.norm(x))), height, width)
