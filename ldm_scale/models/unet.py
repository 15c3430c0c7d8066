"""The time-conditional UNet (arXiv:2112.10752, section 3.3 and appendix E.2.1).

Levels are numbered from the finest (0). Each level on the way down has `num_res_blocks` residual blocks and leaves
one skip connection per block and one per downsampling; each level on the way up has one block more and consumes them.
Behind the blocks of some levels, and in the middle of every UNet, stands attention: spatial transformers in models
with a context, single self-attention layers in those without (arXiv:2105.05233), whatever is concatenated to z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from itertools import islice
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_scale.config.schema import Recomputation, UNetConfig
from ldm_scale.models.attention import ContextProjection, ImageSelfAttention, KeysValues, SpatialTransformer
from ldm_scale.models.blocks import Downsample, Resampling, ResidualBlock, Upsample
from ldm_scale.models.embedding import TimestepEmbedding
from ldm_scale.models.fused import GroupNorm

NORM_EPS = 1e-5


class Level(nn.Module):
    """The blocks of one resolution: residual blocks, attention behind each where the level has it."""

    def __init__(self, config: UNetConfig, level: int, in_channels: list[int]) -> None:
        super().__init__()
        out_channels = config.base_channels * config.channel_multipliers[level]
        self.blocks = nn.ModuleList(_residual_block(config, channels, out_channels) for channels in in_channels)
        has_attention = level in config.attention_levels
        self.attentions = nn.ModuleList(_attention(config, out_channels) for _ in in_channels if has_attention)

    def run_block(self, index: int, x: Tensor, time: Tensor, *context_kv: Tensor) -> Tensor:
        """Output of block `index` and of its attention, which takes `context_kv`: keys, values, keys, ...

        Shapes: x (B, C_in, H, W), context_kv (B, M, C) each; returns (B, C_out, H, W).
        """
        x = self.blocks[index](x, time)
        return _attend(self.attentions[index], x, context_kv) if len(self.attentions) else x


class Middle(nn.Module):
    """The coarsest resolution's residual block, attention, residual block."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.block1 = _residual_block(config, channels, channels)
        self.attention = _attention(config, channels)
        self.block2 = _residual_block(config, channels, channels)

    def forward(self, x: Tensor, time: Tensor, *context_kv: Tensor) -> Tensor:
        """Shapes: x (B, C, H, W), context_kv (B, M, C) each; returns (B, C, H, W)."""
        return self.block2(_attend(self.attention, self.block1(x, time), context_kv), time)  # type: ignore[no-any-return]


class UNetEncoder(nn.Module):
    """The UNet's way down and its middle; a part of `UNet`, and a network of its own below a classifier's head."""

    def __init__(
        self, config: UNetConfig, in_channels: int, context_dim: int | None, layer_channels: list[int] | None = None
    ) -> None:
        """`layer_channels`: the cross-attention layers that the context is projected for; None = the encoder's."""
        super().__init__()
        assert (config.attention == "transformer") == (context_dim is not None), (
            "validated: transformers alone take a context"
        )
        self.config = config
        # Which blocks compute again in backward: by name ("down.0.1": level, index; "middle"; "up.2.0"), or a rule.
        self.checkpoint_activations: Recomputation | Set[str] = "none"
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.time_embedding = TimestepEmbedding(config.base_channels, 4 * config.base_channels)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        if context_dim is not None:
            if layer_channels is None:
                layer_channels = cross_attention_channels(config, up=False)
            self.context_projection = ContextProjection(context_dim, layer_channels)

        self.down = nn.ModuleList()
        self.downsamples = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            self.down.append(Level(config, level, [channels] + [width] * (config.num_res_blocks - 1)))
            channels = width
            if level < len(widths) - 1:
                self.downsamples.append(_resampler(config, width, "down"))
        self.middle = Middle(config, channels)

    def encode(self, z: Tensor, time: Tensor, context_kv: Iterator[KeysValues]) -> tuple[Tensor, list[Tensor]]:
        """Features of the middle, and those that cross to the way up, in the order in which they arise.

        Shapes: z (B, in_channels, H, W), time (B, 4 base_channels) of `time_embedding`.
        """
        x = self.conv_in(z.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for level, module in enumerate(self.down):
            for index in range(self.config.num_res_blocks):
                name = f"down.{level}.{index}"
                x = self._run_block(name, cast(Level, module), index, level == 0, x, time, context_kv)
                skips.append(x)
            if level < len(self.downsamples):
                x = _resampled(self.downsamples[level], x, time)
                skips.append(x)
        return self._compute("middle", self.middle, False, x, time, *self._take(context_kv)), skips

    def keys_values(self, context: Tensor | None) -> Iterator[KeysValues]:
        """Keys and values of the cross-attention layers in the order in which they run; none without a context."""
        assert (context is None) == (self.config.attention == "self"), "a context is for transformers, which need one"
        return iter(()) if context is None else iter(self.context_projection(context))

    def _run_block(
        self,
        name: str,
        level: Level,
        index: int,
        finest: bool,
        x: Tensor,
        time: Tensor,
        context_kv: Iterator[KeysValues],
    ) -> Tensor:
        taken = self._take(context_kv) if len(level.attentions) else []

        def run(x: Tensor, time: Tensor, *kv: Tensor) -> Tensor:
            return level.run_block(index, x, time, *kv)

        return self._compute(name, run, finest or len(level.attentions) > 0, x, time, *taken)

    def _take(self, context_kv: Iterator[KeysValues]) -> list[Tensor]:
        """The share of one spatial transformer; empty without a context."""
        return [part for pair in islice(context_kv, self.config.transformer_depth) for part in pair]

    def _compute(self, name: str, run: Callable[..., Tensor], large: bool, *inputs: Tensor) -> Tensor:
        """run(*inputs); what lies inside is not kept for backward but computed again, where that is asked for.

        `name` is the block's among those that may be listed; `large`: it keeps much, so that it is among the selected.

        The reentrant form: with the other one, ZeRO stage 3 hands out released parameters, of another shape than were
        recorded, and torch refuses them.
        """
        what = self.checkpoint_activations
        again = name in what if isinstance(what, Set) else what == "full" or (what == "selective" and large)
        if not (again and torch.is_grad_enabled()):
            return run(*inputs)
        return checkpoint(run, *inputs, use_reentrant=True, preserve_rng_state=self.config.dropout > 0)


class UNet(UNetEncoder):
    """Denoiser of latents: (z_t, t, context) to the network's output, in the latents' shape."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, context_dim: int | None) -> None:
        super().__init__(config, in_channels, context_dim, cross_attention_channels(config))
        widths = [config.base_channels * m for m in config.channel_multipliers]
        skips = [widths[0]]
        for level, width in enumerate(widths):
            skips += [width] * (config.num_res_blocks + (level < len(widths) - 1))
        channels = widths[-1]
        # Indexed by level like `down`, run from the coarsest to the finest.
        up: list[Level] = []
        upsamples: list[nn.Module] = []
        for level in reversed(range(len(widths))):
            in_widths = []
            for _ in range(config.num_res_blocks + 1):
                in_widths.append(channels + skips.pop())
                channels = widths[level]
            up.insert(0, Level(config, level, in_widths))
            if level > 0:
                upsamples.insert(0, _resampler(config, channels, "up"))
        self.up = nn.ModuleList(up)
        self.upsamples = nn.ModuleList(upsamples)

        self.norm_out = GroupNorm(config.norm_groups, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        zero_branches(self)
        _zero(self.conv_out)

    def forward(self, z: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Output for noised latents, with the spatial conditioning concatenated to them where the model has one.

        Shapes: z (B, in_channels, H, W) with H and W divisible by 2 ** (levels - 1), t (B,) of any number type,
        context (B, M, d_tau) unless the attention is `self`; returns (B, out_channels, H, W).
        """
        time = self.time_embedding(t)
        context_kv = self.keys_values(context)
        x, skips = self.encode(z, time, context_kv)
        for level in reversed(range(len(self.up))):
            blocks = cast(Level, self.up[level])
            for index in range(len(blocks.blocks)):
                x = torch.cat([x, skips.pop()], dim=1)
                x = self._run_block(f"up.{level}.{index}", blocks, index, level == 0, x, time, context_kv)
            if level > 0:
                x = _resampled(self.upsamples[level - 1], x, time)
        return self.conv_out(self.norm_out(x))  # type: ignore[no-any-return]


def zero_branches(network: nn.Module) -> None:
    """Nothing; residual branches start at zero, as in the LDM code: every block begins as identity."""
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            _zero(module.conv2)
        elif isinstance(module, SpatialTransformer):
            _zero(module.proj_out)
        elif isinstance(module, ImageSelfAttention):
            _zero(module.attention.to_out)


def _attend(attention: nn.Module, x: Tensor, context_kv: tuple[Tensor, ...]) -> Tensor:
    """The output of either kind of attention; only a spatial transformer takes keys and values."""
    if isinstance(attention, SpatialTransformer):
        return attention(x, list(zip(context_kv[::2], context_kv[1::2], strict=True)))  # type: ignore[no-any-return]
    return attention(x)  # type: ignore[no-any-return]


def _resampled(resampler: nn.Module, x: Tensor, time: Tensor) -> Tensor:
    return resampler(x, time) if isinstance(resampler, ResidualBlock) else resampler(x)  # type: ignore[no-any-return]


def _resampler(config: UNetConfig, channels: int, direction: Resampling) -> nn.Module:
    if config.residual_resampling:
        return _residual_block(config, channels, channels, direction)
    return Downsample(channels, asymmetric=False) if direction == "down" else Upsample(channels)


def _residual_block(
    config: UNetConfig, in_channels: int, out_channels: int, resampling: Resampling | None = None
) -> ResidualBlock:
    return ResidualBlock(
        in_channels,
        out_channels,
        config.norm_groups,
        NORM_EPS,
        time_dim=4 * config.base_channels,
        dropout=config.dropout,
        scale_shift=config.scale_shift_norm,
        resampling=resampling,
    )


def _attention(config: UNetConfig, channels: int) -> nn.Module:
    heads = num_heads(config, channels)
    if config.attention == "self":
        return ImageSelfAttention(channels, config.norm_groups, heads, NORM_EPS)
    return SpatialTransformer(channels, heads, config.transformer_depth, config.norm_groups, config.dropout)


def cross_attention_channels(config: UNetConfig, up: bool = True) -> list[int]:
    """Channels of every cross-attention layer in the order in which they run: down, middle and, unless not `up`, up."""
    widths = [config.base_channels * m for m in config.channel_multipliers]
    down = [widths[level] for level in range(len(widths)) if level in config.attention_levels]
    layers = [width for width in down for _ in range(config.num_res_blocks)]
    layers.append(widths[-1])
    if up:
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
