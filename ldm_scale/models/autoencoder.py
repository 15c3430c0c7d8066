"""The KL-regularised autoencoder (arXiv:2112.10752, sections 3.1 and appendix G; arXiv:2012.09841 for the network).

This is the only file that converts between raw latents and latents: z = (z_raw - shift) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm_scale.config.schema import AutoencoderConfig
from ldm_scale.models.attention import ImageSelfAttention
from ldm_scale.models.blocks import Downsample, ResidualBlock, Upsample
from ldm_scale.models.fused import GroupNorm

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class LatentStatistics:
    """The affine map from raw latents to latents, and what it was measured on.

    Source: arXiv:2112.10752, appendix G: scale = 1 / std of all components, shift 0.
    """

    shift: float = 0.0
    scale: float = 1.0
    num_images: int = 0  # 0 = never measured


class AutoencoderOutput(NamedTuple):
    """What one training pass returns (as a plain tuple: ZeRO-3's hooks rebuild tuples, not named ones).

    `last_features` is the input of the decoder's last convolution.
    """

    reconstruction: Tensor  # (B, 3, H, W)
    last_features: Tensor  # (B, base_channels, H, W)
    mean: Tensor  # (B, c, H/f, W/f)
    logvar: Tensor  # (B, c, H/f, W/f)


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


class Encoder(nn.Module):
    """Pixels to features of the moments; levels are numbered from the finest (0)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.levels = nn.ModuleList()
        self.downsamples = nn.ModuleList()
        channels = config.base_channels
        for level, width in enumerate(widths):
            self.levels.append(_residual_stack(config, channels, width, config.num_res_blocks))
            channels = width
            if level < len(widths) - 1:
                self.downsamples.append(Downsample(width, asymmetric=True))
        self.middle = Middle(config, channels)
        self.norm_out = GroupNorm(config.norm_groups, channels, NORM_EPS)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, 3, H, W) to (B, 2c, H/f, W/f)."""
        x = self.conv_in(x)
        for level, blocks in enumerate(self.levels):
            x = blocks(x)
            if level < len(self.downsamples):
                x = self.downsamples[level](x)
        return self.conv_out(self.norm_out(self.middle(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Raw latents to pixels; levels are numbered from the finest (0) and run from the coarsest."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.middle = Middle(config, channels)
        levels: list[nn.Module] = []
        upsamples: list[nn.Module] = []
        for level in reversed(range(len(widths))):
            levels.insert(0, _residual_stack(config, channels, widths[level], config.num_res_blocks + 1))
            channels = widths[level]
            if level > 0:
                upsamples.insert(0, Upsample(channels))
        self.levels = nn.ModuleList(levels)
        self.upsamples = nn.ModuleList(upsamples)
        self.norm_out = GroupNorm(config.norm_groups, channels, NORM_EPS)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def features(self, z_raw: Tensor) -> Tensor:
        """Input of the last convolution. Shapes: (B, c, h, w) to (B, base_channels, fh, fw)."""
        x = self.middle(self.conv_in(z_raw.contiguous(memory_format=torch.channels_last)))
        for level in reversed(range(len(self.levels))):
            x = self.levels[level](x)
            if level > 0:
                x = self.upsamples[level - 1](x)
        return self.norm_out(x)  # type: ignore[no-any-return]


class Autoencoder(nn.Module):
    """Encoder, KL regularisation, decoder, and the latent statistics that belong to its weights."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.statistics = LatentStatistics()
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the raw latents' posterior. Shapes: (B, 3, H, W) to twice (B, c, H/f, W/f)."""
        features = self.encoder(x.contiguous(memory_format=torch.channels_last))
        mean, logvar = self.quant_conv(features).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode_raw(self, z_raw: Tensor) -> Tensor:
        """Pixels of raw latents, not clamped. Shapes: (B, c, h, w) to (B, 3, fh, fw)."""
        features = self.decoder.features(self.post_quant_conv(z_raw))
        return self.decoder.conv_out(features)  # type: ignore[no-any-return]

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents z of pixels: a sample of the posterior with the given noise, its mode without.

        Shapes: x (B, 3, H, W), noise (B, c, H/f, W/f); returns (B, c, H/f, W/f).
        """
        mean, logvar = self.encode_moments(x)
        # In fp32 like the statistics: a sample and its scaling would each lose digits in bf16.
        z_raw = mean.float() if noise is None else mean.float() + (0.5 * logvar.float()).exp() * noise.float()
        return (z_raw - self.statistics.shift) * self.statistics.scale

    def decode(self, z: Tensor) -> Tensor:
        """Pixels of latents, not clamped, in the weights' type. Shapes: (B, c, h, w) to (B, 3, fh, fw)."""
        z_raw = z / self.statistics.scale + self.statistics.shift
        return self.decode_raw(z_raw.to(self.post_quant_conv.weight.dtype))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields of `AutoencoderOutput`. Shapes: x (B, 3, H, W), noise (B, c, H/f, W/f)."""
        mean, logvar = self.encode_moments(x)
        features = self.decoder.features(self.post_quant_conv(mean + (0.5 * logvar).exp() * noise))
        return self.decoder.conv_out(features), features, mean, logvar


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of N(mean, exp(logvar)) from N(0, 1), summed over each latent. Shapes: (B, c, h, w) twice; returns (B,).

    Source: arXiv:1312.6114, appendix B.
    """
    return 0.5 * torch.sum(mean.square() + logvar.exp() - 1.0 - logvar, dim=(1, 2, 3))


def _residual_block(config: AutoencoderConfig, in_channels: int, out_channels: int) -> ResidualBlock:
    return ResidualBlock(in_channels, out_channels, config.norm_groups, NORM_EPS)


def _residual_stack(config: AutoencoderConfig, in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    widths = [in_channels] + [out_channels] * depth
    return nn.Sequential(*(_residual_block(config, a, b) for a, b in pairwise(widths)))
