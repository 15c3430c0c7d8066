"""Loader processes: quiet, obedient to their parent alone, and with errors and deaths that reach it in words.

They are forked: they share the shard index and start in milliseconds. They use one thread (OpenMP does not survive a
fork) and leave signals to the training process, which alone decides when to stop; a shutdown that reached them first
would otherwise look like a crash. An error of the data is handed over as an object and raised again as it was, where
torch would turn its message into a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
import webdataset as wds

from ldm_scale.errors import DataError, LdmScaleError
from ldm_scale.telemetry import stacks


class ErrorsAsItems(torch.utils.data.IterableDataset[Any]):
    """A pipeline whose own errors come out as its last item."""

    def __init__(self, pipeline: wds.DataPipeline) -> None:
        self._pipeline = pipeline

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._pipeline
        except LdmScaleError as error:
            yield error


def start_worker(worker_id: int) -> None:
    """Nothing; makes a forked loader worker quiet: one thread, no reaction to signals that are not its parent's."""
    torch.set_num_threads(1)
    stacks.answer()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _quiet_about_hang_ups
    # Slurm and process groups send SIGTERM to workers too. Only the parent's may end one, and only sigwaitinfo tells
    # the sender, so a thread waits for it while it is blocked everywhere else.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, args=(os.getppid(),), name="loader-signals", daemon=True).start()


def _quiet_about_hang_ups(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Nothing; reports an exception of a helper thread unless it is the parent's going away.

    Tensors are handed over by a thread of the standard library, which would print a traceback when an interrupted
    parent closes the connection in the middle of that.
    """
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, traceback)


def _obey_parent(parent: int) -> None:
    """Nothing; ends the process when its parent asks for it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def deaths_by_polling() -> Iterator[None]:
    """Leaves a dead loader process to the thread that waits for its batches, which looks every few seconds.

    torch's signal handler, which the block installs, raises in the main thread wherever that happens to be.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread() and before is not None:
        signal.signal(signal.SIGCHLD, before)


@contextmanager
def deaths_named() -> Iterator[None]:
    """Where a block meets the death of a loader process, an error that says so.

    Raises: DataError
    """
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        # The last two: a batch was announced, and whom its memory is asked of is gone. Errors within a loader process
        # come as "Caught ... in DataLoader worker process".
        message = str(error)
        if message.startswith("Caught") or (isinstance(error, RuntimeError) and "DataLoader worker" not in message):
            raise
        raise DataError(
            f"a loader process died ({message.partition(';')[0] or type(error).__name__}), most likely for want of "
            "memory: lower data.num_workers, data.prefetch_batches or data.block_chunks, and run the same command again"
        ) from None
