"""Rates and time left on a clock that the test moves."""

import contextlib
import sys

import pytest

from ldm_scale.telemetry.throughput import Throughput, TrainProgress


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_rate_over_the_window_only() -> None:
    clock = Clock()
    throughput = Throughput(window_s=10, clock=clock)
    assert throughput.images_per_s is None
    assert throughput.time_left_s(100) is None
    for step_s in [4.0] * 5 + [1.0] * 10:
        clock.now_s += step_s
        throughput.update(8)
    assert throughput.images_per_s == pytest.approx(8.0, abs=1e-12)
    assert throughput.time_left_s(400) == pytest.approx(50.0, abs=1e-12)
    assert throughput.active_s == pytest.approx(30.0, abs=1e-12)


def test_pauses_do_not_count_even_when_they_end_in_an_error() -> None:
    clock = Clock()
    throughput = Throughput(clock=clock)
    clock.now_s += 2.0
    throughput.update(8)
    with contextlib.suppress(OSError), throughput.paused():
        clock.now_s += 100.0
        raise OSError("disk full")
    clock.now_s += 2.0
    throughput.update(8)
    assert throughput.images_per_s == pytest.approx(4.0, abs=1e-12)
    assert throughput.active_s == pytest.approx(4.0, abs=1e-12)


def test_steps_longer_than_the_window_are_still_measured() -> None:
    clock = Clock()
    throughput = Throughput(window_s=1, clock=clock)
    for _ in range(3):
        clock.now_s += 60.0
        throughput.update(6)
    assert throughput.images_per_s == pytest.approx(0.1, abs=1e-12)


def test_plain_lines_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = TrainProgress(1000, initial=200, throughput=Throughput(clock=clock))
    for i in range(25):
        clock.now_s += 1.0
        progress.update(16, {"loss": 1.0 / (i + 1)})
    with progress.paused():
        clock.now_s += 500.0
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    assert err.splitlines() == [
        "train  36% 360/1000 img, 16.0 img/s, 00:40 left, loss 0.1",
        "train  52% 520/1000 img, 16.0 img/s, 00:30 left, loss 0.05",
        "train  60% 600/1000 img, 16.0 img/s, 00:25 left, loss 0.04",
    ]


def test_losses_stay_on_display_between_their_updates(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = TrainProgress(64, throughput=Throughput(clock=clock))
    clock.now_s += 1.0
    progress.update(16, {"loss": 0.5})
    clock.now_s += 1.0
    progress.update(16)
    progress.close()
    assert capsys.readouterr().err == "train  50% 32/64 img, 16.0 img/s, 00:02 left, loss 0.5\n"


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    clock = Clock()
    with TrainProgress(64, throughput=Throughput(clock=clock)) as progress:
        clock.now_s += 0.5
        progress.update(16, {"loss": 0.5})
    err = capsys.readouterr().err
    assert "\r" in err
    assert "16/64 img, 32.0 img/s, 00:01 left, loss 0.5" in err


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainProgress(64, enabled=False) as progress:
        progress.update(16, {"loss": 0.5})
    assert capsys.readouterr() == ("", "")
    assert progress.throughput.images_per_s is not None
