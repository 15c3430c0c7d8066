"""The autoencoder of stage 1, regularised by a KL term or by vector quantisation (arXiv:2112.10752, section 3.1; the
network is that of arXiv:2012.09841).

This is the only file that converts between raw latents and latents: z = (z_raw - shift) * scale. Raw latents of a VQ
autoencoder are those before quantisation: the quantiser belongs to the decoder (arXiv:2112.10752, section 3.1), so that
stage 2 works in a continuous space and what it makes is put on codes when it is decoded. The identity kind has no
network at all: its latents are the pixels, which makes stage 2 a pixel-space diffusion model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_scale.config.schema import AutoencoderConfig, Recomputation
from ldm_scale.engine.lazy_tensors import renamed
from ldm_scale.models.attention import ImageSelfAttention
from ldm_scale.models.blocks import Downsample, ResidualBlock, Upsample
from ldm_scale.models.fused import GroupNorm
from ldm_scale.models.quantizer import Quantizer

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
OUTPUT_LOGVAR = "output_logvar"


@dataclass(frozen=True)
class LatentStatistics:
    """The affine map from raw latents to latents, and what it was measured on.

    One scalar, or, where `channel_mean` and `channel_std` are given, a mean and a deviation for each channel (shift is
    0 and scale is 1 then).
    Source: arXiv:2112.10752, appendix G: scale = 1 / std of all components, shift 0.
    """

    shift: float = 0.0
    scale: float = 1.0
    num_images: int = 0  # 0 = never measured
    channel_mean: tuple[float, ...] = ()
    channel_std: tuple[float, ...] = ()
    posterior: Literal["sample", "mode"] = "sample"  # which latents were measured

    def normalize(self, z_raw: Tensor) -> Tensor:
        """Latents of raw latents. Shapes: (B, c, h, w), any float type; returns the same."""
        if self.channel_mean:
            return (z_raw - self._per_channel(self.channel_mean, z_raw)) / self._per_channel(self.channel_std, z_raw)
        return (z_raw - self.shift) * self.scale

    def denormalize(self, z: Tensor) -> Tensor:
        """Raw latents of latents: the inverse of `normalize`."""
        if self.channel_mean:
            return z * self._per_channel(self.channel_std, z) + self._per_channel(self.channel_mean, z)
        return z / self.scale + self.shift

    def _per_channel(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


class AutoencoderOutput(NamedTuple):
    """What one training pass returns (as a plain tuple: ZeRO-3's hooks rebuild tuples, not named ones).

    `last_features` is the input of the decoder's last convolution.
    """

    reconstruction: Tensor  # (B, 3, H, W)
    last_features: Tensor  # (B, base_channels, H, W)
    mean: Tensor  # (B, c, H/f, W/f); vq: the raw latents
    logvar: Tensor | None  # kl: (B, c, H/f, W/f)
    codes: Tensor | None  # vq: (B, c, H/f, W/f), with a gradient to the codebook alone
    indices: Tensor | None  # vq: (B, H/f, W/f)
    output_logvar: Tensor | None  # (1,) where the output's variance is learned


class _Levels(nn.Module):
    """What encoder and decoder share: residual blocks level by level, with attention after each on some levels."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpoint_activations: Recomputation = "none"

    def _compute(self, block: nn.Module, x: Tensor, large: bool = False) -> Tensor:
        """block(x); what lies inside is not kept for backward but computed again, where that is asked for.

        `large`: it keeps much, so that it is among the selected.

        The reentrant form: with the other one, ZeRO stage 3 hands out released parameters, of another shape than were
        recorded, and torch refuses them.
        """
        again = self.checkpoint_activations == "full" or (self.checkpoint_activations == "selective" and large)
        if again and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, x, use_reentrant=True, preserve_rng_state=False))
        return cast(Tensor, block(x))

    def _level(self, blocks: nn.Sequential, attentions: nn.ModuleList, finest: bool, x: Tensor) -> Tensor:
        for index, block in enumerate(blocks):
            x = self._compute(block, x, finest)
            if len(attentions):
                x = self._compute(attentions[index], x, large=True)
        return x


class Middle(nn.Module):
    """Residual block, optional self-attention, residual block at the latent resolution."""

    def __init__(self, config: AutoencoderConfig, channels: int) -> None:
        super().__init__()
        self.block1 = _residual_block(config, channels, channels)
        self.attention = ImageSelfAttention(channels, config.norm_groups) if config.mid_attention else None
        self.block2 = _residual_block(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, C, h, w) to (B, C, h, w)."""
        x = self.block1(x)
        if self.attention is not None:
            x = self.attention(x)
        return self.block2(x)  # type: ignore[no-any-return]


class Encoder(_Levels):
    """Pixels to features of the moments; levels are numbered from the finest (0)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.levels = nn.ModuleList()
        self.attentions = nn.ModuleList()
        self.downsamples = nn.ModuleList()
        channels = config.base_channels
        for level, width in enumerate(widths):
            self.levels.append(_residual_stack(config, channels, width, config.num_res_blocks))
            self.attentions.append(_attentions(config, level, width, config.num_res_blocks))
            channels = width
            if level < len(widths) - 1:
                self.downsamples.append(Downsample(width, asymmetric=True))
        self.middle = Middle(config, channels)
        self.norm_out = GroupNorm(config.norm_groups, channels, NORM_EPS)
        self.conv_out = nn.Conv2d(channels, _moment_channels(config), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, 3, H, W) to (B, 2c, H/f, W/f) of a KL autoencoder, (B, c, H/f, W/f) of a VQ one."""
        return self.finish(self.descend(x))

    def descend(self, x: Tensor) -> Tensor:
        """Input of the middle. Shapes: (B, 3, H, W) to (B, C, H/f, W/f)."""
        x = self.conv_in(x)
        for level, (blocks, attentions) in enumerate(zip(self.levels, self.attentions, strict=True)):
            x = self._level(cast(nn.Sequential, blocks), cast(nn.ModuleList, attentions), level == 0, x)
            if level < len(self.downsamples):
                x = self.downsamples[level](x)
        return x

    def finish(self, x: Tensor) -> Tensor:
        """Output from the input of the middle on."""
        return cast(Tensor, self.conv_out(self.norm_out(self._compute(self.middle, x))))


class Decoder(_Levels):
    """Raw latents to pixels; levels are numbered from the finest (0) and run from the coarsest."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.middle = Middle(config, channels)
        levels: list[nn.Module] = []
        attentions: list[nn.Module] = []
        upsamples: list[nn.Module] = []
        for level in reversed(range(len(widths))):
            levels.insert(0, _residual_stack(config, channels, widths[level], config.num_res_blocks + 1))
            attentions.insert(0, _attentions(config, level, widths[level], config.num_res_blocks + 1))
            channels = widths[level]
            if level > 0:
                upsamples.insert(0, Upsample(channels))
        self.levels = nn.ModuleList(levels)
        self.attentions = nn.ModuleList(attentions)
        self.upsamples = nn.ModuleList(upsamples)
        self.norm_out = GroupNorm(config.norm_groups, channels, NORM_EPS)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def features(self, z_raw: Tensor) -> Tensor:
        """Input of the last convolution. Shapes: (B, c, h, w) to (B, base_channels, fh, fw)."""
        return self.ascend(self.begin(z_raw))

    def begin(self, z_raw: Tensor) -> Tensor:
        """Output of the middle. Shapes: (B, c, h, w) to (B, C, h, w)."""
        return self._compute(self.middle, self.conv_in(z_raw.contiguous(memory_format=torch.channels_last)))

    def ascend(self, x: Tensor) -> Tensor:
        """`features` from the output of the middle on."""
        for level in reversed(range(len(self.levels))):
            blocks, attentions = cast(nn.Sequential, self.levels[level]), cast(nn.ModuleList, self.attentions[level])
            x = self._level(blocks, attentions, level == 0, x)
            if level > 0:
                x = self.upsamples[level - 1](x)
        return self.norm_out(x)  # type: ignore[no-any-return]


class Autoencoder(nn.Module):
    """Encoder, regularisation, decoder, and the latent statistics that belong to its weights."""

    output_logvar: nn.Parameter | None

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.statistics = LatentStatistics()
        self.quantizer: Quantizer | None = None
        self.register_parameter(OUTPUT_LOGVAR, None)
        if config.kind == "identity":
            return
        moments = _moment_channels(config)
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        if config.kind == "vq":
            assert config.codebook_size is not None, "validated: a VQ autoencoder has a codebook"
            self.quantizer = Quantizer(config.codebook_size, config.latent_channels)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def learn_output_variance(self) -> None:
        """Adds the logarithm of the output's variance, 0 at first, to the parameters.

        Training only: artifacts leave it out (`without_training_parameters`).
        """
        self.output_logvar = nn.Parameter(torch.zeros(1))

    def checkpoint_activations(self, what: Recomputation) -> None:
        """Nothing; those blocks are computed again in backward instead of keeping what lies inside them."""
        for part in (self.encoder, self.decoder):
            part.checkpoint_activations = what

    def encode_moments(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the raw latents' posterior; a point (None for its variance) unless the kind is kl.

        Shapes: (B, 3, H, W) to twice (B, c, H/f, W/f).
        """
        if self.config.kind == "identity":
            return x, None
        return self.posterior(self.encoder(x.contiguous(memory_format=torch.channels_last)))

    def posterior(self, encoded: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `encode_moments` returns, of what the encoder returns."""
        moments = self.quant_conv(encoded)
        if self.config.kind == "vq":
            return moments, None
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode_raw(self, z_raw: Tensor) -> Tensor:
        """Pixels of raw latents, not clamped; VQ puts them on codes first.

        Shapes: (B, c, h, w) to (B, 3, fh, fw).
        """
        if self.config.kind == "identity":
            return z_raw
        features = self.decoder.features(self.decoder_input(z_raw))
        return self.decoder.conv_out(features)  # type: ignore[no-any-return]

    def decoder_input(self, z_raw: Tensor) -> Tensor:
        """What the decoder takes, of raw latents; VQ puts them on codes first. Shapes: (B, c, h, w) twice."""
        if self.quantizer is not None:
            z_raw = self.quantizer(z_raw)[0].to(self.post_quant_conv.weight.dtype)
        return self.post_quant_conv(z_raw)  # type: ignore[no-any-return]

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents z of pixels: a sample of the posterior with the given noise, its mode without.

        Shapes: x (B, 3, H, W), noise (B, c, H/f, W/f); returns (B, c, H/f, W/f).
        """
        return self.latents(*self.encode_moments(x), noise)

    def latents(self, mean: Tensor, logvar: Tensor | None, noise: Tensor | None = None) -> Tensor:
        """Latents z of a posterior that `encode_moments` gave, now or before, in fp32. Shapes: as in `encode`."""
        # In fp32 like the statistics: a sample and its scaling would each lose digits in bf16.
        z_raw = mean.float()
        if noise is not None and logvar is not None:
            z_raw = z_raw + (0.5 * logvar.float()).exp() * noise.float()
        return self.statistics.normalize(z_raw)

    def decode(self, z: Tensor) -> Tensor:
        """Pixels of latents, not clamped, in the weights' type. Shapes: (B, c, h, w) to (B, 3, fh, fw)."""
        z_raw = self.statistics.denormalize(z)
        return self.decode_raw(z_raw if self.config.kind == "identity" else z_raw.to(self.post_quant_conv.weight.dtype))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor | None, ...]:
        """The fields of `AutoencoderOutput`; only a KL autoencoder looks at the noise.

        Shapes: x (B, 3, H, W), noise (B, c, H/f, W/f).
        """
        mean, logvar = self.encode_moments(x)
        codes, indices = None, None
        if logvar is not None:
            z_raw = mean + (0.5 * logvar).exp() * noise
        else:
            assert self.quantizer is not None, "validated: the identity is not trained"
            codes, indices = self.quantizer(mean)
            # Straight through: the decoder sees codes, and its gradient goes to the latents as if it saw them.
            z_raw = mean + (codes.to(mean.dtype) - mean).detach()
        features = self.decoder.features(self.post_quant_conv(z_raw))
        # Handed out as a value of this pass, because ZeRO stage 3 takes the parameter away afterwards.
        output_logvar = None if self.output_logvar is None else self.output_logvar * 1.0
        return self.decoder.conv_out(features), features, mean, logvar, codes, indices, output_logvar


def without_training_parameters(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a trained autoencoder that belong to the model: all but the output's learned variance."""
    return state if OUTPUT_LOGVAR not in state else renamed(state, lambda name: None if name == OUTPUT_LOGVAR else name)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of N(mean, exp(logvar)) from N(0, 1), summed over each latent. Shapes: (B, c, h, w) twice; returns (B,).

    Source: arXiv:1312.6114, appendix B.
    """
    return 0.5 * torch.sum(mean.square() + logvar.exp() - 1.0 - logvar, dim=(1, 2, 3))


def _moment_channels(config: AutoencoderConfig) -> int:
    return config.latent_channels * (2 if config.kind == "kl" else 1)


def _attentions(config: AutoencoderConfig, level: int, channels: int, depth: int) -> nn.ModuleList:
    """One self-attention per residual block of the level, or none."""
    number = depth if level in config.attention_levels else 0
    return nn.ModuleList(ImageSelfAttention(channels, config.norm_groups) for _ in range(number))


def _residual_block(config: AutoencoderConfig, in_channels: int, out_channels: int) -> ResidualBlock:
    return ResidualBlock(in_channels, out_channels, config.norm_groups, NORM_EPS)


def _residual_stack(config: AutoencoderConfig, in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    widths = [in_channels] + [out_channels] * depth
    return nn.Sequential(*(_residual_block(config, a, b) for a, b in pairwise(widths)))
