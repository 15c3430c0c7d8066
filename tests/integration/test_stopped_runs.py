"""Figures and pictures of runs that are stopped or killed, and started again: those of the unbroken run."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.engine import env
from ldm_scale.training.autoencoder_step import AutoencoderTask
from ldm_scale.training.trainer import Trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_config
from tests.helpers.shards import make_dataset


class Killed(BaseException):
    """What stands for kill -9 within one process."""


class _Interrupted(Trainer):
    """Is asked to stop in the step at `stop_at` images, is killed in that at `kill_at`."""

    stop_at = kill_at = -1

    def _step(self, *args: Any) -> bool:
        if self.state.cur_images == self.kill_at:
            raise Killed
        if self.state.cur_images == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._step(*args)


def _attempt(config: Config, environment: env.Environment, **interruption: int) -> list[int]:
    """Images at which an attempt made pictures."""
    task = AutoencoderTask(config, batch_plan(config, environment.world_size), environment)
    trainer = _Interrupted(config, task, environment)
    pictures, shown = task.pictures, list[int]()

    def noting() -> Any:
        shown.append(trainer.state.cur_images)
        return pictures()

    task.pictures = noting  # type: ignore[method-assign]
    for name, images in interruption.items():
        setattr(trainer, name, images)
    try:
        assert trainer.run() == (not interruption)
    except Killed:
        assert "kill_at" in interruption
    return shown


def _disturbed(config: Config) -> tuple[list[int], list[int]]:
    """Images at which the unbroken run made pictures, and a disturbed one."""
    environment = env.start(env.read_launch(), config.train)
    unbroken = _attempt(replace(config, run_dir=f"{config.run_dir}-unbroken"), environment)
    shown = list[int]()
    # Stopped where validation is due; killed after it was made up for; killed after a checkpoint that followed one;
    # stopped where pictures alone are due.
    interruptions: tuple[dict[str, int], ...] = ({"stop_at": 8}, {"kill_at": 16}, {"kill_at": 32}, {"stop_at": 32}, {})
    for interruption in interruptions:
        shown += _attempt(config, environment, **interruption)
    return unbroken, shown


def test_what_a_stop_left_out_is_made_up_for_once(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "data", num_samples=16, resolution=20, splits=("train", "validation"))
    cadence = {"total_images": 56, "validate_every_images": 16, "sample_every_images": 40}
    cadence |= {"checkpoint_every_images": 32, "async_checkpoints": False}
    config = tiny_config(
        "autoencoder", manifest, tmp_path / "run", train=cadence, data={"validation_split": "validation"}
    )
    for unbroken, shown in run_ranks(_disturbed, 2, config):
        assert unbroken == [40, 56]
        assert shown == unbroken
    figures = [_validation(tmp_path / name) for name in ("run-unbroken", "run")]
    assert [images for images, _ in figures[0]] == [16, 32, 48, 56]
    assert figures[1] == figures[0]


def _validation(run_dir: Path) -> list[tuple[int, dict[str, str]]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [
        (row["images"], {name: value.hex() for name, value in row.items() if name.startswith("validation/")})
        for row in rows
    ]
    return [(images, figures) for images, figures in found if figures]
