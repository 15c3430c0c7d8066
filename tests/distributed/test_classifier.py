"""The classifier of latents on one rank, two and at every ZeRO stage: equal losses and figures, resumed exactly."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import ConditioningConfig, Config
from ldm_scale.data import build_loader
from ldm_scale.engine import env
from ldm_scale.engine.collectives import mean_over_ranks
from ldm_scale.engine.rank_files import read_manifest
from ldm_scale.errors import ConfigError
from ldm_scale.operations.train import train
from ldm_scale.training.classifier_step import ClassifierTask
from tests.helpers.cases import rarely
from tests.helpers.latents import encode
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_artifact, tiny_config
from tests.helpers.shards import make_dataset

STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classifier")
    make_dataset(path / "data", num_samples=24, resolution=20)
    tiny_artifact(path / "artifact")
    return path


def _config(folder: Path, zero_stage: int = 0, run: str = "run", dataset: str = "data", **sections: Any) -> Config:
    return tiny_config(
        "classifier",
        folder / dataset / "manifest.json",
        folder / run,
        zero={"stage": zero_stage},
        unet={"attention": "self"},
        conditioning=ConditioningConfig(),
        classifier={"num_classes": 3, "pool_head_dim": 8},
        **sections,
    )


def _losses_and_figures(config: Config) -> tuple[list[float], dict[str, float]]:
    launch = env.read_launch()
    environment = env.start(launch, config.train)
    task = ClassifierTask(config, batch_plan(config, launch.world_size), environment)
    loader = build_loader(
        config.data,
        seed=config.train.seed,
        global_batch=task.plan.global_batch,
        micro_batch=task.plan.micro_batch,
        rank=environment.rank,
        world_size=environment.world_size,
        accept_latents=True,
    )
    stream, losses = iter(loader), []
    for step in range(STEPS):
        metrics = task.accumulate(list(itertools.islice(stream, task.plan.accumulation_steps)), step * 8)
        losses.append(float(mean_over_ranks(metrics["loss"])))
        task.update(step * 8)
    with task.evaluating():
        return losses, task.validate(STEPS * 8)


@pytest.fixture(scope="module")
def reference(folder: Path) -> tuple[list[float], dict[str, float]]:
    return run_ranks(_losses_and_figures, 1, _config(folder))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "train"),
    [
        rarely(1, 2, {"micro_batch": 2}),
        (2, 0, {}),
        rarely(2, 1, {"activation_checkpointing": "selective"}),
        (2, 2, {"micro_batch": 2}),
        (2, 3, {"activation_checkpointing": "full"}),
    ],
)
def test_nothing_depends_on_ranks_stage_accumulation_or_checkpointing(
    folder: Path, reference: tuple[list[float], dict[str, float]], ranks: int, zero_stage: int, train: dict[str, Any]
) -> None:
    losses, figures = reference
    assert min(losses) < losses[0], "the steps did not lower the loss: the comparison shows nothing"
    for found, validated in run_ranks(_losses_and_figures, ranks, _config(folder, zero_stage, train=train)):
        assert found == pytest.approx(losses, rel=1e-5)
        assert validated.keys() == figures.keys()
        for name in figures:
            assert validated[name] == pytest.approx(figures[name], rel=1e-4), name


def test_figures_are_of_every_noise_level_raw_and_averaged(reference: tuple[list[float], dict[str, float]]) -> None:
    _, figures = reference
    for kind in ("accuracy", "loss"):
        for weights in ("raw", "ema"):
            bins = [figures[f"validation/{kind}/{weights}/bin{i}"] for i in range(8)]
            assert figures[f"validation/{kind}/{weights}/mean"] == pytest.approx(sum(bins) / 8)
    assert figures["validation/loss/raw/mean"] != figures["validation/loss/ema/mean"]


def _train(config: Config) -> bool:
    return train(config, env.read_launch())


@pytest.mark.rest
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(folder: Path) -> None:
    config = _config(folder, 3, run="resumed", train={"total_images": 32, "checkpoint_every_images": 16})
    run, unbroken = folder / "resumed", folder / "unbroken"
    assert run_ranks(_train, 2, config) == [True, True]
    run.rename(unbroken)
    middle = Path("checkpoints") / "images-0000000016"
    shutil.copytree(unbroken / middle, run / middle)
    assert run_ranks(_train, 2, config) == [True, True]
    before, after = (read_manifest(path / "checkpoints" / "images-0000000032") for path in (unbroken, run))
    assert after["models"] == before["models"]
    assert {n: r["crc32"] for n, r in after["files"].items()} == {n: r["crc32"] for n, r in before["files"].items()}
    rows = [[json.loads(line) for line in (path / "metrics.jsonl").open()] for path in (unbroken, run)]
    assert rows[1][-1] | {"time": 0} == rows[0][-1] | {"time": 0}


def test_cached_latents_train_the_same(folder: Path) -> None:
    encode(folder, "--dtype", "float32", "--max-shards", "2")
    whole = {"crop_scale_min": 1.0}
    pictures, cached = (
        run_ranks(_losses_and_figures, 1, _config(folder, dataset=name, data=whole))[0] for name in ("data", "cache")
    )
    assert cached[0] == pytest.approx(pictures[0], rel=1e-5)
    assert cached[1] == pytest.approx(pictures[1], rel=1e-4)


def _refused(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        train(config, env.read_launch())
    return str(caught.value)


def test_one_sample_for_two_ranks_is_refused_on_both(folder: Path) -> None:
    make_dataset(folder / "few", num_samples=1, resolution=20)
    for line in run_ranks(_refused, 2, _config(folder, 3, dataset="few")):
        assert "has 1 samples in its split 'train' and each of the 2 ranks needs one" in line
