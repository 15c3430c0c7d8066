"""No process outlives the one that started it: the kernel sends a child a signal when its parent is gone, however.

A launcher or a rank that is killed cannot end its children itself. Without this a rank whose torchrun was killed goes
on by itself and holds run directory, port and memory, and loader processes stay until they next look.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
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
    if any(name in os.environ for name in _LAUNCHERS):
        end_with_parent(os.getppid(), signal.SIGTERM)
