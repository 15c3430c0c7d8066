"""The harness takes turns in both orders, drops its warm-up, and gives no speed-up to another result."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import measured
from benchmarks.harness import Turns, Way, are_same, median_range, speed_up, take_turns
from benchmarks.measured import command_line, parse, set_threads, threads, write_cases
from ldm_scale.errors import ConfigError


def _turns(ways: dict[str, Way], rounds: int, warmup: int = 0, clock: Any = lambda: 0.0) -> Turns:
    return take_turns(ways, rounds, warmup=warmup, clock=clock, name="tiny", shows=False)


def test_every_round_has_all_ways_in_the_reversed_order_of_the_last() -> None:
    said: list[str] = []
    _turns({way: Way(lambda way=way: said.append(way)) for way in "abc"}, 3, warmup=1)  # type: ignore[misc]
    assert "".join(said) == "abccbaabccba"


def test_only_what_runs_is_timed_and_the_warm_up_is_left_out() -> None:
    ticks = itertools.count(1)
    now = [0.0]

    @contextmanager
    def around() -> Iterator[None]:
        now[0] += 100
        yield
        now[0] += 100

    def run() -> None:
        now[0] += next(ticks)

    turns = _turns({"a": Way(run, around), "b": Way(lambda: 0.25, times_itself=True)}, 3, 2, lambda: now[0])
    assert turns.seconds == {"a": [3.0, 4.0, 5.0], "b": [0.25] * 3}
    assert turns.ratios("a", "b") == [12.0, 16.0, 20.0]
    assert turns.spreads()["a"]["median"] == 4.0


def test_the_range_holds_the_median_19_times_in_20() -> None:
    random = np.random.default_rng(0)
    ranges = [median_range(random.exponential(size=60).tolist()) for _ in range(2_000)]
    held = np.mean([low <= np.log(2.0) <= high for low, high in ranges])
    assert 0.945 < held < 0.98


@pytest.mark.parametrize("difference", [2e-3, float("inf"), float("nan")])
def test_another_result_has_no_speed_up(difference: float, capsys: pytest.CaptureFixture[str]) -> None:
    turns = Turns({"plain": [2.0] * 10, "fast": [1.0] * 10})
    found = speed_up(turns, "fast", "plain", difference, 1e-3)
    assert "speed_up" not in found
    assert "something else" in found["refused"]
    assert not are_same("tiny", {"outputs": 0.0, "gradients": difference}, 1e-3)
    assert f"tiny: outputs differ by 0.0e+00 and gradients differ by {difference:.1e}" in capsys.readouterr().err


def test_the_same_result_has_one(capsys: pytest.CaptureFixture[str]) -> None:
    turns = Turns({"plain": [2.0, 3.0, 2.0], "fast": [1.0, 1.0, 2.0]})
    found = speed_up(turns, "fast", "plain", 1e-3, 1e-3)
    assert found["speed_up"]["median"] == 2.0
    assert found["speed_up_median_range"] == [1.0, 3.0]
    assert are_same("tiny", {"outputs": 1e-3}, 1e-3)
    assert not capsys.readouterr().err


def test_one_round_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line("tiny", ["a"], "rounds", 20).parse_args(["--rounds", "1"])
    assert "argument --rounds: 1: one timing has no spread; give a whole number from 2 up" in capsys.readouterr().err


def test_an_out_that_takes_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    parser = command_line("A benchmark.", ("demo",), "rounds", 20)
    # The last is a folder that takes no file, from root neither.
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc")):
        with pytest.raises(ConfigError, match=f"--out {out}: is no folder to write to"):
            parse(parser, ["--out", str(out)])


def test_a_benchmark_computes_with_the_threads_that_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "cpu_threads", lambda processes: 12 // processes)
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads(1), threads(4)] == [12, 3]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [threads(1), threads(4)] == [2, 2]
    set_threads(torch.device("cuda"))
    set_threads(torch.device("cpu"), 4)
    assert set_to == [2]


@pytest.mark.parametrize("wanted", ["0", "many", ""])
def test_what_is_no_number_of_threads_is_refused(wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    with pytest.raises(ConfigError):
        threads()
    with pytest.raises(ConfigError, match=f"OMP_NUM_THREADS={wanted}: must be a whole number from 1 up"):
        parse(command_line("A benchmark.", ("demo",), "rounds", 20), ["--out", str(tmp_path)])


def test_a_case_is_written_beside_the_days_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for machine, results in (("one", {"a": {"ratio": 1}, "b": {"ratio": 2}}), ("another", {"b": {"ratio": 3}})):
        monkeypatch.setattr(measured, "_cpu_name", lambda machine=machine: machine)
        path = write_cases(tmp_path, "tiny", cpu, results)
    found = json.loads(path.read_text())["results"]
    assert {name: (case["ratio"], case["environment"]["device"]) for name, case in found.items()} == {
        "a": (1, "one"),
        "b": (3, "another"),
    }
    older = {"benchmark": "tiny", "environment": {"device": "old"}, "results": {"c": {"ratio": 4}}}
    path.write_text(json.dumps(older))  # as files were before each case had its environment
    found = json.loads(write_cases(tmp_path, "tiny", cpu, {"a": {"ratio": 1}}).read_text())["results"]
    assert found["c"] == {"ratio": 4, "environment": {"device": "old"}}
    assert found["a"]["environment"]["device"] == "another"
