"""Hangs of every kind end by themselves, with culprit and phase named; slow work within its time is left alone."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ldm_scale import faults
from ldm_scale.engine.env import read_launch
from ldm_scale.engine.hangs import FOLDER, VERDICT
from ldm_scale.errors import LdmScaleError, Restart
from ldm_scale.operations.train import train
from tests.helpers.ranks import Rank, started_ranks
from tests.helpers.runs import tiny_config
from tests.helpers.shards import make_dataset

STEP_S, OTHER_S = 3.0, 60.0
ALLOWED_S = STEP_S + 10.0  # what a hang may take to its end
NEVER = 1_000_000  # images


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), num_samples=16, samples_per_shard=16, resolution=20)


def _train(manifest: Path, run_dir: Path, rules: str, stage: int, workers: int) -> int:
    """The command's exit status."""
    os.environ[faults.VARIABLE] = rules
    config = tiny_config(
        "autoencoder",
        manifest,
        run_dir,
        train={"total_images": NEVER, "check_ranks_every_images": 0},
        data={"num_workers": workers, "prefetch_batches": 1},
        zero={"stage": stage},
        watchdog={"step_s": STEP_S, "other_s": OTHER_S},
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
    os.kill(rank.process.pid or 0, signal.SIGSTOP)


def _stop_loader(rank: Rank) -> None:
    (loader,) = psutil.Process(rank.process.pid).children()
    loader.send_signal(signal.SIGSTOP)


CASES: dict[str, tuple[str, Callable[[Rank], None] | None, int, tuple[str, ...]]] = {
    # rules of faults, what happens to rank 1, ZeRO stage, what the verdict says
    "stopped": ("", _stop_rank, 1, ("phase", "the process of rank 1 is stopped")),
    "loader": ("", _stop_loader, 1, ("phase data", "loader process", "is stopped")),
    "batch": ("sleep:at=data.batch,rank=1,nth=9,seconds=600", None, 1, ("phase data", "behind the others")),
    "forward": ("sleep:at=step.forward,rank=1,nth=9,seconds=600", None, 3, ("phase forward", "in reach")),
    "collective": (
        "sleep:at=step.reduce,rank=1,nth=9,seconds=600",
        None,
        0,
        ("phase reduce", "not begun the collective"),
    ),
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", CASES)
def test_a_hang_ends_and_is_named(case: str, manifest: Path, tmp_path: Path) -> None:
    rules, happens, stage, expected = CASES[case]
    run_dir = tmp_path / "run"
    with started_ranks(_train, 2, tmp_path, manifest, run_dir, rules, stage, int(case == "loader")) as ranks:
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
