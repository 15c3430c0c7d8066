"""Trained models, as far as weights tell, for runs that begin with them; sizes as in `runs.py`."""

from __future__ import annotations

from pathlib import Path

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.schema import AutoencoderConfig, DiffusionConfig, SamplingConfig
from ldm_scale.interchange.artifact import (
    make_diffusion_artifact,
    read_artifact,
    write_artifact,
    write_diffusion_artifact,
)
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.models.build import build_autoencoder, build_seeded
from tests.helpers.runs import AUTOENCODER, CONDITIONING, UNET, set_random_outputs

PROVENANCE = {"images": 4096, "resolution": 16, "weights": "ema"}


def diffusion_origin(directory: Path, artifact: Path) -> Path:
    """A diffusion artifact on that autoencoder artifact, all of whose weights have values."""
    network = build_seeded(lambda: LatentDiffusion(UNET, CONDITIONING, AUTOENCODER.latent_channels), seed=21)
    set_random_outputs(network, seed=22)
    model = make_diffusion_artifact(
        {name: tensor.detach().clone() for name, tensor in network.state_dict().items()},
        read_artifact(artifact),
        unet=UNET,
        conditioning=CONDITIONING,
        diffusion=DiffusionConfig(),
        sampling=SamplingConfig(guidance_scale=7.5),
        provenance=PROVENANCE,
    )
    write_diffusion_artifact(directory, model)
    return directory


def autoencoder_origin(directory: Path, config: AutoencoderConfig) -> Path:
    """An autoencoder artifact, all of whose weights have values."""
    network = build_seeded(lambda: build_autoencoder(config), seed=23)
    set_random_outputs(network, seed=24)
    state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    write_artifact(directory, state, config, LatentStatistics(scale=0.5, num_images=8), provenance=PROVENANCE)
    return directory
