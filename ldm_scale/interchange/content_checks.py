"""Rules for what a file says of a model, looked at before anything is built or computed from it.

A trained configuration has passed `config.validate`; one that comes from a file may be anybody's. Bounds of single
numbers are `config.ranges`', shapes of networks `config.networks`', the latents' are here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm_scale.config.networks import (
    check_attention,
    check_attention_levels,
    check_context,
    check_kind,
    check_levels,
    check_unet,
)
from ldm_scale.config.ranges import check_ranges
from ldm_scale.config.schema import (
    AutoencoderConfig,
    ConditioningConfig,
    Config,
    DiffusionConfig,
    SamplingConfig,
    UNetConfig,
)
from ldm_scale.diffusion.process import build_process
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.foreign_section import Section
from ldm_scale.models.autoencoder import LatentStatistics

AUTOENCODER_SECTIONS = ("autoencoder", "latent_statistics")
DIFFUSION_SECTIONS = ("unet", "conditioning", "diffusion", "sampling")


def check_autoencoder(config: AutoencoderConfig, statistics: LatentStatistics) -> None:
    """Nothing, if such an autoencoder can be built, and its latents are a map of its raw latents and back.

    Raises: ConfigError that names the key.
    """
    check_ranges(replace(Config(), autoencoder=config))
    check_levels("autoencoder", config)
    check_attention_levels("autoencoder", config)
    check_kind(config)
    _check_statistics(statistics, config.latent_channels)


def check_diffusion(
    unet: UNetConfig, conditioning: ConditioningConfig, diffusion: DiffusionConfig, sampling: SamplingConfig
) -> None:
    """Nothing, if such a latent diffusion model can be built.

    Raises: ConfigError that names the key.
    """
    config = replace(Config(), unet=unet, conditioning=conditioning, diffusion=diffusion, sampling=sampling)
    check_ranges(config)
    check_unet(unet)
    check_attention(config)
    check_context(config)
    build_process(diffusion)


def check_content(content: Mapping[str, Any], sections: tuple[str, ...], path: Path) -> None:
    """Nothing, if a model's description has its sections, and says at which resolution it was trained.

    Raises: CheckpointError that names the key.
    """
    check_sections(content, (*sections, "provenance"), path)
    found = Section.of_json(path, content)
    for name in sections:
        if name != "latent_statistics":  # which may have been measured on any number of images
            found.section(name).require_possible()
    found.section("provenance").integer("resolution", at_least=1)


def check_sections(content: Mapping[str, Any], names: tuple[str, ...], path: Path) -> None:
    """Nothing, if these keys are there and hold keys and values.

    Raises: CheckpointError that names the key.
    """
    for name in names:
        if not isinstance(content.get(name), dict):
            raise CheckpointError(
                f"{path}: {name!r} is {content.get(name)!r}: must be a section of keys and values; export the model "
                "again"
            )


def _check_statistics(statistics: LatentStatistics, channels: int) -> None:
    for name, value in (("scale", statistics.scale), ("shift", statistics.shift)):
        if not math.isfinite(value) or (name == "scale" and value <= 0):
            rule = "a finite number above 0" if name == "scale" else "a finite number"
            raise ConfigError(f"latent_statistics.{name}={value!r}: must be {rule}; measure the latents again")
    means, deviations = statistics.channel_mean, statistics.channel_std
    if {len(means), len(deviations)} not in ({0}, {channels}):
        raise ConfigError(
            f"latent_statistics has {len(means)} values of channel_mean and {len(deviations)} of channel_std, the "
            f"latents have {channels} channels: must be one each, or none; measure the latents again"
        )
    if not all(math.isfinite(value) and value > 0 for value in deviations) or not all(map(math.isfinite, means)):
        raise ConfigError(
            f"latent_statistics.channel_std={list(deviations)}, channel_mean={list(means)}: must be finite, and the "
            "deviations above 0; measure the latents again"
        )
