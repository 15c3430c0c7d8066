"""Hangs of every kind end by themselves, with culprit and phase named; slow work within its time is left alone."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from ldm_scale import faults
from ldm_scale.config.schema import TrainConfig, WatchdogConfig
from ldm_scale.engine import collectives, env, phases
from ldm_scale.engine.env import read_launch
from ldm_scale.engine.hangs import FOLDER, VERDICT
from ldm_scale.engine.stragglers import WINDOW
from ldm_scale.engine.watchdog import Watchdog
from ldm_scale.errors import LdmScaleError, Restart
from ldm_scale.operations.train import train
from ldm_scale.telemetry.tensorboard import read_metrics
from tests.helpers.cases import rarely
from tests.helpers.ranks import Rank, started_ranks
from tests.helpers.runs import tiny_config
from tests.helpers.shards import make_dataset

STEP_S, OTHER_S = 3.0, 60.0
ALLOWED_S = STEP_S + 10.0  # what a hang may take to its end
NEVER = 1_000_000  # images
BATCH = 8


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), num_samples=16, samples_per_shard=16, resolution=20)


def _train(
    manifest: Path,
    run_dir: Path,
    rules: str,
    stage: int,
    workers: int,
    total_images: int = NEVER,
    save_every_images: int = 0,
    step_s: float = STEP_S,
) -> int:
    """The command's exit status."""
    os.environ[faults.VARIABLE] = rules
    config = tiny_config(
        "autoencoder",
        manifest,
        run_dir,
        train={
            "total_images": total_images,
            "global_batch": BATCH,
            "check_ranks_every_images": 0,
            "checkpoint_every_images": save_every_images,
            "async_checkpoints": False,
        },
        data={"num_workers": workers, "prefetch_batches": 1},
        zero={"stage": stage},
        watchdog={"step_s": step_s, "other_s": OTHER_S},
    )
    try:
        train(config, read_launch())
    except LdmScaleError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _images(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def _wait_for_steps(run_dir: Path, ranks: list[Rank], steps: int = 5) -> None:
    deadline = time.monotonic() + 100
    while _images(run_dir) < steps:
        assert time.monotonic() < deadline, [rank.output for rank in ranks]
        assert all(rank.process.exitcode is None for rank in ranks), [rank.output for rank in ranks]
        time.sleep(0.05)


def _verdict(run_dir: Path) -> str:
    (path,) = (run_dir / FOLDER).glob(f"*/{VERDICT}")
    return path.read_text()


def _stop_rank(rank: Rank) -> None:
    psutil.Process(rank.process.pid).suspend()


def _stop_loader(rank: Rank) -> None:
    (loader,) = psutil.Process(rank.process.pid).children()
    loader.suspend()


CASES: dict[str, tuple[str, Callable[[Rank], None] | None, int, tuple[str, ...]]] = {
    # rules of faults, what happens to rank 1, ZeRO stage, what the verdict says
    "stopped": ("", _stop_rank, 1, ("phase", "the process of rank 1 is stopped")),
    "loader": ("", _stop_loader, 1, ("phase data", "loader process", "is stopped")),
    "fetch": ("sleep:at=data.fetch,rank=1,nth=40,seconds=600", None, 1, ("phase data", "is sleeping")),
    "batch": ("sleep:at=data.batch,rank=1,nth=9,seconds=600", None, 1, ("phase data", "behind the others")),
    "forward": ("sleep:at=step.forward,rank=1,nth=9,seconds=600", None, 3, ("phase forward", "in reach")),
    "collective": (
        "sleep:at=step.reduce,rank=1,nth=9,seconds=600",
        None,
        0,
        ("phase reduce", "not begun the collective"),
    ),
}

SAMPLE = ("loader", "collective")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", [case if case in SAMPLE else rarely(case) for case in CASES])
def test_a_hang_ends_and_is_named(case: str, manifest: Path, tmp_path: Path) -> None:
    rules, happens, stage, expected = CASES[case]
    run_dir = tmp_path / "run"
    with started_ranks(_train, 2, tmp_path, manifest, run_dir, rules, stage, int(case in ("loader", "fetch"))) as ranks:
        _wait_for_steps(run_dir, ranks)
        if happens is not None:
            happens(ranks[1])
        seen, seen_at = _images(run_dir), time.monotonic()
        while ranks[0].process.exitcode is None:
            if _images(run_dir) > seen:
                seen, seen_at = _images(run_dir), time.monotonic()
            assert time.monotonic() - seen_at < 3 * ALLOWED_S, [rank.output for rank in ranks]
            time.sleep(0.05)
        took_s = time.monotonic() - seen_at
        live = ranks if case != "stopped" else ranks[:1]
        assert [rank.end(10) for rank in live] == [Restart.exit_code] * len(live), [rank.output for rank in ranks]
    assert took_s < ALLOWED_S
    text = _verdict(run_dir)
    assert text.startswith("culprit: rank 1 (")
    for words in expected:
        assert words in text, text
    assert text.strip() in ranks[0].output
    reports = sorted(path.name for path in (run_dir / FOLDER).glob("*/rank-*.txt"))
    assert reports == [f"rank-0000{rank}.txt" for rank in range(len(live))]
    stacks = "".join(path.read_text() for path in (run_dir / FOLDER).glob("*/rank-*.txt"))
    assert stacks.count("trainer.py") >= len(live)
    if case == "fetch":
        assert re.search(r"\nLoader process \d+, sleeping:\n.*in _decoded", stacks, re.DOTALL), stacks


@pytest.mark.rest
@pytest.mark.timeout(240)
def test_a_run_names_its_slow_rank(manifest: Path, tmp_path: Path) -> None:
    rules = "sleep:at=step.forward,rank=1,times=1000,seconds=0.05"
    run_dir, images = tmp_path / "run", 8 * WINDOW
    with started_ranks(_train, 2, tmp_path, manifest, run_dir, rules, 1, 0, images) as ranks:
        assert [rank.end(200) for rank in ranks] == [0, 0], [rank.output for rank in ranks]
        assert len(re.findall(r"rank 1 \(.*\) is slow: phase forward takes it 0\.\d+ s a step", ranks[0].output)) == 1
    (row,) = [row for row in read_metrics(run_dir) if "ranks/slow" in row]
    assert (row["images"], row["ranks/forward_slowest"], row["ranks/slow"]) == (images, 1.0, 1.0)
    assert row["ranks/forward_s_max"] - row["ranks/forward_s_median"] > 0.02


def _watched(run_dir: Path, config: WatchdogConfig, work: Callable[[int], None]) -> None:
    """Runs `work` of this rank under a watchdog."""
    environment = env.start(read_launch(), TrainConfig(device="cpu"), config)
    assert environment.meeting is not None
    with Watchdog(config, run_dir, environment.rank, environment.meeting):
        work(environment.rank)


def _step(number: int) -> None:
    for phase in ("data", "forward", "backward", "reduce"):
        phases.enter(phase, number)
    collectives.sum_over_ranks(torch.zeros(1))
    phases.enter("update")


def _thousand_steps(rank: int) -> None:
    """Rank 0 alone is slow to save, while the other waits for it in the next step."""
    for number in range(1000):
        _step(number)
        if number in (500, 700):
            phases.enter("save")
            time.sleep(2 * SHORT_S if rank == 0 else 0)


SHORT_S = 2.0


@pytest.mark.timeout(240)
@pytest.mark.rest
def test_a_slow_save_among_a_thousand_steps_is_no_hang(tmp_path: Path) -> None:
    config = WatchdogConfig(step_s=SHORT_S, other_s=6 * SHORT_S)
    with started_ranks(_watched, 2, tmp_path, tmp_path / "run", config, _thousand_steps) as ranks:
        assert [rank.end() for rank in ranks] == [0, 0], [rank.output for rank in ranks]
    assert not (tmp_path / "run").exists()


@pytest.mark.rest
@pytest.mark.timeout(900)
def test_a_slow_save_among_a_thousand_steps_of_training_is_no_hang(manifest: Path, tmp_path: Path) -> None:
    """In the middle one rank's save takes twice the time that a step may."""
    run_dir, images, step_s = tmp_path / "run", 1000 * BATCH, 10.0
    rules = f"sleep:at=save.sync,rank=1,seconds={2 * step_s}"
    with started_ranks(_train, 2, tmp_path, manifest, run_dir, rules, 1, 0, images, images // 2, step_s) as ranks:
        assert [rank.end(800) for rank in ranks] == [0, 0], [rank.output for rank in ranks]
    assert "steps=1000" in ranks[0].output
    assert not (run_dir / FOLDER).exists()


def _save_that_hangs(rank: int) -> None:
    for number in range(3):
        _step(number)
    phases.enter("save")
    time.sleep(600 if rank == 1 else 0)
    _step(3)


@pytest.mark.timeout(240)
def test_a_save_that_hangs_on_one_rank_is_named(tmp_path: Path) -> None:
    """The other rank is in the next step, whose time is not over."""
    config = WatchdogConfig(step_s=4 * SHORT_S, other_s=SHORT_S)
    with started_ranks(_watched, 2, tmp_path, tmp_path / "run", config, _save_that_hangs) as ranks:
        assert [rank.end() for rank in ranks] == [Restart.exit_code] * 2, [rank.output for rank in ranks]
    assert "culprit: rank 1 (" in _verdict(tmp_path / "run")
    assert "phase save of step 2\nbehind the others, which are in phase reduce of step 3" in _verdict(tmp_path / "run")


def _hold_the_lock(rank: int) -> None:
    _step(0)
    _step(1)
    if rank == int(os.environ["WORLD_SIZE"]) - 1:
        time.sleep(0.5)
        ctypes.PyDLL(None).sleep(600)  # unlike CDLL, it keeps Python's lock
    _step(2)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world_size", [rarely(1), 2])
def test_what_holds_pythons_lock_is_ended_or_named(world_size: int, tmp_path: Path) -> None:
    config = WatchdogConfig(step_s=1.0, other_s=30.0)
    with started_ranks(_watched, world_size, tmp_path, tmp_path / "run", config, _hold_the_lock) as ranks:
        status = ranks[0].end()
        if world_size == 1:
            assert status == 1
            assert "in _hold_the_lock" in ranks[0].output
            return
        assert status == Restart.exit_code
    assert "culprit: rank 1 (" in _verdict(tmp_path / "run")
    assert "does not come to report (it may hold Python's lock)" in _verdict(tmp_path / "run")


def _sleep_in_step(rank: int) -> None:
    _step(0)
    _step(1)
    phases.enter("data", 2)
    time.sleep(600)


@pytest.mark.timeout(240)
def test_without_a_folder_to_write_to_the_stacks_are_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    config = WatchdogConfig(step_s=1.0, other_s=30.0)
    with started_ranks(_watched, 2, tmp_path, tmp_path / "run", config, _sleep_in_step) as ranks:
        assert [rank.end() for rank in ranks] == [Restart.exit_code] * 2
        for number, rank in enumerate(ranks):
            assert f"rank {number}: no progress for 1 s in phase data of step 2" in rank.output
            assert "cannot be written" in rank.output
            assert "in _sleep_in_step" in rank.output


def _sleep_a_little(rank: int) -> None:
    _step(0)
    _step(1)
    phases.enter("data", 2)
    (Path(os.environ["LDM_TEST_FOLDER"]) / "begun").touch()
    time.sleep(1.0)


@pytest.mark.timeout(240)
def test_a_job_that_is_suspended_and_goes_on_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_TEST_FOLDER", str(tmp_path))
    config = WatchdogConfig(step_s=4.0, other_s=30.0)
    with started_ranks(_watched, 1, tmp_path, tmp_path / "run", config, _sleep_a_little) as ranks:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        psutil.Process(ranks[0].process.pid).suspend()
        time.sleep(6.5)
        psutil.Process(ranks[0].process.pid).resume()
        assert ranks[0].end() == 0, ranks[0].output
