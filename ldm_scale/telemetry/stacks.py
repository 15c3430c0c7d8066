"""Where a process stands: the stacks of its threads, and those of another process that was made ready to tell them.

A process that answers keeps a file in memory, into which the interpreter writes on a signal, also where it is stuck in
a system call or in foreign code. Whoever asks reads that file through /proc; nothing is left on a disk.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from pathlib import Path

SIGNAL = signal.SIGRTMIN  # schedulers, launchers and terminals do not send it
_NAME = "ldm-scale-stacks"
_ANSWER_S = 0.5
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk or a network file system",
    "T": "stopped",
    "t": "stopped by a debugger",
    "Z": "dead",
    "X": "dead",
}


def answer() -> None:
    """Nothing; from now on this process writes its stacks when `stacks_of` asks it."""
    faulthandler.register(SIGNAL, file=os.memfd_create(_NAME), all_threads=True, chain=False)


def stacks_of(pid: int) -> str:
    """The stacks of a process of this host that has called `answer`; "" where it does not answer."""
    file = _answers(pid)
    if file is None or state_of(pid) in ("stopped", "dead", "gone"):
        return ""
    before = file.stat().st_size
    os.kill(pid, SIGNAL)
    given_up = time.monotonic() + _ANSWER_S
    while file.stat().st_size == before and time.monotonic() < given_up:
        time.sleep(0.02)
    time.sleep(0.02)  # the rest of it
    return file.read_bytes()[before:].decode(errors="replace")


def state_of(pid: int) -> str:
    """In a word or two what a process of this host does; "gone" where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return "gone"
    letter = text.rpartition(")")[2].split()[0]
    return _STATES.get(letter, f"in state {letter}")


def _answers(pid: int) -> Path | None:
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            if _NAME in os.readlink(path):
                return path
    except OSError:
        return None
    return None
