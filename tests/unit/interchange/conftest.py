"""Tiny models with random weights, none of them zero: a layer that is zero hides everything before it."""

from __future__ import annotations

import pytest

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.schema import (
    AutoencoderConfig,
    ConditioningConfig,
    DiffusionConfig,
    SamplingConfig,
    TextConditioningConfig,
    UNetConfig,
)
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact, make_artifact, make_diffusion_artifact
from ldm_scale.models.autoencoder import Autoencoder, LatentStatistics
from tests.helpers.weights import random_state

AUTOENCODER = AutoencoderConfig(
    base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=3, norm_groups=4
)
UNET = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), head_dim=8, norm_groups=4
)
TEXT = TextConditioningConfig(width=16, depth=1, num_heads=2)
CONDITIONING = ConditioningConfig(text=TEXT)


@pytest.fixture(scope="session")
def autoencoder_artifact() -> Artifact:
    statistics = LatentStatistics(shift=0.0, scale=0.7, num_images=100)
    return make_artifact(random_state(Autoencoder(AUTOENCODER)), AUTOENCODER, statistics, {"resolution": 16})


@pytest.fixture(scope="session")
def diffusion_artifact(autoencoder_artifact: Artifact) -> DiffusionArtifact:
    return make_diffusion_artifact(
        random_state(LatentDiffusion(UNET, CONDITIONING, AUTOENCODER.latent_channels)),
        autoencoder_artifact,
        unet=UNET,
        conditioning=CONDITIONING,
        diffusion=DiffusionConfig(),
        sampling=SamplingConfig(num_steps=3, guidance_scale=2.0),
        provenance={"resolution": 16},
    )
