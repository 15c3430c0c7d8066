"""What the pieces found, as the files that a person reads; failures come first.

An operation is red, and gets no ratios and no winners, if a test that names it failed, a memory check of it failed,
or a result of it was wrong in a sweep. A failed test that names no operation makes all of them red. What concerns the
cluster variant alone is a failure too, but reddens nothing: no call gets that variant unless a variable asks for it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof import goals
from benchmarks.gpu_proof.pieces import Outcome, Piece
from benchmarks.gpu_proof.plan import way_file
from benchmarks.gpu_proof.recorder import SURVIVED_BY_NONE, read_record
from benchmarks.kernels import device, report, unet_step_gpu
from benchmarks.kernels.harness import Row
from benchmarks.kernels.sweep import ALL, Journal
from benchmarks.kernels.unet_step_gpu import WAYS

NOT_TAKEN = "cluster"
OPERATIONS = ("group_norm_silu", "attention", "geglu", "vector_quantize", "ema_update")
FILE_LIMIT_BYTES = 15 * 2**20
BENCHMARKS = ("SD-2 shapes", "other shapes")
SWEEPS = (*BENCHMARKS, "check ")


@dataclass
class Findings:
    """Everything that the pieces left, in plain data."""

    mark: str = ""  # what a dry run puts on everything
    outcomes: list[Outcome] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    red: dict[str, str] = field(default_factory=dict)
    not_reached: list[str] = field(default_factory=list)
    tests: dict[str, dict[str, int]] = field(default_factory=dict)  # piece -> outcome -> number
    skipped: dict[str, str] = field(default_factory=dict)
    memory: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    unet: dict[str, Any] | None = None
    ways: dict[str, dict[str, Any]] = field(default_factory=dict)  # SD-2's step by how it is computed
    environment: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)


def find(pieces: Sequence[Piece], outcomes: Sequence[Outcome], work: Path, dry_run: bool) -> Findings:
    """The findings of the pieces so far."""
    found = Findings(report.DRY_RUN if dry_run else "", list(outcomes))
    for piece, outcome in zip(pieces, outcomes, strict=True):
        if piece.record is not None:
            _take_tests(found, piece, outcome, piece.record)
        elif outcome.status == "not started":
            found.not_reached.append(piece.name)
        elif outcome.status == "timed out" and piece.name.startswith(SWEEPS):
            # What hung is in the journal: it ends with what had begun.
            found.not_reached.append(f"the rest of {piece.name}")
        elif outcome.status != "passed":
            _take_failure(found, outcome)
    _take_memory(found, work, dry_run)
    _take_rows(found, work)
    found.unet = _read(work / "unet.json")
    found.ways = {way: document for way in WAYS if (document := _read(work / way_file(way))) is not None}
    known = _read(work / "device.json") or {"environment": {"device": "unknown"}, "ceilings": {}}
    found.environment, found.ceilings = known["environment"], known["ceilings"]
    return found


def write(out: Path, found: Findings, seconds: float) -> None:
    """Writes all files of the results; each stays small enough to be carried away."""
    mark = found.mark
    report.write_csv(out / "results.csv", found.rows, found.red, mark)
    table = {} if mark else report.winners(found.rows, found.red, found.environment["device"])
    (out / "winners.json").write_text(json.dumps(table, indent=2) + "\n")
    title = f"{found.environment['device']}{f' ({mark})' if mark else ''}"
    no_plot = report.plot(out / "roofline.png", found.rows, found.ceilings, title)
    _write_limited(out / "tests.txt", "\n".join(_log(outcome) for outcome in found.outcomes))
    _write_limited(out / "summary.md", text(found, table, seconds, no_plot))
    (out / "results.json").write_text(json.dumps(_document(found, seconds), indent=1) + "\n")


def text(found: Findings, table: dict[str, list[dict[str, Any]]], seconds: float, no_plot: str) -> str:
    """The summary in Markdown: failures, what was not reached, then figures."""
    mark = f" ({found.mark})" if found.mark else ""
    lines = [f"# GPU proof{mark}: {'FAILED' if found.failures else 'passed'}", ""]
    lines += [f"- FAILED {failure}" for failure in found.failures] or ["Nothing failed."]
    lines += ["", *(f"- red, so without ratios and winners: {name} ({why})" for name, why in found.red.items())]
    lines += ["", "## Not reached", "", *(f"- {name}" for name in found.not_reached or ["nothing"])]
    lines += ["", f"## Machine ({seconds:.0f} s in all)", "", *device.lines(found.environment, found.ceilings)]
    lines += ["", "## Tests", "", "| piece | status | seconds | tests |", "|---|---|---|---|"]
    for outcome in found.outcomes:
        counts = ", ".join(f"{number} {how}" for how, number in found.tests.get(outcome.name, {}).items())
        restarts = f", {outcome.restarts} restarts" if outcome.restarts else ""
        lines.append(f"| {outcome.name} | {outcome.status}{restarts} | {outcome.seconds:.0f} | {counts} |")
    reasons = Counter(found.skipped.values())
    lines += ["", *(f"- skipped {number}: {why}" for why, number in reasons.items())]
    lines += ["", "## Memory", ""]
    for check in found.memory:
        said = {True: "passed", False: "FAILED", None: "not run"}[check["passed"]]
        lines.append(f"- {check['operation']}, {check['name']}: {said}, {check['detail']}")
    lines += ["", "## Training step", "", unet_step_gpu.table(found.unet) if found.unet else "Not measured.", ""]
    for way, document in found.ways.items():
        lines += [f"Computed another way, {way}:", "", unet_step_gpu.table(document), ""]
    lines += ["## Goals", "", *goals.table(found.rows, None if found.mark else found.unet, found.red), ""]
    lines += [f"## Kernels{mark}", "", no_plot, report.markdown(found.rows, found.red), ""]
    lines += ["## Winners", "", f"winners.json: {sum(map(len, table.values()))} rows, for a person to review.", ""]
    return "\n".join(lines)


def _take_tests(found: Findings, piece: Piece, outcome: Outcome, path: Path) -> None:
    record = read_record(path)
    failed = record.with_outcome("failed")
    if record.begun:
        failed[record.begun] = f"{SURVIVED_BY_NONE} ({outcome.status})"
    skipped, not_reached = record.with_outcome("skipped"), record.not_reached()
    found.tests[piece.name] = {
        "passed": len(record.with_outcome("passed")),
        "failed": len(failed),
        "skipped": len(skipped),
        "not reached": len(not_reached),
    }
    found.skipped |= {test.rpartition("/")[2]: reason for test, reason in skipped.items()}
    if not_reached:
        found.not_reached.append(f"{len(not_reached)} tests of {piece.name}, from {not_reached[0]}")
    for test, reason in failed.items():
        found.failures.append(f"{test}: {reason}")
        if NOT_TAKEN not in test:
            _redden(found, test, f"failed test {test.rpartition('/')[2]}")
    if outcome.status == "not started":
        found.not_reached.append(piece.name)
    elif outcome.status == "timed out":
        # A test that hung is among the failed ones.
        found.not_reached.append(f"the rest of {piece.name}")
    # pytest's status 5, no tests left to collect, is that of a share that an earlier process had finished.
    elif outcome.status != "passed" and not failed and "no tests ran" not in outcome.tail:
        _take_failure(found, outcome)


def _take_failure(found: Findings, outcome: Outcome) -> None:
    last = outcome.tail.splitlines()[-1] if outcome.tail else "no output"
    found.failures.append(f"{outcome.name}: {outcome.status}: {last[:300]}")
    if not outcome.name.startswith((*SWEEPS, "device", "UNet step", "memory")):
        _redden(found, outcome.name, f"{outcome.name} {outcome.status}")


def _redden(found: Findings, name: str, why: str) -> None:
    named = [operation for operation in OPERATIONS if operation in name]
    for operation in named or OPERATIONS:
        found.red.setdefault(operation, why)


def _take_memory(found: Findings, work: Path, dry_run: bool) -> None:
    if dry_run:
        found.skipped["memory checks"] = "memory checks need a CUDA device"
    found.memory = _read(work / "memory.json") or []
    for check in found.memory:
        if check["passed"] is False:
            found.failures.append(f"memory check of {check['operation']}, {check['name']}: {check['detail']}")
            _redden(found, check["operation"], f"memory check {check['name']}")


def _take_rows(found: Findings, work: Path) -> None:
    checked: list[Row] = []
    for path in sorted(work.glob("*/journal.jsonl")):
        journal = Journal(path)
        timing = path.parent.name == "kernels"
        if timing:
            found.rows = journal.rows
            found.not_reached += [f"shape {name}" for name in journal.unreached]
        else:
            checked += journal.rows
        found.failures += [f"a process did not survive, or was stopped in, {crash}" for crash in journal.crashes()]
        given_up = [row for row in journal.rows if row.implementation == ALL and row.status == "failed"]
        found.failures += [f"{row.operation} {row.model} b{row.batch} {row.shape}: {row.note}" for row in given_up]
    for operation, why in report.red_by_rows([*found.rows, *checked]).items():
        found.failures.append(f"{operation}: {why}")
        found.red.setdefault(operation, why)
    variants = report.failed_variants([*found.rows, *checked])
    found.failures += [f"{name}: {why}" for name, why in variants.items()]


def _document(found: Findings, seconds: float) -> dict[str, Any]:
    """results.json: everything but the rows' tables, and the rows too while they are small."""
    return {
        "benchmark": "gpu_proof",
        "mark": found.mark,
        "seconds": round(seconds, 1),
        "environment": found.environment,
        "ceilings": found.ceilings,
        "failures": found.failures,
        "red": found.red,
        "not_reached": found.not_reached,
        "skipped": found.skipped,
        "pieces": [{"name": o.name, "status": o.status, "seconds": round(o.seconds, 1)} for o in found.outcomes],
        "tests": found.tests,
        "memory": found.memory,
        "unet_step": found.unet,
        "unet_step_ways": found.ways,
        "rows": "results.csv",
    }


def _log(outcome: Outcome) -> str:
    share = FILE_LIMIT_BYTES // 64
    return f"===== {outcome.name}: {outcome.status}, {outcome.seconds:.0f} s =====\n{outcome.output[-share:]}\n"


def _write_limited(path: Path, content: str) -> None:
    data = content.encode()
    path.write_bytes(data if len(data) <= FILE_LIMIT_BYTES else data[:FILE_LIMIT_BYTES] + b"\n(cut here)\n")


def _read(path: Path) -> Any:
    """What a piece wrote, or None if it wrote nothing, or was stopped while it did."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
