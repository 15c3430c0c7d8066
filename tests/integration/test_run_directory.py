"""What a run directory refuses and survives: a second run, other data, an uneven last batch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config, TrainConfig
from ldm_scale.engine import env
from ldm_scale.engine.collectives import gather_objects
from ldm_scale.engine.run_lock import LOCK, RunLock
from ldm_scale.errors import ConfigError
from ldm_scale.training.autoencoder_step import AutoencoderTask
from ldm_scale.training.diffusion_step import DiffusionTask
from ldm_scale.training.trainer import Trainer
from tests.helpers.disks import full_disk
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


def _hold(run_dir: Path, pids: Path) -> None:
    """Holds the directory until it is killed; writes down the ranks' processes and a child of rank 0's."""
    environment = env.start(env.read_launch(), TrainConfig(device="cpu"))
    with RunLock(run_dir, environment.rank):
        child = os.fork() if environment.rank == 0 else -1
        if child != 0:
            processes = [process for pair in gather_objects((os.getpid(), child)) for process in pair]
            if environment.rank == 0:
                pids.with_suffix(".new").write_text(" ".join(map(str, processes)))
                pids.with_suffix(".new").rename(pids)
        time.sleep(600)


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
    pids = tmp_path / "pids"
    holding = threading.Thread(target=_ignoring_failure, args=(tmp_path / "run", pids))
    holding.start()
    while not pids.exists():
        time.sleep(0.02)
    owner, child, other, _ = map(int, pids.read_text().split())
    try:
        for message in run_ranks(_refusal, 2, tmp_path / "run"):
            assert f"in use by another run (process {owner} on {socket.gethostname()}, Slurm job 4711)" in message
        os.kill(owner, signal.SIGKILL)
        while "zombie" not in Path(f"/proc/{owner}/status").read_text():
            time.sleep(0.02)
        os.kill(child, 0)  # it still lives, and does not hold the directory
        assert run_ranks(_refusal, 2, tmp_path / "run") == ["", ""]
    finally:
        for process in (owner, child, other):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        holding.join()


def _ignoring_failure(*args: Any) -> None:
    with contextlib.suppress(AssertionError):  # the ranks are killed
        run_ranks(_hold, 2, *args)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"), RunLock(tmp_path / "file" / "run", rank=0):
        pass


def test_a_full_disk_does_not_keep_a_run_from_its_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    with full_disk(), RunLock(run_dir, rank=0):
        pass
    assert f"{run_dir / LOCK} cannot be written (File too large): free space there" in capsys.readouterr().err


def test_a_file_system_without_locks_is_not_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (
        pytest.raises(ConfigError, match=r"/\.lock cannot be locked \(No locks available\)"),
        RunLock(tmp_path, rank=0),
    ):
        pass


def test_other_data_do_not_continue_a_run(tmp_path: Path) -> None:
    first = make_dataset(tmp_path / "a", num_samples=16, resolution=20)
    second = make_dataset(tmp_path / "b", num_samples=24, resolution=20)
    train = {"total_images": 8}
    run_ranks(_run, 1, tiny_config("autoencoder", first, tmp_path / "run", train=train))
    with pytest.raises(AssertionError, match="was started on other shards"):
        run_ranks(_run, 1, tiny_config("autoencoder", second, tmp_path / "run", train={"total_images": 16}))


@pytest.mark.rest
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
