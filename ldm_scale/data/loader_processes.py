"""Loader processes: quiet, obedient to their parent alone, gone with it, and with errors and deaths in words.

They are forked: they share the shard index and start in milliseconds. They use one thread (OpenMP does not survive a
fork) and leave signals to the training process, which alone decides when to stop; a shutdown that reached them first
would otherwise look like a crash. An error of the data is handed over as an object and raised again as it was, where
torch would turn its message into a traceback.

Tensors are handed over through sockets that have names in a folder. A process that is killed leaves them behind; so the
folder is locked by all that use it, and what nobody holds any more is removed by the next run on the host.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import webdataset as wds

from ldm_scale.errors import DataError, LdmScaleError
from ldm_scale.processes import end_with_parent
from ldm_scale.telemetry import stacks

_SOCKETS = "ldm-loader-"
# What the names of sockets add to that of the folder for temporary files, and the longest that systems allow.
_ADDED, _LONGEST = len(f"/{_SOCKETS}12345678/pymp-12345678/listener-12345678"), 107


class ErrorsAsItems(torch.utils.data.IterableDataset[Any]):
    """A pipeline whose own errors come out as its last item."""

    def __init__(self, pipeline: wds.DataPipeline) -> None:
        self._pipeline = pipeline

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._pipeline
        except LdmScaleError as error:
            yield error


@contextmanager
def worker_starts(num_workers: int) -> Iterator[Callable[[int], None]]:
    """What each loader worker that the block forks calls first, with its number."""
    with _sockets_folder() if num_workers else nullcontext("") as sockets:
        yield partial(_start_worker, os.getpid(), sockets)


def _start_worker(parent: int, sockets: str, worker_id: int) -> None:
    """Nothing; makes a forked loader worker quiet: one thread, no reaction to signals that are not its parent's."""
    end_with_parent(parent)
    tempfile.tempdir = sockets
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
def _sockets_folder() -> Iterator[str]:
    """A folder for the sockets of processes that the block forks; those that killed runs have left are gone."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) + _ADDED > _LONGEST:
        base = "/tmp"
    for left in Path(base).glob(f"{_SOCKETS}*"):
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
            finally:
                os.close(descriptor)
    folder, descriptor = _locked_folder(base)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _locked_folder(base: str) -> tuple[str, int]:
    """A new folder, and the descriptor that keeps it locked, here and in all forks, as long as one of them has it."""
    while True:
        folder = tempfile.mkdtemp(prefix=_SOCKETS, dir=base)
        with suppress(FileNotFoundError):  # another run has taken it for one that was left behind
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # a file system without locks: nobody else gets one either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.exists(folder):
                return folder, descriptor
            os.close(descriptor)


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
