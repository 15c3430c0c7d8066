"""The benchmarks of the kernels, on the CPU: who is timed, in which order, and what is said about it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import cases, harness, report, sweep, timing, unet_step_gpu
from benchmarks.kernels.harness import COPY, Options, Row
from benchmarks.kernels.implementations import Implementation, Unavailable, implementations
from benchmarks.kernels.lookup import winner_key
from benchmarks.kernels.work import work
from ldm_kernels.common import tuning
from ldm_kernels.common.shapes import UNET_PARAMETERS
from ldm_scale.config.schema import KernelsConfig
from ldm_scale.models.build import build_unet

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
OPTIONS = Options(CPU, timing.HostClock(), seconds=1e-4)
TINY = sweep.cases([], [2], torch.float32, tiny=True)


def _case(operation: str) -> cases.Case:
    return next(case for case in TINY if case.shape.operation == operation)


def _measure(case: cases.Case, options: Options = OPTIONS) -> list[Row]:
    return harness.measure(case, options, lambda stage, implementation: None)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_implementation_that_the_cpu_can_run_is_right(case: cases.Case) -> None:
    rows = _measure(case)
    assert {row.status for row in rows} <= {"ok", "unavailable"}, [row for row in rows if row.status != "ok"]
    timed = {row.implementation for row in rows if row.cold_us}
    assert COPY in timed
    assert len(timed) >= 2, "plain torch at least"
    for row in rows:
        assert row.status == "ok" or (row.note and not row.cold_us), "a refusal says why"
    directions = {row.direction for row in rows if row.cold_us}
    assert directions == ({"forward"} if case.operation in harness.FORWARD_ONLY_BOUNDS else set(harness.PASSES))


def _wrong_output(projection: Tensor) -> Tensor:
    value, gate = projection.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate, approximate="tanh")


def _wrong_gradient(projection: Tensor) -> Tensor:
    value, gate = projection.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate.detach()) + 0 * gate


def _not_a_number(projection: Tensor) -> Tensor:
    value, gate = projection.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate) + torch.full_like(gate, float("nan"))


def _raises(projection: Tensor) -> Tensor:
    raise RuntimeError("no kernel image")


def _build_refuses(problem: cases.Problem) -> Callable[..., Tensor]:
    raise Unavailable("not here")


def test_what_differs_or_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {"output": _wrong_output, "gradient": _wrong_gradient, "nan": _not_a_number, "raises": _raises}
    registered = [
        *(Implementation(name, lambda problem, f=f: f, ours=True) for name, f in bad.items()),
        Implementation("refuses", _build_refuses, ours=True),
        Implementation("eager", lambda problem: problem.plain, backend="reference"),
    ]
    monkeypatch.setattr(harness, "implementations", lambda operation, max_autotune: registered)
    rows = _measure(_case("geglu"))
    status = {row.implementation: row.status for row in rows}
    assert status == {
        "output": "wrong",
        "gradient": "wrong",
        "nan": "wrong",
        "raises": "failed",
        "refuses": "unavailable",
        "eager": "ok",
        COPY: "ok",
    }
    assert all(not row.cold_us for row in rows if row.implementation not in ("eager", COPY))
    assert set(report.failed_variants(rows)) == {f"geglu, {name}" for name in bad}
    assert report.red_by_rows(rows) == {}, "variants by themselves"
    taken = [replace(row, backend="triton") for row in rows]
    assert set(report.red_by_rows(taken)) == {"geglu"}
    assert report.failed_variants(taken) == {}


def test_a_lost_device_is_not_taken_for_a_slow_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(projection: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(harness, "implementations", lambda *_: [Implementation("ours", lambda problem: fault)])
    with pytest.raises(harness.DeviceFault):
        _measure(_case("geglu"))


def test_errors_do_not_depend_on_the_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = cases.make_problem(replace(_case("group_norm_silu"), batch=5), CPU)
    output = problem.plain(**problem.leaves)
    assert problem.grad_output is not None
    gradients = cases.backward(problem, output, problem.leaves, problem.grad_output)
    gradients["weight"] = gradients["weight"] * 1.01
    whole = cases.errors(problem, [(output, gradients)])[0]
    monkeypatch.setattr(cases, "SLICE_ELEMENTS", 1)
    sliced = cases.errors(problem, [(output, gradients)])[0]
    assert whole == pytest.approx(sliced, rel=1e-3)
    assert whole["weight"] == pytest.approx(0.01, rel=1e-3)
    assert max(error for name, error in whole.items() if name != "weight") < 1e-5


def test_wrong_codes_and_averages_are_seen() -> None:
    problem = cases.make_problem(_case("vector_quantize"), CPU)
    right = problem.plain(**problem.leaves)
    assert cases.forward_error(problem, right) < 1e-6
    assert cases.forward_error(problem, right.roll(1)) > 0.01
    assert cases.forward_error(problem, right + 1000) == float("inf")
    problem = cases.make_problem(_case("ema_update"), CPU)
    averages = problem.leaves["averages"]
    wanted = torch.cat([torch.lerp(averages, problem.leaves["weights"], 1 - d) for d in problem.decays])
    assert cases.forward_error(problem, wanted) < 1e-7
    assert cases.forward_error(problem, averages.repeat(len(problem.decays))) > 1e-6


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_winners_are_found_again_by_the_operation(case: cases.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = tuning.choose
    key = winner_key(cases.make_problem(case, CPU))
    assert tuning.choose is choose
    if case.operation == "ema_update":
        assert key is None
        return
    assert key is not None
    operation, shape = key
    assert operation == case.operation
    row = {"gpu": "G", "dtype": "float32", "shape": shape, "backend": "reference", "ratio": 2.0}
    monkeypatch.setattr(tuning, "_winners", lambda: {operation: [row]})
    assert tuning._match(tuning._rows_on.__wrapped__(operation, "G", "float32"), shape) == "reference"


class _Order:
    """A clock that notes who ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def cold(self, prepared: timing.Prepared, count: int) -> list[float]:
        self.ran.append(str(prepared.run()))
        return [1000.0] * count

    def warm(self, prepared: timing.Prepared, count: int) -> float:
        return 1.0


def test_candidates_are_timed_in_turn() -> None:
    clock = _Order()
    prepared = {name: timing.Prepared(lambda name=name: name, captured=False) for name in "abc"}
    times = timing.time_in_turn(clock, prepared, seconds=0.03)  # type: ignore[arg-type]
    rounds = clock.ran[3:]
    assert [rounds[i : i + 3] for i in range(0, len(rounds), 3)] == [
        list(o) for o in ("abc", "bca", "cab", "abc", "bca")
    ]
    assert all(len(t.warm_us) == timing.ROUNDS and len(t.cold_us) >= 2 * timing.ROUNDS for t in times.values())


def test_work_adds_up_and_knows_variants() -> None:
    case = _case("group_norm_silu")
    forward, backward, both = (work(case, direction) for direction in harness.PASSES)
    assert both.min_bytes == forward.min_bytes + backward.min_bytes
    assert forward.moved_bytes == forward.min_bytes
    two_pass = work(case, "both", "triton two_pass")
    mixed = work(case, "both", "forward registers, backward two_pass")
    assert both.moved_bytes < mixed.moved_bytes < two_pass.moved_bytes
    assert mixed.moved_bytes == forward.moved_bytes + work(case, "backward", "two_pass").moved_bytes


def test_cases_take_turns_heaviest_first() -> None:
    found = sweep.cases(["sd2-64"], [32, 8], torch.bfloat16)
    assert {case.shape.model for case in found} == {"sd2-64"}
    assert {case.shape.operation for case in found[:4]} == {"attention", "cross_attention", "geglu", "group_norm_silu"}
    assert len({case.name for case in found}) == len(found)
    of_norms = [case for case in found if case.operation == "group_norm_silu"]
    assert [case.batch for case in of_norms[:3]] == [32] * 3
    assert sweep._cost_s(of_norms[0]) > sweep._cost_s(of_norms[-1])


def _row(implementation: str, us: float, **changes: Any) -> Row:
    backend = {"triton": "triton", "eager": "reference"}.get(implementation)
    values: dict[str, Any] = {
        "operation": "geglu",
        "model": "m",
        "batch": 8,
        "shape": "4x8",
        "dtype": "bfloat16",
        "implementation": implementation,
        "direction": "both",
        "status": "ok",
        "ours": implementation == "triton",
        "backend": backend,
        "cold_us": {"median": us, "lower_quartile": us, "upper_quartile": us},
        "warm_us": {"median": us, "lower_quartile": us, "upper_quartile": us},
        "min_bytes": 1000,
        "flops": 10,
        "chosen_by": ("geglu", {"batch": 8, "width": 8}),
    }
    return Row(**(values | changes))


def test_winners_need_the_margin_a_choice_and_green_tests() -> None:
    rows = [_row("triton", 100.0), _row("eager", 106.0), _row("torch.compile", 50.0), _row(COPY, 40.0)]
    (winner,) = report.winners(rows, {}, "G")["geglu"]
    shape = {"batch": 8, "width": 8}
    assert winner == {"gpu": "G", "dtype": "bfloat16", "shape": shape, "backend": "triton", "ratio": 1.06}
    assert report.winners(rows, {"geglu": "a test failed"}, "G") == {}
    assert report.winners([_row("triton", 100.0), _row("eager", 104.0)], {}, "G") == {}
    no_choice = [_row("triton", 100.0), _row("torch.compile", 200.0)]
    assert report.winners(no_choice, {}, "G") == {}
    slower = [_row("triton", 200.0), _row("eager", 100.0), _row("triton", 1.0, direction="forward")]
    assert report.winners(slower, {}, "G")["geglu"][0]["backend"] == "reference"


def test_no_ratio_for_a_red_operation(tmp_path: Path) -> None:
    rows = [_row("triton", 10.0), _row("eager", 25.0), _row(COPY, 5.0)]
    for red, ratio in (({}, "2.500"), ({"geglu": "a test failed"}, "")):
        report.write_csv(tmp_path / "r.csv", rows, red)
        with (tmp_path / "r.csv").open() as file:
            (record,) = (r for r in csv.DictReader(file) if r["implementation"] == "triton")
        assert record["times_faster_than_best_other"] == ratio
        assert record["of_copy_bandwidth"] == "0.500"
        assert ("2.50" in report.markdown(rows, red)) == bool(ratio)
        assert ("a test failed" in report.markdown(rows, red)) == (not ratio)


def test_a_plot_is_drawn_and_its_absence_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings = {"copy_gb_per_s": 3000.0, "matmul_tflop_per_s": 700.0}
    assert report.plot(tmp_path / "p.png", [_row("triton", 10.0), _row("eager", 20.0)], ceilings, "G") == ""
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in report.plot(tmp_path / "q.png", [], ceilings, "G")


def test_a_sweep_stops_in_time_and_goes_on_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    chosen = [_case("geglu"), _case("attention")]
    assert sweep.run(chosen, OPTIONS, sweep.Journal(path), deadline_s=0.0)
    assert sweep.Journal(path).unreached == [case.name for case in chosen]

    # A process that died while it checked "eager", and one that died while it timed.
    journal = sweep.Journal(path)
    journal.start()
    journal.begin(chosen[0], "check", "eager")
    journal = sweep.Journal(path)
    journal.start()
    journal.begin(chosen[1], "time", "")
    journal = sweep.Journal(path)
    assert journal.crashed(chosen[0]) == {"eager"}
    assert len(journal.crashes()) == 2
    assert sweep.run(chosen, OPTIONS, journal, deadline_s=float("inf"))
    journal = sweep.Journal(path)
    assert journal.unreached == []
    assert journal.done == {case.name for case in chosen}
    status = {(row.operation, row.implementation): row.status for row in journal.rows}
    assert status["geglu", "eager"] == "failed"
    assert status["geglu", "torch.compile"] == "ok"
    assert status["attention", sweep.ALL] == "failed"


HANGS = """
import sys, time
from pathlib import Path
from benchmarks.kernels import sweep

def hang(case, options, notify):
    notify("check", "triton")
    time.sleep(10)

sweep.measure, sweep.CASE_LIMIT_S = hang, 1
from tests.unit.benchmarks import test_kernel_benchmarks as t
sweep.run(t.TINY[:1], t.OPTIONS, sweep.Journal(Path(sys.argv[1])), float("inf"))
"""


def test_a_case_that_hangs_ends_its_process_and_is_known_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", HANGS, str(path)], env=environment, check=False)
    assert done.returncode == -signal.SIGALRM
    (crash,) = sweep.Journal(path).crashes()
    assert crash == f"{TINY[0].name}: triton"
    other = sweep.Journal(tmp_path / "other.jsonl")
    other.avoid(sweep.Journal(path))
    same_operation = replace(TINY[0], batch=7)
    assert other.crashed(same_operation) == {"triton"}
    assert other.crashed(next(case for case in TINY if case.operation != TINY[0].operation)) == frozenset()


def test_a_case_that_raises_does_not_stop_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: cases.Case, *_: Any) -> list[Row]:
        raise KeyError(case.name)

    monkeypatch.setattr(sweep, "measure", fail)
    journal = sweep.Journal(tmp_path / "journal.jsonl")
    assert sweep.run(TINY[:2], OPTIONS, journal, deadline_s=float("inf"))
    assert [row.status for row in journal.rows] == ["failed", "failed"]
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert lines[-1] == {"unreached": []}


def test_every_operation_has_implementations_of_ours() -> None:
    for operation in ("group_norm_silu", "attention", "geglu", "vector_quantize", "ema_update"):
        names = [implementation.name for implementation in implementations(operation)]
        assert len(set(names)) == len(names)
        assert any(i.ours and i.backend == "triton" for i in implementations(operation))


def test_the_training_step_is_that_of_sd2() -> None:
    with torch.device("meta"):
        model = build_unet(unet_step_gpu.SD2, 4, 4, unet_step_gpu.CONTEXT[1])
    assert sum(parameter.numel() for parameter in model.parameters()) == UNET_PARAMETERS["sd2"]


def test_a_way_to_compute_is_measured_on_a_copy_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, timed, honest = tmp_path / "unet.json", list[tuple[Any, Any]](), unet_step_gpu._time

    def noted(model: torch.nn.Module, inputs: Any, optimizer: Any, device: torch.device) -> float:
        timed.append((model, optimizer))
        return honest(model, inputs, optimizer, device)

    monkeypatch.setattr(unet_step_gpu, "_time", noted)
    assert unet_step_gpu.main(["--dry-run", "--way", "replayed", "--seconds", "0", "--out", str(path)]) == 0
    document = json.loads(path.read_text())
    assert list(document["step_s"]) == [unet_step_gpu.OFF, unet_step_gpu.ON, "replayed"]
    (off, _), (on, _), (way, _) = timed[:3]
    assert off is on is not way
    assert [model for model, _ in timed[3:6]] == [way, on, off], "in the other order"
    assert not {id(p) for p in off.parameters()} & {id(p) for p in way.parameters()}
    assert not any(p._backward_hooks for p in off.parameters()), "only the graph copies gradients"
    assert all(p._backward_hooks for p in way.parameters())
    for model, optimizer in timed:
        assert optimizer.param_groups[0]["params"] == list(model.parameters())


def test_a_wrong_training_step_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(model: torch.nn.Module, kernels: KernelsConfig, *_: Any) -> tuple[float, float]:
        return (0.01, 0.01) if kernels == unet_step_gpu.SETTINGS[unet_step_gpu.OFF] else (0.01, float("nan"))

    monkeypatch.setattr(unet_step_gpu, "check", check)
    path = tmp_path / "unet.json"
    assert unet_step_gpu.main(["--dry-run", "--seconds", "0", "--out", str(path)]) == 1
    document = json.loads(path.read_text())
    assert document["right"] == {unet_step_gpu.OFF: True, unet_step_gpu.ON: False}
    assert set(document["step_s"]) == {unet_step_gpu.OFF}
    assert "WRONG, not timed: kernels on" in unet_step_gpu.table(document)
