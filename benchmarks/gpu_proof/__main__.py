"""The proof of the kernels on a GPU, in one command and a fixed time.

    python -m benchmarks.gpu_proof [--out runs/gpu_proof] [--minutes 8] [--dry-run]

By priority: correctness (kernel tests, random shapes, memory checks), SD-2's shapes, SD-2's training step, the other
models' shapes for as long as there is time. Every piece is a process of its own with a time limit; when one fails the
rest still runs, and the summary says so first. Results: summary.md, results.csv, results.json, winners.json,
roofline.png, tests.txt.

Exit status 1 if anything failed, 2 without a GPU. --dry-run exercises the same path on the CPU with tiny shapes: what
it prints has no meaning.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu_proof import plan, summary
from benchmarks.gpu_proof.pieces import ROOT, Outcome, Piece, run_pieces

REPORT_S = 20.0  # kept for the report; the pieces end before


def main(argv: Sequence[str]) -> int:
    """0 if everything that ran passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_proof", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of everything")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: no meaning, no GPU needed")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("error: gpu-proof needs a CUDA device, and torch sees none (--dry-run does without)", file=sys.stderr)
        return 2
    begin_s = time.time()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_proof-") as folder:
        work = Path(folder)
        end_s = begin_s + 60 * arguments.minutes - (0 if arguments.dry_run else REPORT_S)
        phases = plan.phases(work, begin_s, end_s, arguments.dry_run)
        found = prove(phases, work, arguments.out, begin_s, arguments.dry_run)
        shutil.rmtree(work, ignore_errors=True)
    print((arguments.out / "summary.md").read_text())
    print(f"results in {arguments.out}, after {time.time() - begin_s:.0f} s")
    return 1 if found.failures else 0


def prove(
    phases: Sequence[plan.Phase], work: Path, out: Path, begin_s: float, dry_run: bool = False
) -> summary.Findings:
    """Runs the phases in order and writes the results after each, so that an interrupted proof leaves what it has."""
    outcomes: list[Outcome] = []
    pieces: list[Piece] = []

    def say(text: str) -> None:
        print(f"[{time.time() - begin_s:4.0f} s] {text}", flush=True)

    found = summary.find(pieces, outcomes, work, dry_run)
    for phase in phases:
        say(f"{phase.name}: {len(phase.pieces)} pieces, until {phase.until_s - begin_s:.0f} s at most")
        pieces += phase.pieces
        outcomes += run_pieces(phase.pieces, work, phase.parallel, phase.until_s, say)
        found = summary.find(pieces, outcomes, work, dry_run)
        try:
            summary.write(out, found, time.time() - begin_s)
        except Exception as error:  # the figures of a later phase matter more than an earlier report
            say(f"no report yet: {type(error).__name__}: {error}")
    summary.write(out, found, time.time() - begin_s)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
