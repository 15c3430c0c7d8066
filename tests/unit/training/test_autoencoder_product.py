"""Latent statistics and held-out figures: exact, and the same on any number of ranks."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.data import build_loader
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.engine import env
from ldm_scale.engine.checkpoint import latest_checkpoint
from ldm_scale.operations.train import train
from ldm_scale.training.autoencoder_product import measure_statistics
from ldm_scale.training.autoencoder_step import AutoencoderTask
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_config
from tests.helpers.shards import make_dataset, make_sample, write_tar

NUM_IMAGES = 21  # neither batches nor ranks divide it


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("product")
    manifest = make_dataset(folder / "data", NUM_IMAGES, samples_per_shard=8, resolution=20)
    return tiny_config("autoencoder", manifest, folder / "run", latents={"statistics_images": NUM_IMAGES})


def _figures(config: Config, zero_stage: int) -> dict[str, Any]:
    config = dataclasses.replace(config, zero=dataclasses.replace(config.zero, stage=zero_stage))
    launch = env.read_launch()
    environment = env.start(launch, config.train)
    task = AutoencoderTask(config, batch_plan(config, launch.world_size), environment)
    statistics = measure_statistics(task)
    shown = task.pictures()["reconstruction"]
    pictures = torch.cat(list(shown.panels.values()))
    return {"statistics": statistics, "validation": task.validate(0), "pictures": pictures, "names": shown.captions}


def _latents_at_once(config: Config) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Posterior samples of all images, without the trainer's loop."""
    task = AutoencoderTask(config, batch_plan(config, 1), env.start(env.read_launch(), config.train))
    batch = next(
        iter(
            build_loader(
                config.data,
                seed=config.train.seed,
                global_batch=NUM_IMAGES,
                micro_batch=NUM_IMAGES,
                rank=0,
                world_size=1,
                augment=False,
                num_epochs=1,
            )
        )
    )
    noise = task.posterior_noise(batch.image_numbers.tolist(), "statistics")
    with torch.no_grad():
        mean, logvar = task.network.encode_moments(batch.images)
    return (mean + (0.5 * logvar).exp() * noise).double().numpy()


@pytest.fixture(scope="module")
def on_one_rank(config: Config) -> dict[str, Any]:
    report: dict[str, Any] = run_ranks(_figures, 1, config, 0)[0]
    return report


def test_statistics_are_those_of_all_latents_at_once(config: Config, on_one_rank: dict[str, Any]) -> None:
    latents = run_ranks(_latents_at_once, 1, config)[0]
    statistics = on_one_rank["statistics"]
    assert statistics.num_images == NUM_IMAGES
    assert statistics.shift == 0
    assert statistics.scale == pytest.approx(1 / latents.std(), rel=1e-6)


def test_fewer_images_can_be_asked_for(config: Config) -> None:
    fewer = dataclasses.replace(config, latents=dataclasses.replace(config.latents, statistics_images=8))
    assert run_ranks(_figures, 1, fewer, 0)[0]["statistics"].num_images == 8


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_figures_do_not_depend_on_ranks(config: Config, on_one_rank: dict[str, Any], zero_stage: int) -> None:
    for report in run_ranks(_figures, 2, config, zero_stage):
        assert report["statistics"].num_images == NUM_IMAGES
        assert report["statistics"].scale == pytest.approx(on_one_rank["statistics"].scale, rel=1e-6)
        assert report["validation"].keys() == on_one_rank["validation"].keys()
        for name, value in on_one_rank["validation"].items():
            assert math.isfinite(value)
            assert report["validation"][name] == pytest.approx(value, rel=1e-5), name


def test_pictures_are_images_above_their_reconstructions(on_one_rank: dict[str, Any]) -> None:
    pictures = on_one_rank["pictures"]
    assert pictures.shape == (16, 3, 16, 16)
    assert pictures.abs().max() <= 1
    assert not torch.equal(pictures[:8], pictures[8:])
    assert len(set(on_one_rank["names"])) == 8


def _train(config: Config) -> None:
    train(config, env.read_launch())


def test_equal_pictures_end_without_an_artifact_and_keep_the_checkpoint(tmp_path: Path) -> None:
    picture = make_sample(0, 20, np.random.default_rng(0))
    tar = write_tar(tmp_path / "train-000000.tar", [(f"{n:03d}", picture) for n in range(8)])
    index_tars([tar], tmp_path / "manifest.json", "train")
    config = tiny_config("autoencoder", tmp_path / "manifest.json", tmp_path / "run", train={"total_images": 8})
    with pytest.raises(AssertionError, match=r"NumericsError: latent statistics: the latents of 8 images differ by"):
        run_ranks(_train, 1, config)
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is not None
    assert not (tmp_path / "run" / "artifact").exists()
