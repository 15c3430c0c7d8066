"""What this process is at: the phase, the step, and how long each rank took for what it does alone.

The training loop says which phase begins (`enter`); the watchdog and the search for slow ranks look on. All ranks pass
the same phases in the same order, so that a rank which has begun fewer of them is behind. A call costs less than a
microsecond on a CPU.

    data, forward, backward, reduce, update    one step; its clock runs from the beginning of data
    any other name (start, save, evaluate)     a clock of its own

With several micro-batches a step, backward stands for everything from the first backward pass to the reduction.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from ldm_scale.engine.phase_times import PhaseTimes

FIRST, FORWARD, BACKWARD, REDUCE, UPDATE = "data", "forward", "backward", "reduce", "update"
STEP = (FIRST, FORWARD, BACKWARD, REDUCE, UPDATE)
_AFTER_FIRST = frozenset(STEP[1:])


class Phases:
    """The phases of one process."""

    def __init__(self) -> None:
        self.phase, self.step = "start", 0
        self.position = 0  # phases begun
        self.since_s = time.monotonic()  # beginning of the step, or of what is no step
        self.follows_other = False  # whether the step comes after something else, which other ranks may still be at
        self.alone_s: dict[str, float] = {}  # of the step that has just ended
        self._begun_s = self.since_s  # of the phase
        self._meets = True  # whether the ranks have met in this step
        self._events: list[Any] = []
        self.times = PhaseTimes(STEP)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Nothing; the phase begins. Within a step a phase that follows itself does not count."""
        now = time.monotonic()
        in_step = self.phase in STEP
        if phase in _AFTER_FIRST:
            if not in_step or phase == self.phase:
                return
            self._time_alone(phase, now)
        else:
            self.follows_other = phase == FIRST and not in_step
            self.since_s = now
            self._meets = phase != FIRST
        if step is not None:
            self.step = step
        self.phase, self._begun_s = phase, now
        self.position += 1
        self.times.enter(phase)

    def meet(self) -> None:
        """Nothing; the ranks are about to exchange something: from here on they wait for one another."""
        if not self._meets:
            self._meets = True
            if self._events:
                self._events[1].record()
            else:
                self.alone_s[FORWARD] = time.monotonic() - self._begun_s

    def _time_alone(self, phase: str, now: float) -> None:
        if phase == FORWARD:
            self.alone_s = {FIRST: now - self._begun_s}
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                make = partial(torch.cuda.Event, enable_timing=True)
                self._events = self._events or [make(), make()]
                self._events[0].record()
        elif phase == BACKWARD:
            self.meet()
        elif phase == UPDATE and self._events and self._events[1].query():
            # The metrics were read after the reduction, so the device is beyond both events: nothing waits here.
            self.alone_s[FORWARD] = self._events[0].elapsed_time(self._events[1]) / 1000


current = Phases()


def enter(phase: str, step: int | None = None) -> None:
    """See `Phases.enter`, of this process."""
    current.enter(phase, step)


def meet() -> None:
    """See `Phases.meet`, of this process."""
    current.meet()
