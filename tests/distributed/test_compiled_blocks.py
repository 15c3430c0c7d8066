"""Runs whose blocks are compiled train the same model: on one rank and two, whether or not ZeRO gathers weights."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.data import build_loader
from ldm_scale.engine import env
from ldm_scale.engine.collectives import mean_over_ranks
from ldm_scale.models.compiled import compile_blocks
from ldm_scale.training import latent_task
from ldm_scale.training.diffusion_step import DiffusionTask
from tests.helpers.cases import rarely
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_artifact, tiny_config
from tests.helpers.shards import make_dataset

STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled")
    make_dataset(path / "data", num_samples=24, resolution=20)
    tiny_artifact(path / "artifact")
    return path


def _config(folder: Path, zero_stage: int, **train: Any) -> Config:
    return tiny_config(
        "diffusion", folder / "data" / "manifest.json", folder / "run", zero={"stage": zero_stage}, train=train
    )


def _losses(config: Config, backend: str) -> tuple[list[float], str]:
    launch = env.read_launch()
    environment = env.start(launch, config.train)
    plan = batch_plan(config, launch.world_size)
    chosen = functools.partial(compile_blocks, backend=backend)
    with mock.patch.object(latent_task, "compile_blocks", chosen):
        task = DiffusionTask(config, plan, environment)
    loader = build_loader(
        config.data,
        seed=config.train.seed,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        rank=launch.rank,
        world_size=launch.world_size,
    )
    losses = []
    for step, batch in zip(range(STEPS), itertools.cycle(loader), strict=False):
        metrics = task.accumulate([batch], step * 8)
        losses.append(float(mean_over_ranks(metrics["loss"])))
        task.update(step * 8)
    return losses, str(task.compile_report)


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[float]:
    losses, report = run_ranks(_losses, 1, _config(folder, 0), "")[0]
    assert report == "None"
    return losses


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "backend", "train"),
    [
        (1, 0, "aot_eager", {}),
        rarely(1, 0, "inductor", {}),
        rarely(2, 3, "aot_eager", {"activation_checkpointing": "full"}),
        rarely(2, 1, "aot_eager", {}),
        rarely(2, 2, "inductor", {"activation_checkpointing": "selective"}),
        rarely(2, 3, "inductor", {}),
    ],
)
@pytest.mark.timeout(900)
def test_losses_do_not_depend_on_compilation(
    folder: Path, plain: list[float], ranks: int, zero_stage: int, backend: str, train: dict[str, Any]
) -> None:
    config = _config(folder, zero_stage, compile="blocks", **train)
    for losses, report in run_ranks(_losses, ranks, config, backend, timeout_s=800.0):
        assert losses == pytest.approx(plain, rel=1e-4)
        assert report.startswith("train.compile=blocks: ")
        assert not report.startswith("train.compile=blocks: 0 graphs")
    assert plain[-1] < plain[0], "the steps did not lower the loss: the comparison shows nothing"
