"""Where the time goes: seconds of each phase since they were last asked for.

On a CPU by the host's clock. A GPU is still at work when the host has gone on, so there the phases of a step are timed
by the device: an event at each boundary, read once the device is beyond it. What the device waits for the host (data,
above all) then shows in the phase that it waits in.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch


class _Boundary(NamedTuple):
    phase: str  # that begins
    at_s: float  # of the host
    event: Any | None  # of the device


def _device_event() -> Any | None:
    """A new timed event; None without a CUDA device in use."""
    return torch.cuda.Event(enable_timing=True) if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


class PhaseTimes:
    """The account of one process; `on_device` names the phases that a device's clock is asked about."""

    def __init__(
        self,
        on_device: Collection[str],
        clock: Callable[[], float] = time.monotonic,
        make_event: Callable[[], Any | None] = _device_event,
    ) -> None:
        self._on_device, self._clock, self._make_event = frozenset(on_device), clock, make_event
        self._boundaries: deque[_Boundary] = deque()
        self._totals: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """Nothing; the phase begins, and the one before it ends."""
        event = self._make_event()
        if event is not None:
            event.record()
        self._boundaries.append(_Boundary(phase, self._clock(), event))
        while len(self._boundaries) > 1 and self._is_known(self._boundaries[1]):
            self._count(self._boundaries.popleft(), self._boundaries[0])

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; of the phase that runs, and of those the device is still at, none."""
        totals, self._totals = self._totals, {}
        return totals

    def _is_known(self, boundary: _Boundary) -> bool:
        return boundary.event is None or bool(boundary.event.query())

    def _count(self, begin: _Boundary, end: _Boundary) -> None:
        seconds = end.at_s - begin.at_s
        if begin.phase in self._on_device and begin.event is not None and end.event is not None:
            seconds = begin.event.elapsed_time(end.event) / 1000
        self._totals[begin.phase] = self._totals.get(begin.phase, 0.0) + seconds


def shares(seconds: dict[str, float], phases: Collection[str]) -> dict[str, float]:
    """Shares of the time that the named phases took together, by their names; {} where they took none."""
    known = {name: seconds.get(name, 0.0) for name in phases}
    total = sum(known.values())
    return {name: value / total for name, value in known.items()} if total > 0 else {}
