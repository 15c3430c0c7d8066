"""What a run directory refuses and survives: a second run, other data, an uneven last batch."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config, TrainConfig
from ldm_scale.engine import env
from ldm_scale.engine.run_lock import RunLock
from ldm_scale.errors import ConfigError
from ldm_scale.training.autoencoder_step import AutoencoderTask
from ldm_scale.training.diffusion_step import DiffusionTask
from ldm_scale.training.trainer import Trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_artifact, tiny_config
from tests.helpers.shards import make_dataset


def _run(config: Config) -> tuple[bool, int]:
    launch = env.read_launch()
    environment = env.start(launch, config.train)
    plan = batch_plan(config, launch.world_size)
    task = (AutoencoderTask if config.stage == "autoencoder" else DiffusionTask)(config, plan, environment)
    trainer = Trainer(config, task, environment)
    return trainer.run(), trainer.state.cur_images


def _hold(run_dir: Path, ready: Event, pids: Queue[int], release: Event) -> None:
    environment = env.start(env.read_launch(), TrainConfig(device="cpu"))
    with RunLock(run_dir, environment.rank):
        if environment.rank == 0:
            pids.put(os.getpid())
            child = os.fork()  # as a loader's process
            if child == 0:
                time.sleep(600)
            pids.put(child)
        ready.set()
        release.wait(60)


def _refusal(run_dir: Path) -> str:
    environment = env.start(env.read_launch(), TrainConfig(device="cpu"))
    try:
        with RunLock(run_dir, environment.rank):
            return ""
    except ConfigError as error:
        return str(error)


def test_a_second_run_is_refused_on_all_ranks_until_the_first_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    context = multiprocessing.get_context("fork")
    ready, release, pids = context.Event(), context.Event(), context.Queue()
    holding = threading.Thread(target=lambda: _ignoring_failure(tmp_path / "run", ready, pids, release))
    holding.start()
    assert ready.wait(60)
    owner, child = pids.get(timeout=60), pids.get(timeout=60)
    try:
        for message in run_ranks(_refusal, 2, tmp_path / "run"):
            assert f"in use by another run (process {owner} on {socket.gethostname()}, Slurm job 4711)" in message
        os.kill(owner, signal.SIGKILL)
        while "zombie" not in Path(f"/proc/{owner}/status").read_text():
            time.sleep(0.01)
        os.kill(child, 0)  # it still lives, and does not hold the directory
        assert run_ranks(_refusal, 2, tmp_path / "run") == ["", ""]
    finally:
        release.set()
        os.kill(child, signal.SIGKILL)
        holding.join()


def _ignoring_failure(*args: Any) -> None:
    with contextlib.suppress(AssertionError):  # rank 0 is killed
        run_ranks(_hold, 2, *args)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"), RunLock(tmp_path / "file" / "run", rank=0):
        pass


def test_other_data_do_not_continue_a_run(tmp_path: Path) -> None:
    first = make_dataset(tmp_path / "a", num_samples=16, resolution=20)
    second = make_dataset(tmp_path / "b", num_samples=24, resolution=20)
    train = {"total_images": 8}
    run_ranks(_run, 1, tiny_config("autoencoder", first, tmp_path / "run", train=train))
    with pytest.raises(AssertionError, match="was started on other shards"):
        run_ranks(_run, 1, tiny_config("autoencoder", second, tmp_path / "run", train={"total_images": 16}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_stages_end_although_a_rank_has_no_image_in_the_last_batch(tmp_path: Path, precision: str) -> None:
    manifest = make_dataset(tmp_path / "data", num_samples=7, resolution=20)
    train = {"total_images": 8, "global_batch": 4, "micro_batch": 1, "precision": precision}
    for stage in ("autoencoder", "diffusion"):
        config = tiny_config(stage, manifest, tmp_path / stage, train=train, zero={"stage": 3})
        if stage == "diffusion":
            tiny_artifact(Path(config.artifact))
        assert run_ranks(_run, 2, config) == [(True, 8), (True, 8)]
    assert (tmp_path / "autoencoder" / "artifact" / "config.json").is_file()
