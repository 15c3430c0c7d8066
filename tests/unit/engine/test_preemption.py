"""A signal asks for a stop, a second Ctrl-C insists, and afterwards signals mean what they meant before."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from ldm_scale.engine.preemption import RESTART_SIGNALS, STOP_SIGNALS, Stop, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Default handlers would end the test run if `StopRequest` did not catch a signal."""
    before = {number: signal.signal(number, _unexpected) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _unexpected(number: int, frame: object) -> None:
    raise AssertionError(f"signal {number} was not caught")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_for_a_stop(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signal_name == number.name
        assert stop.kind is (Stop.RESTART if number in RESTART_SIGNALS else Stop.END)


@pytest.mark.parametrize("numbers", [(signal.SIGUSR2, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR1)])
def test_a_warning_counts_beside_the_signal_to_end(numbers: tuple[signal.Signals, ...]) -> None:
    with StopRequest() as stop:  # a preemption is USR2, and TERM when its time is over
        for number in numbers:
            os.kill(os.getpid(), number)
        assert stop.kind is Stop.RESTART


def test_schedulers_may_repeat_themselves_but_a_second_ctrl_c_stops_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # what launchers send after they were interrupted
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back_even_after_an_error() -> None:
    with pytest.raises(ValueError, match="inside"), StopRequest():
        raise ValueError("inside")
    assert all(signal.getsignal(number) is _unexpected for number in STOP_SIGNALS)
