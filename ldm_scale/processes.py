"""No process outlives the one that started it: the kernel sends a child a signal when its parent is gone, however.

A launcher or a rank that is killed cannot end its children itself. Without this a rank whose torchrun was killed goes
on by itself and holds run directory, port and memory, and loader processes stay until they next look.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

_PR_SET_PDEATHSIG = 1
_ENDINGS = (signal.SIGTERM, signal.SIGHUP)
# Of torchrun and of the deepspeed launcher, in their ranks. Slurm ends its tasks by itself; the parent of a rank that
# somebody else has started (a shell, say) may end before it.
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Nothing; this process gets the signal when the thread of `parent` that has started it ends.

    At once if that has happened already.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_with_launcher() -> None:
    """Nothing; a rank gets SIGTERM when the launcher that has started it is gone: it saves, and ends."""
    if not any(name in os.environ for name in _LAUNCHERS):
        return
    launcher = os.getppid()
    end_with_parent(launcher, signal.SIGTERM)
    if front := _deepspeed_above(launcher):
        threading.Thread(target=_end_with, args=(front,), name="front", daemon=True).start()


@contextmanager
def ending_well() -> Iterator[None]:
    """A block that a request to end (SIGTERM, SIGHUP) leaves by an exception, so that it can tidy up as after Ctrl-C.

    The process dies of the signal afterwards, as it would have at once. Nothing changes where somebody else handles the
    signal already (a training run, a block around this one, nohup), or in threads, which get none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [number for number in _ENDINGS if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for other in caught:
            signal.signal(other, signal.SIG_IGN)  # a second one does not disturb the tidying
        raise _Ended(number)

    for number in caught:
        signal.signal(number, end)
    try:
        yield
    except _Ended as ended:
        if not caught:
            raise
        signal.signal(ended.number, signal.SIG_DFL)
        os.kill(os.getpid(), ended.number)
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


class _Ended(BaseException):
    """A request to end; no error, which somebody would handle."""

    def __init__(self, number: int) -> None:
        self.number = number


def _deepspeed_above(launcher: int) -> psutil.Process | None:
    """The `deepspeed` command that has started the launch process and waits for it; None if something else has."""
    try:
        front = psutil.Process(launcher).parent()
        # Its interpreter comes first. A shell that has deepspeed in its command may well end before the run.
        is_deepspeed = front is not None and any(Path(text).name == "deepspeed" for text in front.cmdline()[:3])
    except psutil.Error:
        return None
    return front if is_deepspeed else None


def _end_with(process: psutil.Process) -> None:
    # Not psutil's wait, for which a process that nobody has waited for yet still lives.
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(process.pid)], [], [])
    os.kill(os.getpid(), signal.SIGTERM)
