"""Stopping on request: a signal asks for a checkpoint after the running step, a second Ctrl-C stops at once.

The handler only sets a flag. The trainer lets the flag ride on its per-step reduction, so that all ranks stop after
the same step even when only one of them was signalled. USR1 and USR2 are what Slurm sends before a time limit and a
preemption: the run is to be started again. TERM and INT only ask for its end; a scheduler that sends TERM and wants the
job back requeues it by itself.
"""

from __future__ import annotations

import signal
from enum import IntEnum
from types import FrameType

from ldm_scale.errors import LdmScaleError

RESTART_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *RESTART_SIGNALS)


class Stop(IntEnum):
    """What a run is asked for; of several requests the highest is met."""

    NONE = 0
    END = 1
    RESTART = 2


class StopAsked(LdmScaleError):
    """Long work between two steps that was broken off, on all ranks, because one of them was asked to stop."""


class StopRequest:
    """Catches the signals that launchers, schedulers and people use to end a run; a context manager."""

    def __init__(self) -> None:
        self.kind = Stop.NONE
        self.signal_name = ""
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop, for whatever reason."""
        return self.kind is not Stop.NONE

    def check(self) -> None:
        """Nothing.

        Raises: StopAsked if this process was asked to stop.
        """
        if self.requested:
            raise StopAsked(f"asked to stop by {self.signal_name}")

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.kind = max(self.kind, Stop.RESTART if number in RESTART_SIGNALS else Stop.END)
        self.signal_name = signal.Signals(number).name
