"""The GPU proof without a GPU: its dry run, and what it says when a piece fails, hangs or is not reached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_proof import __main__ as command
from benchmarks.gpu_proof import goals, memory, plan, recorder, summary
from benchmarks.gpu_proof.pieces import MAX_RESTARTS, Outcome, Piece, python, run_pieces
from benchmarks.kernels.harness import Row
from benchmarks.kernels.sweep import Journal, cases
from ldm_kernels.common.shapes import all_shapes

ROOT = Path(__file__).resolve().parents[3]
FILES = {"summary.md", "results.csv", "results.json", "winners.json", "roofline.png", "tests.txt"}


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(["kernels", ".", os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **environment}
    command_line = [sys.executable, *arguments]
    return subprocess.run(command_line, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.timeout(300)
@pytest.mark.rest
def test_a_dry_run_goes_through_every_step_and_says_that_it_means_nothing(tmp_path: Path) -> None:
    done = _run("-m", "benchmarks.gpu_proof", "--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert all(0 < path.stat().st_size < 16e6 for path in tmp_path.iterdir())
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("# GPU proof (dry run: no meaning): passed")
    for part in ("UNet training step (dry run", "### group_norm_silu", "### geglu", "checks need a CUDA device"):
        assert part in text
    assert (tmp_path / "results.csv").read_text().startswith("# dry run: no meaning")
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["mark"] == "dry run: no meaning"
    assert document["tests"]["test_random_shapes geglu 1/1"]["passed"] >= 3
    assert json.loads((tmp_path / "winners.json").read_text()) == {}


@pytest.mark.parametrize("module", ["benchmarks.gpu_proof", "benchmarks.kernels.run"])
def test_without_a_gpu_it_says_so_in_a_line(module: str, tmp_path: Path) -> None:
    done = _run("-m", module, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def _script(name: str, code: str) -> Piece:
    return Piece(name, python("-c", code))


def test_a_failure_comes_first_and_the_rest_still_runs(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    counter = work / "count"
    dies = f"import os; open({str(counter)!r}, 'a').write('x'); os.kill(os.getpid(), 9)"
    phases = [
        plan.Phase(
            "a", [_script("breaks", "print('boom'); raise SystemExit(3)"), _script("dies", dies)], time.time() + 60
        ),
        plan.Phase("b", [_script("hangs", "import time; time.sleep(60)")], time.time() + 5),
        plan.Phase("c", [_script("works", "print('fine')")], time.time() + 60),
        plan.Phase("d", [_script("late", "print('never')")], time.time()),
    ]
    found = command.prove(phases, work, out, time.time())
    assert [o.status for o in found.outcomes] == ["failed", "crashed", "timed out", "passed", "not started"]
    assert len(counter.read_text()) == 1 + MAX_RESTARTS
    lines = (out / "summary.md").read_text().splitlines()
    assert lines[0] == "# GPU proof: FAILED"
    assert lines[2] == "- FAILED breaks: failed: boom"
    assert [line.split(":")[0] for line in lines[3:5]] == ["- FAILED dies", "- FAILED hangs"]
    assert found.not_reached == ["late"]
    assert "- late" in lines
    assert "===== works: passed" in (out / "tests.txt").read_text()


def test_a_piece_that_hangs_takes_what_it_started_with_it(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    code = (
        f"import subprocess, time; p = subprocess.Popen(['sleep', '60']); open({str(started)!r}, 'w').write(str(p.pid))"
    )
    (outcome,) = run_pieces([_script("p", code + "; time.sleep(60)")], tmp_path, 1, time.time() + 2, lambda text: None)
    assert outcome.status == "timed out"
    status = Path(f"/proc/{started.read_text()}/status")
    end = time.monotonic() + 10  # a killed process lives until it is scheduled once more
    while _lives(status) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _lives(status)


def _lives(status: Path) -> bool:
    """Whether a process runs, by its file in /proc."""
    try:
        return "zombie" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


TESTS = """
import os
import pytest

def test_geglu_passes(): pass
def test_geglu_fails(): assert 1 == 2, "not equal"
def test_attention_kills():
    if os.environ.get("KILL"): os.kill(os.getpid(), 9)
@pytest.mark.skip(reason="no reason")
def test_skipped(): pass
def test_attention_last(): pass
"""


def _record(folder: Path, share: str = "1/1", deadline_s: float = float("inf"), **environment: str) -> recorder.Record:
    (folder / "test_it.py").write_text(TESTS)
    options = ("-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_proof.recorder", "-o", "addopts=")
    variables = {"GPU_PROOF_RECORD": str(folder / "r"), "GPU_PROOF_SHARE": share, "GPU_PROOF_DEADLINE": str(deadline_s)}
    _run("-m", "pytest", str(folder / "test_it.py"), "--rootdir", str(folder), *options, **variables, **environment)
    return recorder.read_record(folder / "r")


def _names(tests: dict[str, str] | list[str]) -> list[str]:
    return [test.rpartition("::")[2] for test in tests]


def test_results_are_noted_as_they_come_and_a_death_costs_one_test(tmp_path: Path) -> None:
    record = _record(tmp_path, KILL="1")
    assert record.begun is not None
    assert record.begun.endswith("test_attention_kills")
    record = _record(tmp_path, KILL="1")
    assert record.begun is None
    assert _names(record.with_outcome("passed")) == ["test_geglu_passes", "test_attention_last"]
    failed = record.with_outcome("failed")
    assert _names(failed) == ["test_geglu_fails", "test_attention_kills"]
    assert [reason.split("\n")[0] for reason in failed.values()] == [
        "AssertionError: not equal",
        recorder.SURVIVED_BY_NONE,
    ]
    assert _names(record.with_outcome("skipped")) == ["test_skipped"]

    piece = Piece("test_it 1/1", (), record=tmp_path / "r")
    found = summary.find([piece], [Outcome(piece.name, "failed")], tmp_path, dry_run=False)
    assert len(found.failures) == 2
    assert set(found.red) == {"geglu", "attention"}
    assert found.tests[piece.name] == {"passed": 2, "failed": 2, "skipped": 1, "not reached": 0}


def test_shares_divide_the_tests_and_the_deadline_is_no_failure(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    assert len(_record(first, "1/2").ended) == 3
    assert len(_record(second, "2/2").ended) == 2
    late = tmp_path / "late"
    late.mkdir()
    record = _record(late, deadline_s=1.0)
    assert len(record.not_reached()) == len(record.ended) == 5
    piece = Piece("test_it 1/1", (), record=late / "r")
    found = summary.find([piece], [Outcome(piece.name, "passed")], late, dry_run=False)
    assert (found.failures, found.red) == ([], {})
    assert found.not_reached[0].startswith("5 tests of test_it 1/1")


def test_a_failure_that_names_no_operation_makes_all_red(tmp_path: Path) -> None:
    record = tmp_path / "r"
    record.write_text(json.dumps({"end": "tests/kernels/test_launch.py::test_x", "outcome": "failed", "reason": "no"}))
    piece = Piece("test_launch 1/1", (), record=record)
    found = summary.find([piece], [Outcome(piece.name, "failed")], tmp_path, dry_run=False)
    assert set(found.red) == set(summary.OPERATIONS)


def test_the_variant_that_no_call_gets_fails_without_making_its_operation_red(tmp_path: Path) -> None:
    record = tmp_path / "r"
    test = "tests/kernels/test_group_norm_silu.py::test_gradients[cluster]"
    record.write_text(json.dumps({"end": test, "outcome": "failed", "reason": "no"}))
    piece = Piece("test_group_norm_silu 1/3", (), record=record)
    found = summary.find([piece], [Outcome(piece.name, "failed")], tmp_path, dry_run=False)
    assert found.failures == [f"{test}: no"]
    assert found.red == {}


def test_a_wrong_result_in_a_sweep_and_a_failed_memory_check_fail_the_proof(tmp_path: Path) -> None:
    for folder in ("kernels", "check1"):
        (tmp_path / folder).mkdir()
    case = cases(["sd2-64"], [8], torch.bfloat16, ["geglu"])[0]
    row = Row(
        "geglu", "sd2-64", 8, "x", "bfloat16", "triton", "forward", "wrong", "error 1", ours=True, backend="triton"
    )
    journal = Journal(tmp_path / "check1" / "journal.jsonl")
    journal.start()
    journal.finish(case, [row])
    Journal(tmp_path / "kernels" / "journal.jsonl").leave(["geglu later"])
    checks = [memory.Result("attention", "16,384 tokens", False, "peak 9 MiB, limit 1 MiB").__dict__]
    (tmp_path / "memory.json").write_text(json.dumps(checks))
    found = summary.find([], [], tmp_path, dry_run=False)
    assert set(found.red) == {"geglu", "attention"}
    assert len(found.failures) == 2
    assert found.not_reached == ["shape geglu later"]


def _timed(implementation: str, us: float, **changes: object) -> Row:
    times = {"median": us, "lower_quartile": us, "upper_quartile": us}
    shape = {"batch": 32, "channels": 320, "groups": 32, "pixels": 4096}
    values = {"status": "ok", "ours": implementation.startswith("triton"), "chosen_by": ("group_norm_silu", shape)}
    values |= {"cold_us": times, "warm_us": times, "min_bytes": 200, "moved_bytes": 300} | changes
    names = ("group_norm_silu", "sd2-64", 32, "320x64x64", "bfloat16", implementation)
    return Row(*names, direction=str(values.pop("direction", "forward")), **values)  # type: ignore[arg-type]


def test_goals_stand_beside_what_was_measured() -> None:
    rows = [_timed("triton two_pass", 16.0), _timed("triton registers", 20.0), _timed("copy", 10.0)]
    rows += [_timed("triton", 10.0, direction="both"), _timed("eager NCHW", 25.0, direction="both")]
    two_pass, _, single, *rest = goals.table(rows, None, {})[2:]
    assert two_pass.endswith("| 0.90 | 1 | 1 | 0.94 | 0.94 |"), "10 / 16 of the bandwidth for 1.5 times the bytes"
    assert single.endswith("| 0.80 | 1 | 0 | 0.50 | 0.50 |")
    (eager,) = (line for line in rest if "group_norm_silu" in line and "eager" in line)
    assert eager.endswith("| 3.00 | 1 | 0 | 2.50 | 2.50 |")
    small = [_timed("triton two_pass", 16.0, chosen_by=("group_norm_silu", {"pixels": 64})), _timed("copy", 10.0)]
    assert "not measured" in goals.table(small, None, {})[2]
    assert "| red |" in goals.table(rows, None, {"group_norm_silu": "a test failed"})[2]
    step = {"times_faster": {"kernels on": {"median": 1.2}}}
    assert goals.table([], step, {})[-1].endswith("| 1.15 | 1 | 1 | 1.20 | 1.20 |")


def test_the_plan_covers_the_time_and_the_models(tmp_path: Path) -> None:
    begin_s = time.time()
    phases = plan.phases(tmp_path, begin_s, begin_s + 465)
    ends = [phase.until_s - begin_s for phase in phases]
    assert ends == sorted(ends)
    assert ends[-1] == pytest.approx(465)
    assert [phase.parallel > 1 for phase in phases] == [phase.name == "correctness" for phase in phases]
    names = [piece.name for phase in phases for piece in phase.pieces]
    assert len(set(names)) == len(names)
    assert {"memory", "test_random_shapes test_geglu 1/1", "test_geglu 1/1", "check 1"} <= set(names)
    assert not [name for name in names if name.startswith(plan.NOT_OF_THE_GPU)]
    for model in plan.SD2[1:4:2]:
        assert any(shape.model == model for shape in all_shapes())


def test_ways_that_compile_are_measured_where_there_is_time(tmp_path: Path) -> None:
    def ways(minutes: float) -> list[str]:
        (phase,) = (p for p in plan.phases(tmp_path, 0.0, 60 * minutes) if p.name == "ways to compute")
        return [piece.name for piece in phase.pieces]

    assert ways(8) == ["UNet step, replayed"]
    assert ways(30) == ["UNet step, replayed", "UNet step, compiled", "UNet step, compiled and replayed"]


def test_memory_checks_name_their_operation() -> None:
    named = {memory._operation(check.__name__) for check in memory.CHECKS}
    assert named <= set(summary.OPERATIONS)
