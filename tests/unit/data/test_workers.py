"""Work in several processes: results in order, few tasks in memory, a death is told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from ldm_scale.data.sources.workers import _AHEAD, map_in_processes, map_shards
from ldm_scale.errors import DataError


def _slow_when_even(number: int) -> int:
    time.sleep(0.002 * (number % 2 == 0))
    return number * number


def _dies(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 3])
def test_shards_keep_their_order_and_few_jobs_are_in_memory(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    handed_out = 0

    def jobs() -> Iterator[int]:
        nonlocal handed_out
        for number in range(60):
            handed_out += 1
            yield number

    results = []
    for result in map_shards(_slow_when_even, jobs(), 60, workers, "squares", lambda found: 1_000_000):
        results.append(result)
        assert handed_out - len(results) <= _AHEAD * workers
    assert results == [number * number for number in range(60)]
    shown = capsys.readouterr().err
    assert "squares" in shown
    assert "MB/s" in shown


@pytest.mark.parametrize("count", [0, 1, 16, 50])
def test_images_keep_their_order(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert [*map_in_processes(_slow_when_even, list(range(count)), "squares")] == [n * n for n in range(count)]
    assert (f"{count}/{count}" if count else "0images") in capsys.readouterr().err


def test_a_death_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"squares: a worker process died.*with fewer --workers"):
        [*map_shards(_dies, range(4), 4, 2, "squares", lambda found: 0)]
    with pytest.raises(DataError, match=r"squares: a worker process died, most likely for want of memory$"):
        [*map_in_processes(_dies, [1, 2], "squares")]
