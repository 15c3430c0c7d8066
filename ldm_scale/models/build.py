"""From configuration to networks, initialised from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from ldm_scale.config.schema import AutoencoderConfig, UNetConfig
from ldm_scale.models.autoencoder import Autoencoder
from ldm_scale.models.unet import UNet

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """Autoencoder on the current default device (`with torch.device("meta")` to count without memory)."""
    return Autoencoder(config)


def build_unet(config: UNetConfig, in_channels: int, out_channels: int, context_dim: int | None) -> UNet:
    """UNet on the current default device; a `context_dim` where its attention is a transformer's, None elsewhere."""
    return UNet(config, in_channels, out_channels, context_dim)


def build_seeded(build: Callable[[], ModuleT], seed: int) -> ModuleT:
    """What `build` returns, its random weights a function of the seed alone; the global generator stays as it was.

    Every rank builds the same network so. Weights keep their plain layout (ZeRO flattens them); the networks take
    their activations to channels_last, which is enough for the convolutions to choose that layout (`convolution.py`
    says where a CPU's do not).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
