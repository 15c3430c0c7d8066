"""Phases are accounted for by the host's clock, and those of a step by the device's where there is one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ldm_scale.engine.phase_times import PhaseTimes, shares
from ldm_scale.engine.phases import STEP


class _Clock:
    """A clock that is set by hand."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class _Event:
    """A stand-in for torch.cuda.Event on a device that is `lag_s` behind the host."""

    clock: _Clock
    lag_s: float
    at_s: float = -1.0

    def record(self) -> None:
        self.at_s = self.clock.now_s + self.lag_s

    def query(self) -> bool:
        return self.clock.now_s >= self.at_s

    def elapsed_time(self, end: _Event) -> float:
        return (end.at_s - self.at_s) * 1000


def _enter(times: PhaseTimes, clock: _Clock, phase: str, at_s: float) -> None:
    clock.now_s = at_s
    times.enter(phase)


def test_the_host_is_timed_without_a_device() -> None:
    clock = _Clock()
    times = PhaseTimes(STEP, clock, lambda: None)
    for phase, at_s in (("data", 0), ("forward", 1), ("backward", 3), ("save", 7), ("data", 15), ("forward", 31)):
        _enter(times, clock, phase, at_s)
    assert times.take() == {"data": 17, "forward": 2, "backward": 4, "save": 8}
    _enter(times, clock, "backward", 63)
    assert times.take() == {"forward": 32}


def test_a_device_is_asked_once_it_is_beyond_and_not_about_other_phases() -> None:
    clock = _Clock()
    lags = iter([0.0, 5.0, 9.0, 0.0, 0.0])  # of the boundaries in their order
    times = PhaseTimes(STEP, clock, lambda: _Event(clock, next(lags)))
    _enter(times, clock, "data", 0)
    _enter(times, clock, "forward", 1)  # which the device reaches at 6
    _enter(times, clock, "backward", 2)  # and this one at 11
    assert times.take() == {}, "the device has not reached any boundary but the first"
    _enter(times, clock, "save", 12)
    assert times.take() == pytest.approx({"data": 6.0, "forward": 5.0, "backward": 1.0})
    _enter(times, clock, "data", 20)
    assert times.take() == pytest.approx({"save": 8.0})


def test_shares_sum_to_one_and_leave_out_what_is_not_asked_for() -> None:
    assert shares({"start": 100.0, "data": 1.0, "forward": 3.0}, ("data", "forward", "save")) == {
        "data": 0.25,
        "forward": 0.75,
        "save": 0.0,
    }
    assert shares({"start": 100.0}, ("data", "forward")) == {}
