"""Compiles the kernels for GPUs that need not be here, and holds the binaries to the committed table.

    python -m ldm_kernels.common.aot              rows whose source changed, and the fixed ones
    python -m ldm_kernels.common.aot --all        every row
    python -m ldm_kernels.common.aot --update     every row, and write the table
    python -m ldm_kernels.common.aot --every      every binary that any shape asks for; those without a row are held
                                                  to the rules on spills, atomics and shared memory

The shapes of all models ask for fewer binaries than there are shapes, because most sizes are run-time arguments, and
the table has one row for each class of alike ones (cases.py says what that is). A row's hash covers the kernel's
source with all that it calls, its constants, types and options and Triton's version; while it stays, the binary stays.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import triton

from ldm_kernels.common import aot_table
from ldm_kernels.common.aot_table import Row, Table
from ldm_kernels.common.binary import Figures, figures_of
from ldm_kernels.common.cases import ARCHITECTURES, LARGEST_BATCH, Case, all_cases, class_of
from ldm_kernels.common.compilation import CLUSTERS, Compilation, specialize
from ldm_kernels.common.launch import Launch

# CUDA's limits on the number of programs along each axis of a grid.
_GRID_LIMITS = (2**31 - 1, 65_535, 65_535)
_NOT_COMPILED = Figures(0, 0, 0, 0, 0, {}, {}, 0, {}, 0, 0, 0)


@dataclasses.dataclass
class Job:
    """A compilation with its row, whose figures are not known yet."""

    row: Row
    compilation: Compilation
    in_table: bool  # the first of its class


def jobs_of(cases: Iterable[Case], architecture: int) -> list[Job]:
    """The different compilations that the cases ask for, in the order in which they first do."""
    by_hash: dict[str, Job] = {}
    first: dict[tuple[Any, ...], Job] = {}
    names: dict[str, int] = {}
    for case in cases:
        for launched in case.launches(architecture):
            compilation = specialize(launched, architecture)
            kind = class_of(launched, architecture)
            if compilation.hash not in by_hash:
                row = _row_of(case, compilation)
                names[row.name] = names.get(row.name, 0) + 1
                if names[row.name] > 1:
                    row = dataclasses.replace(row, case=f"{row.case} #{names[row.name]}")
                by_hash[compilation.hash] = Job(row, compilation, in_table=case.in_table and kind not in first)
            job = first.setdefault(kind, by_hash[compilation.hash])
            job.row = dataclasses.replace(job.row, calls=job.row.calls + 1)
    return list(by_hash.values())


def grid_problems(cases: Iterable[Case], architecture: int) -> list[str]:
    """Launches that no GPU would accept at the largest batch, each with its grid."""
    problems = []
    for case in cases:
        large = dataclasses.replace(case, batch=LARGEST_BATCH)
        for launched in large.launches(architecture):
            if any(size > limit for size, limit in zip(launched.grid, _GRID_LIMITS, strict=False)):
                name = f"{case.shape.operation}.{case.direction} {launched.kernel.__name__} {large.name}"
                problems.append(f"{name}: grid {launched.grid} passes CUDA's limits {_GRID_LIMITS}")
    return problems


def measure(job: Job) -> Row:
    """The job's row with the figures of its binary.

    Raises: RuntimeError if it does not compile, naming the row.
    """
    try:
        compiled = job.compilation.compiled()
    except Exception as error:
        # Triton has no common base of what its passes, LLVM and ptxas raise.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(f"{job.row.name}: does not compile: {reason[0]}") from error
    return dataclasses.replace(job.row, figures=figures_of(compiled))


def problems_of(row: Row, stated: Row | None, same_triton: bool) -> list[str]:
    """What is wrong with a measured row, each naming it."""
    if stated is not None:
        row = dataclasses.replace(row, allowed=stated.allowed)
    found = aot_table.broken_rules(row)
    if stated is not None and same_triton:
        found += aot_table.regressions(stated.figures, row.figures)
    return [f"{row.name}: {problem}" for problem in found]


def selected(jobs: Sequence[Job], table: Table) -> list[Job]:
    """Of the table's jobs those whose hash is not the stated one, and the fixed ones.

    With another version of Triton every hash differs; then only the fixed ones come.
    """
    stated = {row.name: row for row in table.rows}
    same_triton = bool(table.triton == triton.__version__)

    def wanted(job: Job) -> bool:
        row = stated.get(job.row.name)
        if row is None:
            return same_triton
        return row.fixed or (same_triton and row.hash != job.row.hash)

    return [job for job in jobs if job.in_table and wanted(job)]


def unmatched(jobs: Sequence[Job], table: Table) -> list[str]:
    """Rows that are launched and not stated, or stated and no longer launched."""
    launched, stated = {job.row.name for job in jobs if job.in_table}, {row.name for row in table.rows}
    return [f"{name}: launched, but the table does not state it" for name in sorted(launched - stated)] + [
        f"{name}: stated in the table, but nothing launches it" for name in sorted(stated - launched)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if every compiled row is as stated, 1 if not, 2 if it cannot run here."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.update and (options.only or options.every):
        parser.error("--update writes the table's own rows, all of them; leave --only and --every out")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.stderr.write("error: TRITON_INTERPRET=1 interprets the kernels instead of compiling them; unset it\n")
        return 2
    started = time.monotonic()
    stated = aot_table.read(options.table) if options.table.exists() else Table(triton.__version__, ())
    same_triton = stated.triton == triton.__version__
    notes, problems, jobs = [], [], []
    for architecture in ARCHITECTURES:
        cases = list(all_cases(architecture))
        jobs += jobs_of(cases, architecture)
        problems += grid_problems(cases, architecture)
    if not CLUSTERS:
        notes.append(f"rows with clusters of blocks are left out: triton {triton.__version__} cannot compile them")
    if not same_triton:
        notes.append(
            f"the table was made with triton {stated.triton}; its figures are compared only for that version, and "
            f"triton {triton.__version__} is held to the rules on spills, atomics and shared memory"
        )
    of_table = [job for job in jobs if job.in_table]
    chosen = jobs if options.every else of_table if options.all or options.update else selected(jobs, stated)
    chosen = [job for job in chosen if options.only in job.row.name]
    if options.only and not chosen:
        parser.error(f"--only {options.only}: no row that would be compiled has this in its name; add --all or --every")
    rows, failed = _measure_all(chosen)
    problems += failed
    by_name = {row.name: row for row in stated.rows}
    if options.update:
        table = Table(triton.__version__, aot_table.updated(rows, stated))
        aot_table.write(table, options.table)
        by_name = {row.name: row for row in table.rows}
        same_triton = True
    elif same_triton and not options.only:
        problems += [f"{line}; run with --update and read the difference" for line in unmatched(jobs, stated)]
        # A row that was not compiled now must not have been stated with what no row may have.
        compiled = {row.name for row in rows}
        problems += [line for row in stated.rows if row.name not in compiled for line in problems_of(row, row, False)]
    problems += [line for row in rows for line in problems_of(row, by_name.get(row.name), same_triton)]
    _report(options.json, rows, len(chosen if options.every else of_table), notes, problems, time.monotonic() - started)
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ldm_kernels.common.aot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--all", action="store_true", help="compile every row, not only changed and fixed ones")
    parser.add_argument("--every", action="store_true", help="compile every binary, with a row or without")
    parser.add_argument("--update", action="store_true", help="compile every row and write the table")
    parser.add_argument("--only", default="", metavar="TEXT", help="of the rows to compile, those whose name has TEXT")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--table", type=Path, default=aot_table.TABLE, help="the table's file (default: the committed)")
    return parser


def _row_of(case: Case, compilation: Compilation) -> Row:
    launched: Launch = compilation.launch
    constants = " ".join(f"{name}={value}" for name, value in launched.constants.items())
    return Row(
        operation=case.shape.operation,
        direction=case.direction,
        kernel=compilation.kernel,
        architecture=compilation.architecture,
        dtype=str(case.dtype).removeprefix("torch."),
        case=case.name,
        calls=0,
        launch=f"warps={launched.num_warps} stages={launched.num_stages} {constants}",
        num_ctas=launched.num_ctas,
        hash=compilation.hash,
        figures=_NOT_COMPILED,
    )


def _measure_all(jobs: Sequence[Job]) -> tuple[list[Row], list[str]]:
    """Measured rows, and a line for each job that does not compile; progress goes to standard error."""
    rows: list[Row] = []
    failed: list[str] = []
    started = time.monotonic()
    for done, job in enumerate(jobs):
        spent = time.monotonic() - started
        left = f", about {spent / done * (len(jobs) - done):.0f} s left" if done else ""
        sys.stderr.write(f"[{done + 1}/{len(jobs)}{left}] {job.row.name}\n")
        try:
            rows.append(measure(job))
        except RuntimeError as error:
            failed.append(str(error))
    return rows, failed


def _report(
    as_json: bool, rows: Sequence[Row], num_jobs: int, notes: Sequence[str], problems: Sequence[str], seconds: float
) -> None:
    if as_json:
        result: dict[str, Any] = {
            "triton": triton.__version__,
            "compiled": len(rows),
            "rows": num_jobs,
            "seconds": round(seconds, 1),
            "notes": list(notes),
            "problems": list(problems),
        }
        sys.stdout.write(json.dumps(result) + "\n")
        return
    lines = [*(f"note: {note}" for note in notes), *(f"FAILED {problem}" for problem in problems)]
    verdict = f"{len(problems)} problems" if problems else "all as stated"
    lines.append(f"{len(rows)} of {num_jobs} rows compiled in {seconds:.0f} s: {verdict}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    # The switch changes which variant a shape takes; the table holds for it switched off, and has both variants' rows.
    os.environ.pop("LDM_KERNELS_CLUSTER", None)
    sys.exit(main())
