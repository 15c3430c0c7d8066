"""Work in several processes: few tasks in memory, a bar of images or shards, a quick end, nobody left behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

from tqdm import tqdm

from ldm_scale.errors import DataError
from ldm_scale.processes import end_with_parent

TASKS_PER_WORKER = 2  # handed over at a time: one being done, one waiting
_AHEAD = 4  # tasks per worker that are done, being done or waiting, where results keep their order
_CHUNK = 16  # items of a task that is too short to be one
_DEATH = "a worker process died, most likely for want of memory"
_GO_ON = "; what is finished stays: run the same command again, with fewer --workers"
_LOOK_S = 0.5  # between two looks at the counts

Task = TypeVar("Task")
Result = TypeVar("Result")

_FORK = get_context("fork")


class Stopped(Exception):
    """The parent wants no more of this task."""


@dataclass
class _Shared:
    """Memory that parent and workers share, without locks, which a killed process would leave locked."""

    num_workers: int
    stop: Any = field(default_factory=lambda: _FORK.RawValue("b", 0))
    counts: Any = field(init=False)  # images done, by worker

    def __post_init__(self) -> None:
        self.counts = _FORK.RawArray("Q", self.num_workers)


_shared: _Shared | None = None  # of a worker
_worker = 0


def default_workers() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def count_image() -> None:
    """Nothing; an image more is done.

    Raises: Stopped if the parent has stopped.
    """
    assert _shared is not None, "in a worker"
    _shared.counts[_worker] += 1
    if _shared.stop.value:
        raise Stopped


@contextmanager
def _pool(num_workers: int, death: str, begin: Callable[..., None] | None = None, *arguments: Any) -> Iterator[Any]:
    """Processes that call `begin(*arguments)` first; they end with the block, or with this process.

    Raises: DataError if one dies; `death` is its message.
    """
    executor = ProcessPoolExecutor(num_workers, _FORK, _begin, (os.getpid(), begin, arguments))
    try:
        yield executor
    except BrokenProcessPool:
        raise DataError(death) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(parent: int, begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """Nothing; this process is a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    end_with_parent(parent)  # it would wait for tasks for ever, with the parent's locks held
    if begin is not None:
        begin(*arguments)


def _share_counts(shared: _Shared, numbers: Any) -> None:
    """Nothing; this worker counts its images under a number of its own."""
    global _shared, _worker
    _shared, _worker = shared, numbers.get()


def map_tasks(
    work: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int, *, total: int, done: Callable[[], int]
) -> Generator[Result, None, None]:
    """The results of tasks as they are finished, in any order, under a bar of `total` images.

    `tasks` is read as workers become free. `work` calls `count_image` after each image; `done` is asked for the number
    of images that need no work.

    Raises: DataError if a process dies; whatever `work` raises.
    """
    shared = _Shared(num_workers)
    numbers = _FORK.SimpleQueue()
    for number in range(num_workers):
        numbers.put(number)
    waiting, pending = iter(tasks), set[Future[Result]]()
    with _pool(num_workers, _DEATH + _GO_ON, _share_counts, shared, numbers) as executor:
        try:
            with tqdm(total=total, unit="images", mininterval=1.0, file=sys.stderr) as bar:
                while True:
                    for task in islice(waiting, TASKS_PER_WORKER * num_workers - len(pending)):
                        pending.add(executor.submit(work, task))
                    finished, pending = wait(pending, _LOOK_S, FIRST_COMPLETED)
                    bar.initial = done()  # no part of the rate
                    bar.update(bar.initial + sum(shared.counts) - bar.n)
                    for future in finished:
                        yield future.result()
                    if not finished and not pending:
                        return
        finally:
            shared.stop.value = 1


def map_shards(
    work: Callable[[Task], Result],
    jobs: Iterable[Task],
    num_jobs: int,
    num_workers: int | None,
    label: str,
    num_bytes: Callable[[Result], int],
) -> Iterator[Result]:
    """The results in the jobs' order, under a bar of shards; `num_bytes` of a result make the rate shown.

    Raises: what `work` raises; DataError if a process dies.
    """
    workers = min(num_workers or default_workers(), num_jobs)
    results = map(work, jobs) if workers <= 1 else _in_order(work, jobs, workers, f"{label}: {_DEATH}{_GO_ON}")
    done, started = 0, time.monotonic()
    with tqdm(total=num_jobs, desc=label, unit="shards", mininterval=1.0, file=sys.stderr) as progress:
        for result in results:
            done += num_bytes(result)
            rate = done / (time.monotonic() - started)
            progress.set_postfix_str(f"{rate / 1e6:,.0f} MB/s" if done else "", refresh=False)
            progress.update()
            yield result


def map_in_processes(work: Callable[[Task], Result], items: list[Task], label: str) -> Iterator[Result]:
    """The results in order, made by one process per processor under a bar of images.

    Raises: DataError if a process dies.
    """
    chunks = (items[first : first + _CHUNK] for first in range(0, len(items), _CHUNK))
    with tqdm(total=len(items), desc=label, unit="images", mininterval=1.0, file=sys.stderr) as progress:
        for results in _in_order(partial(_do_all, work), chunks, default_workers(), f"{label}: {_DEATH}"):
            progress.update(len(results))
            yield from results


def _do_all(work: Callable[[Task], Result], items: list[Task]) -> list[Result]:
    return [work(item) for item in items]


def _in_order(work: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int, death: str) -> Iterator[Result]:
    """The results in the tasks' order, a few tasks ahead."""
    waiting: deque[Future[Result]] = deque()
    with _pool(num_workers, death) as executor:
        for task in tasks:
            if len(waiting) == _AHEAD * num_workers:
                yield waiting.popleft().result()
            waiting.append(executor.submit(work, task))
        while waiting:
            yield waiting.popleft().result()
