"""kill -9 of a launcher, a rank, a loader process or of all of them, at any moment of a run, leaves nothing behind: no
process, shared memory, lock or port; and the next start goes on, as fast as one that nothing went before.

Most of it is `make test-rest`'s.
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import stage1
from tests.helpers.deaths import (
    KINDS,
    RANKS,
    Start,
    can_listen,
    ended,
    is_locked,
    port_for_rank_0,
    shared_memory_of,
    wait_to_end,
)
from tests.helpers.resumptions import left_by
from tests.helpers.shards import make_dataset

NUM_KILLS, STEPS, BATCH = 50, 300, 8
BY_TORCHRUN = {8, 17, 26, 35}  # kills of starts by the command line, one of each kind
_LATER = 8  # steps after the first that a start may make before it is killed


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files whose name is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ldm-deaths-"))
    yield folder
    shutil.rmtree(folder)


def _arguments(folder: Path, run_dir: Path) -> list[str]:
    if not (folder / "data").exists():
        make_dataset(folder / "data", num_samples=16, samples_per_shard=16, resolution=20)
    return stage1(
        folder,
        run_dir,
        f"train.total_images={STEPS * BATCH}",
        "train.log_every_images=8",
        "data.num_workers=2",
        "zero.stage=1",
    )


def _killed(start: Start, kind: str, moment: float, choice: random.Random) -> float:
    """Seconds that it took to be gone; below 0 the moment is one of start-up, in seconds, else of so many steps."""
    is_training = moment >= 0
    if is_training:
        start.wait_for_steps(1 + int(moment))
        time.sleep(moment % 1 / 10)
    else:
        time.sleep(-moment)
    assert start.kill(kind, choice), f"the run ended before a {kind} could be killed:\n{start.output}"
    seconds = start.wait_until_gone()
    if is_training and kind == "launcher":
        assert "stopped by SIGTERM" in start.output
    if is_training and kind == "loader":
        assert "a loader process died" in start.output
    return seconds


def _check_nothing_is_left(start: Start, temporary: Path, run_dir: Path, port: int) -> None:
    assert not is_locked(run_dir), start.output
    assert can_listen(port), start.output
    assert not shared_memory_of(start.pids())
    # What a killed rank cannot remove itself the next start does; torchrun's logs are its own.
    left = [path.name for path in temporary.iterdir() if not path.name.startswith("torchelastic_")]
    assert len(left) <= RANKS, left
    assert all(name.startswith("ldm-loader-") for name in left), left


@pytest.mark.timeout(180)
def test_a_kill_leaves_nothing(tmp_path: Path, temporary: Path) -> None:
    choice = random.Random(1)
    arguments, port = _arguments(tmp_path, tmp_path / "run"), port_for_rank_0(random.Random())
    for kind in ("launcher", "loader", "group"):
        with ended(Start(arguments, temporary, port)) as start:
            _killed(start, kind, 1.0, choice)
            _check_nothing_is_left(start, temporary, tmp_path / "run", port)


@pytest.mark.rest
@pytest.mark.timeout(2400)
def test_fifty_kills_leave_nothing_and_change_nothing(tmp_path: Path, temporary: Path) -> None:
    run_dir, port, choice = tmp_path / "run", port_for_rank_0(random.Random()), random.Random(7)
    arguments = _arguments(tmp_path, run_dir)
    with ended(Start(arguments, temporary, port)) as start:
        first_s = start.wait_for_steps(1)
        assert wait_to_end(start) == 0, start.output
    undisturbed = left_by(run_dir, STEPS * BATCH)
    run_dir.rename(tmp_path / "undisturbed")
    gone_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(NUM_KILLS):
        kind, by_torchrun = KINDS[number % len(KINDS)], number in BY_TORCHRUN
        starting_s = choice.uniform(0, first_s + 10 * by_torchrun)
        moment = choice.uniform(0, _LATER) if number // len(KINDS) % 2 else -starting_s
        with ended(Start(arguments, temporary, port, by_torchrun)) as start:
            gone_s[kind].append(_killed(start, kind, moment, choice))
            _check_nothing_is_left(start, temporary, run_dir, port)
    fresh_s, next_s = _start_times(tmp_path, temporary, run_dir, port)
    with ended(Start(arguments, temporary, port)) as start:
        assert wait_to_end(start) == 0, start.output
        assert "continuing at" in start.output
    assert left_by(run_dir, STEPS * BATCH) == undisturbed
    assert not [path for path in temporary.iterdir() if path.name.startswith("ldm-")]
    slowest = {kind: round(max(seconds), 1) for kind, seconds in gone_s.items()}
    print(f"gone after {slowest} s at most; first step after {next_s:.2f} s, in a new folder {fresh_s:.2f} s")  # noqa: T201
    assert next_s < 1.2 * fresh_s


def _start_times(folder: Path, temporary: Path, run_dir: Path, port: int) -> tuple[float, float]:
    """Median seconds to the first step of new runs, and of the run that was killed so often, in turns."""
    choice, seconds = random.Random(3), {True: [], False: []}  # type: ignore[var-annotated]
    for number in range(5):
        for is_fresh in (True, False):
            where = folder / f"new-{number}" if is_fresh else run_dir
            with ended(Start(_arguments(folder, where), temporary, port)) as start:
                seconds[is_fresh].append(start.wait_for_steps(1))
                assert start.kill("group", choice)
                start.wait_until_gone()
    return statistics.median(seconds[True]), statistics.median(seconds[False])
