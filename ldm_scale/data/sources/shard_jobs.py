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
    workers = min(num_workers or len(os.sched_getaffinity(0)), max(num_jobs, 1))
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=_start)
    done, started = 0, time.monotonic()
    waiting: deque[Future[Result]] = deque()
    try:
        with tqdm(total=num_jobs, desc=label, unit="shards", mininterval=1.0, file=sys.stderr) as progress:

            def take() -> Result:
                nonlocal done
                result = waiting.popleft().result()
                done += num_bytes(result)
                progress.set_postfix_str(f"{done / 1e6 / (time.monotonic() - started):,.0f} MB/s", refresh=False)
                progress.update()
                return result

            for job in jobs:
                if len(waiting) == _AHEAD * workers:
                    yield take()
                waiting.append(executor.submit(work, job))
            while waiting:
                yield take()
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
