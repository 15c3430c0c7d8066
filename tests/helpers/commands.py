"""Overrides that shrink the demo experiments to the sizes of `runs.py`, and refusals, for tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from ldm_scale.__main__ import main

TOTAL_IMAGES = 640


def _overrides(folder: Path, experiment: str, run_dir: Path, *more: str) -> list[str]:
    """A demo experiment on `folder`/data and `folder`/artifact; later overrides win."""
    return [
        f"experiment={experiment}",
        f"run_dir={run_dir}",
        f"data.manifest={folder / 'data' / 'manifest.json'}",
        "data.validation_split=",
        "data.resolution=16",
        "autoencoder.base_channels=8",
        "autoencoder.channel_multipliers=[1,2]",
        "autoencoder.latent_channels=3",
        "autoencoder.norm_groups=4",
        "optimizer.warmup_images=8",
        "train.device=cpu",
        "train.global_batch=8",
        "train.checkpoint_every_images=8",
        f"train.total_images={TOTAL_IMAGES}",
        *more,
    ]


def stage1(folder: Path, run_dir: Path, *more: str) -> list[str]:
    return _overrides(
        folder,
        "demo_autoencoder",
        run_dir,
        "autoencoder_loss.perceptual_weight=0",
        "autoencoder_loss.discriminator_base_channels=8",
        "autoencoder_loss.discriminator_layers=1",
        "autoencoder_loss.discriminator_start_images=16",
        "latents.statistics_images=16",
        *more,
    )


def stage2(folder: Path, run_dir: Path, *more: str) -> list[str]:
    return _overrides(
        folder,
        "demo_text",
        run_dir,
        f"artifact={folder / 'artifact'}",
        "unet={base_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_levels: [1]}",
        "unet={head_dim: 16, norm_groups: 4}",
        "conditioning.text={width: 16, depth: 1, num_heads: 2, max_tokens: 16}",
        "sampling.num_steps=2",
        "sampling.prompts=[a]",
        *more,
    )


def refusal(capfd: pytest.CaptureFixture[str], arguments: list[str], status: int) -> str:
    """The line that the command prints when it refuses its arguments."""
    capfd.readouterr()
    assert main(["train", *arguments]) == status
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.count("\n") == 1, errors
    assert errors.startswith("error: ")
    assert not dist.is_initialized()
    return errors
