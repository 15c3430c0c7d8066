"""Work on many shards in several processes: results in order, few jobs in memory, nothing left behind by a kill."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from ldm_scale.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 4  # jobs per process that wait or are done


def map_shards(
    work: Callable[[Item], Result],
    jobs: Iterable[Item],
    num_jobs: int,
    num_workers: int | None,
    label: str,
    num_bytes: Callable[[Result], int],
) -> Iterator[Result]:
    """The results in the jobs' order, under a progress bar of shards; `num_bytes` of a result make the rate shown.

    Raises: what `work` raises; DataError if a process dies.
    """
    workers = min(num_workers or len(os.sched_getaffinity(0)), num_jobs)
    results = map(work, jobs) if workers <= 1 else _in_processes(work, jobs, workers, label)
    done, started = 0, time.monotonic()
    with tqdm(total=num_jobs, desc=label, unit="shards", mininterval=1.0, file=sys.stderr) as progress:
        for result in results:
            done += num_bytes(result)
            rate = done / (time.monotonic() - started)
            progress.set_postfix_str(f"{rate / 1e6:,.0f} MB/s" if done else "", refresh=False)
            progress.update()
            yield result


def _in_processes(work: Callable[[Item], Result], jobs: Iterable[Item], workers: int, label: str) -> Iterator[Result]:
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=_start)
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            if len(waiting) == _AHEAD * workers:
                yield waiting.popleft().result()
            waiting.append(executor.submit(work, job))
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"{label}: a worker process died, most likely for want of memory; run the command again with fewer "
            "--workers, and it goes on where it was"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _start() -> None:
    """Nothing; Ctrl-C is the parent's to handle, and this process ends with it, killed or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
