"""Work in several processes: few tasks in memory, a bar of images, a quick end, nobody left behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

from tqdm import tqdm

from ldm_scale.errors import DataError

TASKS_PER_WORKER = 2  # handed over at a time: one being done, one waiting
_LOOK_S = 0.5  # between two looks at the counts
_ORPHAN_S = 0.1  # between two looks at whether the parent lives

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


def _begin(shared: _Shared, numbers: Any, parent: int) -> None:
    """Nothing; this process is a worker."""
    global _shared, _worker
    _shared, _worker = shared, numbers.get()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process once its parent has died: it would wait for tasks for ever, with the parent's locks held."""
    while os.getppid() == parent:
        time.sleep(_ORPHAN_S)
    os._exit(1)


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
    executor = ProcessPoolExecutor(num_workers, _FORK, _begin, (shared, numbers, os.getpid()))
    waiting, pending = iter(tasks), set[Future[Result]]()
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
    except BrokenProcessPool:
        raise DataError(
            "a worker process died, most likely for want of memory; what is finished stays: run the same command "
            "again, with fewer --workers"
        ) from None
    finally:
        shared.stop.value = 1
        executor.shutdown(cancel_futures=True)


def map_in_processes(work: Callable[[Task], Result], items: list[Task], label: str) -> Iterator[Result]:
    """The results in order, made by one process per processor under a progress bar of images.

    Raises: DataError if a process dies.
    """
    executor = ProcessPoolExecutor(
        default_workers(),
        _FORK,
        signal.signal,
        (signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is the parent's to handle
    )
    try:
        results = executor.map(work, items, chunksize=16)
        yield from tqdm(results, total=len(items), desc=label, unit="images", mininterval=1.0, file=sys.stderr)
    except BrokenProcessPool:
        raise DataError(f"{label}: a worker process died, most likely for want of memory") from None
    finally:
        executor.shutdown(cancel_futures=True)
