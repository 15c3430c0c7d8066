"""Tiny configurations, and short trainings of them without the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ldm_scale.config.schema import (
    AutoencoderConfig,
    AutoencoderLossConfig,
    ConditioningConfig,
    Config,
    DataConfig,
    EmaConfig,
    LatentsConfig,
    OptimizerConfig,
    SamplingConfig,
    TextConditioningConfig,
    TrainConfig,
    UNetConfig,
    ZeroConfig,
)
from ldm_scale.interchange.artifact import write_artifact
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.models.build import build_autoencoder, build_seeded

AUTOENCODER = AutoencoderConfig(
    base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=3, norm_groups=4
)
UNET = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), head_dim=16, norm_groups=4
)
TEXT = TextConditioningConfig(width=16, depth=1, num_heads=2, max_tokens=16)
CONDITIONING = ConditioningConfig(text=TEXT)


def tiny_config(stage: str, manifest: Path, run_dir: Path, **sections: dict[str, Any]) -> Config:
    """A configuration that trains in milliseconds a step; `sections` replace single fields, section by section."""
    config = Config(
        experiment="tiny",
        stage=stage,  # type: ignore[arg-type]
        run_dir=str(run_dir),
        artifact=str(run_dir.parent / "artifact"),
        autoencoder=AUTOENCODER,
        autoencoder_loss=AutoencoderLossConfig(
            perceptual_weight=0.0,
            kl_weight=1e-3,
            adversarial_weight=0.5,
            discriminator_start_images=0,
            discriminator_base_channels=8,
            discriminator_layers=1,
        ),
        latents=LatentsConfig(statistics_images=16),
        unet=UNET,
        conditioning=CONDITIONING,
        data=DataConfig(manifest=str(manifest), validation_split="", resolution=16, crop_scale_min=0.9, num_workers=0),
        optimizer=OptimizerConfig(lr=1e-3),
        ema=EmaConfig(half_life_images=32.0),
        zero=ZeroConfig(stage=0),
        train=TrainConfig(
            total_images=64,
            global_batch=8,
            log_every_images=8,
            validate_every_images=0,
            sample_every_images=0,
            checkpoint_every_images=0,
            checkpoint_every_s=0.0,
            device="cpu",
        ),
        sampling=SamplingConfig(num_steps=2, prompts=("a", "b")),
    )
    replaced = {
        name: dataclasses.replace(getattr(config, name), **fields) if isinstance(fields, dict) else fields
        for name, fields in sections.items()
    }
    return dataclasses.replace(config, **replaced)


def tiny_artifact(directory: Path) -> Path:
    """An autoencoder artifact with random weights, for `AUTOENCODER`."""
    network = build_seeded(lambda: build_autoencoder(AUTOENCODER), seed=5)
    write_artifact(
        directory,
        {name: tensor.detach().clone() for name, tensor in network.state_dict().items()},
        AUTOENCODER,
        LatentStatistics(scale=0.7, num_images=8),
        provenance={"images": 0, "resolution": 16, "weights": "raw"},
    )
    return directory


def set_random_outputs(network: torch.nn.Module, seed: int) -> None:
    """Nothing; gives zero-initialised weights values, so that every parameter has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.02, generator=generator)
