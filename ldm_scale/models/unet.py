"""The time-conditional UNet with spatial transformers (arXiv:2112.10752, section 3.3 and appendix E.2.1).

Levels are numbered from the finest (0). Each level on the way down has `num_res_blocks` residual blocks and leaves
one skip connection per block and one per downsampling; each level on the way up has one block more and consumes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import cast

import torch
from torch import Tensor, nn

from ldm_scale.config.schema import UNetConfig
from ldm_scale.models.attention import ContextProjection, KeysValues, SpatialTransformer
from ldm_scale.models.blocks import Downsample, ResidualBlock, Upsample
from ldm_scale.models.embedding import TimestepEmbedding
from ldm_scale.models.fused import GroupNorm

NORM_EPS = 1e-5


class Level(nn.Module):
    """The blocks of one resolution: residual blocks, a spatial transformer behind each where the level has them."""

    def __init__(self, config: UNetConfig, level: int, in_channels: list[int]) -> None:
        super().__init__()
        out_channels = config.base_channels * config.channel_multipliers[level]
        self.blocks = nn.ModuleList(_residual_block(config, channels, out_channels) for channels in in_channels)
        has_attention = level in config.attention_levels
        self.attentions = nn.ModuleList(
            _spatial_transformer(config, out_channels) for _ in in_channels if has_attention
        )

    def run_block(self, index: int, x: Tensor, time: Tensor, context_kv: Iterator[KeysValues]) -> Tensor:
        """Output of block `index` and of its transformer, which takes its share of `context_kv`.

        Shapes: x (B, C_in, H, W); returns (B, C_out, H, W).
        """
        x = self.blocks[index](x, time)
        if len(self.attentions):
            attention = cast(SpatialTransformer, self.attentions[index])
            x = attention(x, list(islice(context_kv, len(attention.blocks))))
        return x


class Middle(nn.Module):
    """The coarsest resolution's residual block, spatial transformer, residual block."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.block1 = _residual_block(config, channels, channels)
        self.attention = _spatial_transformer(config, channels)
        self.block2 = _residual_block(config, channels, channels)

    def forward(self, x: Tensor, time: Tensor, context_kv: list[KeysValues]) -> Tensor:
        """Shapes: x (B, C, H, W), context_kv one pair of (B, M, C) per block; returns (B, C, H, W)."""
        return self.block2(self.attention(self.block1(x, time), context_kv), time)  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Denoiser of latents: (z_t, t, context) to a prediction of the shape of z_t."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, context_dim: int) -> None:
        super().__init__()
        self.config = config
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.time_embedding = TimestepEmbedding(config.base_channels, 4 * config.base_channels)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.context_projection = ContextProjection(context_dim, cross_attention_channels(config))

        self.down = nn.ModuleList()
        self.downsamples = nn.ModuleList()
        skips = [widths[0]]
        channels = widths[0]
        for level, width in enumerate(widths):
            self.down.append(Level(config, level, [channels] + [width] * (config.num_res_blocks - 1)))
            channels = width
            skips += [width] * config.num_res_blocks
            if level < len(widths) - 1:
                self.downsamples.append(Downsample(width, asymmetric=False))
                skips.append(width)

        self.middle = Middle(config, channels)

        # Indexed by level like `down`, run from the coarsest to the finest.
        up: list[Level] = []
        upsamples: list[Upsample] = []
        for level in reversed(range(len(widths))):
            in_widths = []
            for _ in range(config.num_res_blocks + 1):
                in_widths.append(channels + skips.pop())
                channels = widths[level]
            up.insert(0, Level(config, level, in_widths))
            if level > 0:
                upsamples.insert(0, Upsample(channels))
        self.up = nn.ModuleList(up)
        self.upsamples = nn.ModuleList(upsamples)

        self.norm_out = GroupNorm(config.norm_groups, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        self._zero_outputs()

    def _zero_outputs(self) -> None:
        """Residual branches and the prediction start at zero, as in the LDM code: every block begins as identity."""
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                _zero(module.conv2)
            elif isinstance(module, SpatialTransformer):
                _zero(module.proj_out)
        _zero(self.conv_out)

    def forward(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Prediction for noised latents.

        Shapes: z (B, c, H, W) with H and W divisible by 2 ** (levels - 1), t (B,), context (B, M, d_tau);
        returns (B, out_channels, H, W).
        """
        time = self.time_embedding(t)
        context_kv = iter(self.context_projection(context))
        x = self.conv_in(z.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for level, module in enumerate(self.down):
            blocks = cast(Level, module)
            for index in range(len(blocks.blocks)):
                x = blocks.run_block(index, x, time, context_kv)
                skips.append(x)
            if level < len(self.downsamples):
                x = self.downsamples[level](x)
                skips.append(x)

        x = self.middle(x, time, list(islice(context_kv, self.config.transformer_depth)))

        for level in reversed(range(len(self.up))):
            blocks = cast(Level, self.up[level])
            for index in range(len(blocks.blocks)):
                x = blocks.run_block(index, torch.cat([x, skips.pop()], dim=1), time, context_kv)
            if level > 0:
                x = self.upsamples[level - 1](x)
        return self.conv_out(self.norm_out(x))  # type: ignore[no-any-return]


def _residual_block(config: UNetConfig, in_channels: int, out_channels: int) -> ResidualBlock:
    return ResidualBlock(
        in_channels,
        out_channels,
        config.norm_groups,
        NORM_EPS,
        time_dim=4 * config.base_channels,
        dropout=config.dropout,
    )


def _spatial_transformer(config: UNetConfig, channels: int) -> SpatialTransformer:
    return SpatialTransformer(
        channels,
        num_heads(config, channels),
        config.transformer_depth,
        config.norm_groups,
        config.dropout,
    )


def cross_attention_channels(config: UNetConfig) -> list[int]:
    """Channels of every cross-attention layer in the order in which they run: down, middle, up."""
    widths = [config.base_channels * m for m in config.channel_multipliers]
    down = [widths[level] for level in range(len(widths)) if level in config.attention_levels]
    layers = [width for width in down for _ in range(config.num_res_blocks)]
    layers.append(widths[-1])
    layers += [width for width in reversed(down) for _ in range(config.num_res_blocks + 1)]
    return [width for width in layers for _ in range(config.transformer_depth)]


def num_heads(config: UNetConfig, channels: int) -> int:
    """Attention heads of a level with that many channels (a fixed number, or channels / head_dim)."""
    if config.num_heads is not None:
        return config.num_heads
    assert config.head_dim is not None, "validate.py lets exactly one of head_dim and num_heads through"
    return channels // config.head_dim


def _zero(module: nn.Conv2d | nn.Linear) -> None:
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
