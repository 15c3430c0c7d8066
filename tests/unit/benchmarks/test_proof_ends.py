"""How sweeps and proofs end: what counts as a fault, a refusal, or as no more than the end of the time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_proof import plan, recorder, summary
from benchmarks.gpu_proof.pieces import Outcome, Piece
from benchmarks.kernels import harness, report, run, sweep, timing
from benchmarks.kernels.harness import Row
from benchmarks.kernels.implementations import Implementation, implementations
from ldm_kernels.common.shapes import Shape

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
OPTIONS = harness.Options(CPU, timing.HostClock(), seconds=1e-4)
GEGLU = next(case for case in sweep.cases([], [2], torch.float32, tiny=True) if case.operation == "geglu")

WAITS = """
import sys, time
from pathlib import Path
from benchmarks.kernels import sweep
from tests.unit.benchmarks import test_proof_ends as t

def wait(case, options, notify):
    notify("check", "triton")
    time.sleep(60)

sweep.measure = wait
sweep.run([t.GEGLU], t.OPTIONS, sweep.Journal(Path(sys.argv[1])), float("inf"))
"""
WAITING_TEST = "import time\ndef test_geglu(): time.sleep(60)\n"


def _end_when_begun(command: list[str], notes: Path, **variables: str) -> int:
    """Asks the process to end once it has noted that something begins; its exit status."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **variables})
    try:
        end_s = time.monotonic() + 60
        while not (notes.exists() and '"begin"' in notes.read_text()):
            assert process.poll() is None
            assert time.monotonic() < end_s
            time.sleep(0.05)
        process.terminate()
        return process.wait(20)
    finally:
        process.kill()


def test_a_sweep_that_is_asked_to_end_blames_nobody(tmp_path: Path) -> None:
    path = tmp_path / "check1" / "journal.jsonl"
    path.parent.mkdir()
    assert _end_when_begun([sys.executable, "-c", WAITS, str(path)], path) == 0
    journal = sweep.Journal(path)
    assert journal.crashes() == []
    other = sweep.Journal(tmp_path / "other.jsonl")
    other.avoid(journal)
    assert other.crashed(GEGLU) == frozenset()
    pieces = [Piece("check 1", ()), Piece("SD-2 shapes", ())]
    found = summary.find(pieces, [Outcome(piece.name, "timed out") for piece in pieces], tmp_path, dry_run=False)
    assert (found.failures, found.red) == ([], {})
    assert found.not_reached == ["the rest of check 1", "the rest of SD-2 shapes"]

    journal.start()
    journal.begin(GEGLU, "check", "triton")
    assert sweep.Journal(path).crashed(GEGLU) == {"triton"}, "killed"
    assert summary.find([], [], tmp_path, dry_run=False).failures


def test_a_test_that_is_asked_to_end_was_not_reached(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(WAITING_TEST)
    options = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_proof.recorder", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", str(tmp_path / "test_it.py"), "--rootdir", str(tmp_path), *options]
    notes = tmp_path / "r"
    assert _end_when_begun(command, notes, GPU_PROOF_RECORD=str(notes)) == 0
    piece = Piece("test_geglu 1/1", (), record=notes)
    found = summary.find([piece], [Outcome(piece.name, "timed out")], tmp_path, dry_run=False)
    assert (found.failures, found.red) == ([], {})
    assert len(found.not_reached) == 2

    notes.write_text(json.dumps({"begin": "tests/kernels/test_geglu.py::test_geglu"}))
    found = summary.find([piece], [Outcome(piece.name, "timed out")], tmp_path, dry_run=False)
    assert set(found.red) == {"geglu"}, "killed"


def test_the_handler_ends_with_the_sweep(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert sweep.run([], OPTIONS, sweep.Journal(tmp_path / "journal.jsonl"), float("inf"))
    assert signal.getsignal(signal.SIGTERM) == before


def _measure(monkeypatch: pytest.MonkeyPatch, registered: list[Implementation]) -> list[Row]:
    monkeypatch.setattr(harness, "implementations", lambda *_: registered)
    return harness.measure(GEGLU, OPTIONS, lambda stage, implementation: None)


def _raising(error: Exception) -> Callable[..., Tensor]:
    def run(*_: object, **__: object) -> Tensor:
        raise error

    return run


def test_a_fault_is_seen_by_the_device_and_not_by_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    bad = [Implementation("ours", lambda problem: _raising(error))]
    assert {row.status for row in _measure(monkeypatch, bad) if row.implementation == "ours"} == {"failed"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", _raising(RuntimeError("lost")))
    with pytest.raises(harness.DeviceFault, match=r"illegal memory access.*lost"):
        _measure(monkeypatch, bad)
    harness._raise_faults(torch.OutOfMemoryError("no memory"))
    assert any(words in str(error) for words in recorder.LOST_DEVICE)


def test_what_cannot_be_built_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Implementation("package", _raising(RuntimeError("undefined symbol")))
    rows = _measure(monkeypatch, [broken, Implementation("eager", lambda problem: problem.plain)])
    assert {row.implementation: row.status for row in rows} == {"package": "failed", "eager": "ok", "copy": "ok"}
    assert report.red_by_rows(rows) == {}


@pytest.mark.parametrize("error", [TypeError, ValueError, NotImplementedError])
def test_the_kernel_that_calls_get_may_not_refuse(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    fails = _raising(error("not this"))
    ours = Implementation("triton", lambda problem: fails, backend="triton", ours=True)
    variant = Implementation("triton cluster", lambda problem: fails, ours=True)
    other = Implementation("xformers", lambda problem: fails, backend="xformers")
    rows = _measure(monkeypatch, [ours, variant, other])
    status = {row.implementation: row.status for row in rows if row.implementation != harness.COPY}
    assert status == {"triton": "failed", "triton cluster": "unavailable", "xformers": "unavailable"}
    assert set(report.red_by_rows(rows)) == {"geglu"}


def test_a_head_that_no_kernel_serves_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.kernels.implementations.launch.INTERPRETED", True)
    shape = Shape("attention", "tiny", (("heads", 1), ("queries", 4), ("keys", 4), ("head_dim", 160)))
    ours = [i for i in implementations("attention") if i.ours]
    monkeypatch.setattr(harness, "implementations", lambda *_: ours)
    rows = harness.measure(replace(GEGLU, shape=shape), OPTIONS, lambda stage, implementation: None)
    (row,) = (row for row in rows if row.ours)
    assert (row.status, row.note) in [
        ("unavailable", "no kernel serves head dim 160"),
        ("unavailable", "triton is not installed"),
    ]


def test_the_plan_leaves_time_to_end(tmp_path: Path) -> None:
    begin_s = 1000.0
    phases = {phase.name: phase for phase in plan.phases(tmp_path, begin_s, begin_s + 465)}
    names = list(phases)
    assert names.index("memory") < names.index("correctness")
    assert phases["memory"].parallel == 1
    correctness = phases["correctness"]
    checkers = correctness.pieces[: plan.CHECKERS]
    assert [piece.name for piece in checkers] == [f"check {i + 1}" for i in range(plan.CHECKERS)]
    for phase, pieces, margin_s in (
        (correctness, checkers, plan.CHECKERS_STOP_S),
        (phases["SD-2 shapes"], phases["SD-2 shapes"].pieces, plan.SWEEP_STOP_S),
        (phases["other shapes"], phases["other shapes"].pieces, plan.SWEEP_STOP_S),
    ):
        for piece in pieces:
            arguments = run.parse(piece.command[2:])
            assert arguments.no_report
            assert phase.until_s - arguments.stop_at == pytest.approx(margin_s)
    for piece in correctness.pieces[plan.CHECKERS :]:
        assert "minversion=7" in piece.command


def test_no_report_leaves_the_journal_alone(tmp_path: Path) -> None:
    options = ["--dry-run", "--op", "geglu", "--no-report", "--out", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/kernels/run.py", *options]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert [file.name for file in tmp_path.iterdir()] == ["journal.jsonl"]


def test_very_short_cases_give_no_winner() -> None:
    def row(name: str, backend: str, us: float, direction: str) -> Row:
        times = {"median": us, "lower_quartile": us, "upper_quartile": us}
        names = ("geglu", "m", 8, "4x8", "bfloat16", name, direction, "ok")
        return Row(*names, backend=backend, cold_us=times, chosen_by=("geglu", {"width": 8}))

    def found(us: float, direction: str = "both") -> dict[str, list[dict[str, object]]]:
        return report.winners([row("a", "triton", us, direction), row("b", "reference", 2 * us, direction)], {}, "G")

    least = report.WINNING_LEAST_US
    assert least >= 50
    assert found(least - 1) == {}
    assert len(found(least)["geglu"]) == 1
    assert len(found(least - 1, "forward")["geglu"]) == 1, "of operations without a backward pass"
