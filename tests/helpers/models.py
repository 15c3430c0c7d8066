"""Tiny diffusion models with random weights, as artifacts on disk, for every kind of conditioning."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.schema import ConditioningConfig, DiffusionConfig, SamplingConfig
from ldm_scale.interchange.artifact import make_diffusion_artifact, read_artifact, write_diffusion_artifact
from ldm_scale.models.build import build_seeded
from tests.helpers.runs import AUTOENCODER, UNET, set_random_outputs, tiny_artifact

SIDE = 16  # pixels; latents of 8


def tiny_model(
    folder: Path,
    conditioning: ConditioningConfig,
    labels: dict[str, list[str]] | None = None,
    diffusion: DiffusionConfig | None = None,
    **sampling: Any,
) -> Path:
    """A diffusion artifact of three steps; its UNet has self-attention where there is no context."""
    autoencoder = read_artifact(tiny_artifact(folder / "autoencoder"))
    contexts = (conditioning.text, conditioning.frozen_text, conditioning.classes, conditioning.layout)
    unet = UNET if any(contexts) else dataclasses.replace(UNET, attention="self")
    network = build_seeded(lambda: LatentDiffusion(unet, conditioning, AUTOENCODER.latent_channels), seed=1)
    set_random_outputs(network, seed=2)
    artifact = make_diffusion_artifact(
        {name: tensor.detach() for name, tensor in network.state_dict().items()},
        autoencoder,
        unet=unet,
        conditioning=conditioning,
        diffusion=diffusion or DiffusionConfig(),
        sampling=SamplingConfig(**{"num_steps": 3, "guidance_scale": 2.0} | sampling),
        provenance={"images": 0, "resolution": SIDE, "weights": "raw", "labels": labels or {}},
    )
    write_diffusion_artifact(folder / "model", artifact)
    return folder / "model"
