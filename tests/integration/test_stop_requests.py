"""One rank alone is asked to stop: all save the same step, and all leave in the same way."""

from __future__ import annotations

import os
import re
import signal
from contextlib import ExitStack, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.engine import env
from ldm_scale.engine.checkpoint import latest_checkpoint
from ldm_scale.engine.rank_files import complete_folders, images_of
from ldm_scale.errors import CheckpointError, Restart
from ldm_scale.training import saving
from ldm_scale.training.autoencoder_step import AutoencoderTask
from ldm_scale.training.trainer import Trainer
from tests.helpers.disks import full_disk
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_config
from tests.helpers.shards import make_dataset


def _stopped(config: Config, numbers: dict[int, signal.Signals], fills: bool = False) -> tuple[str, int]:
    """How the run ended and where; `numbers` are the signals that ranks get during the second step.

    `fills`: the disk is full from then on.
    """
    launch = env.read_launch()
    environment = env.start(launch, config.train)
    task = AutoencoderTask(config, batch_plan(config, launch.world_size), environment)
    trainer = Trainer(config, task, environment)
    accumulate = task.accumulate

    def interrupted(batches: list[object], images: int) -> object:
        if images == 8 and fills:
            full.enter_context(full_disk())
        if images == 8 and environment.rank in numbers:
            os.kill(os.getpid(), numbers[environment.rank])
        return accumulate(batches, images)  # type: ignore[arg-type]

    task.accumulate = interrupted  # type: ignore[method-assign,assignment]
    with ExitStack() as full, redirect_stderr(StringIO()) as said:
        try:
            ending = "finished" if trainer.run() else "stopped"
        except Restart:
            ending = "to be started again"
        except CheckpointError as error:
            ending = str(error)
    return ending + "".join(re.findall("; images .* seen again", said.getvalue())), trainer.state.cur_images


@pytest.mark.parametrize(
    ("numbers", "ending"),
    [
        ({1: signal.SIGTERM}, "stopped"),
        ({1: signal.SIGUSR1}, "to be started again"),
        ({0: signal.SIGTERM, 1: signal.SIGUSR2}, "to be started again"),
    ],
)
def test_ranks_follow_the_one_that_was_asked(tmp_path: Path, numbers: dict[int, signal.Signals], ending: str) -> None:
    manifest = make_dataset(tmp_path / "data", num_samples=16, resolution=20)
    config = tiny_config("autoencoder", manifest, tmp_path / "run")
    assert run_ranks(_stopped, 2, config, numbers) == [(ending, 16), (ending, 16)]
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert images_of(newest) == 16


def _left_by_stops(config: Config) -> list[list[int]]:
    """Images of the checkpoints after each of three attempts that are stopped in their first step."""
    environment = env.start(env.read_launch(), config.train)
    root, left = Path(config.run_dir) / "checkpoints", []
    for _ in range(3):
        task = AutoencoderTask(config, batch_plan(config, 2), environment)
        trainer = Trainer(config, task, environment)
        accumulate = task.accumulate

        def interrupted(*args: object, accumulate: Any = accumulate) -> object:
            os.kill(os.getpid(), signal.SIGTERM)
            return accumulate(*args)

        task.accumulate = interrupted  # type: ignore[method-assign,assignment]
        assert not trainer.run()
        left.append([images_of(folder) for folder in complete_folders(root)])
    return left


def test_stops_leave_no_more_checkpoints_than_are_kept_and_their_own(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "data", num_samples=16, resolution=20)
    config = tiny_config("autoencoder", manifest, tmp_path / "run", train={"keep_checkpoints": 1})
    assert run_ranks(_left_by_stops, 2, config)[0] == [[8], [8, 16], [16, 24]]
    # The newest is damaged: the one before is what the run stands on, and stays.
    file = tmp_path / "run" / "checkpoints" / "images-0000000024" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert run_ranks(_left_by_stops, 2, config)[0] == [[16, 24], [24, 32], [32, 40]]


@pytest.mark.parametrize(
    ("number", "every", "ending"),
    [
        (signal.SIGUSR1, 8, "to be started again; images 8 to 15 have to be seen again"),
        (signal.SIGUSR1, 0, "the run ends at 16 images without a checkpoint"),
        (signal.SIGTERM, 8, "the run ends at 16 images without a checkpoint"),
    ],
)
def test_a_run_asked_to_come_back_does_so_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, every: int, ending: str
) -> None:
    monkeypatch.setattr(saving, "LAST_PAUSES_S", (0.0,))
    manifest = make_dataset(tmp_path / "data", num_samples=16, resolution=20)
    train = {"checkpoint_every_images": every, "async_checkpoints": False}
    config = tiny_config("autoencoder", manifest, tmp_path / "run", train=train)
    for told, images in run_ranks(_stopped, 2, config, {1: number}, True):
        assert told.startswith(ending)
        assert images == 16
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert (images_of(newest) if newest else 0) == every
