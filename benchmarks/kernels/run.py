"""Times of every implementation of every fused operation, at the shapes of the models.

    python benchmarks/kernels/run.py [--op geglu] [--model sd2-64] [--batch 8] [--dtype bf16] [--out DIR]

Needs a GPU, except with --dry-run: tiny shapes on the CPU, which exercises the code and measures nothing. An
interrupted or crashed run goes on when the same command is given again; --fresh begins anew.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", default=[], help="operation, cross_attention by itself (default: all)")
    parser.add_argument("--model", action="append", default=[], help="prefix, such as sd2-64, kl_f8 (default: all)")
    parser.add_argument("--batch", action="append", type=int, help="default: 8 and 32")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kernels", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this time and list what is left")
    parser.add_argument("--stop-at", type=float, default=math.inf, help="stop then at the latest, in Unix time")
    parser.add_argument("--max-autotune", action="store_true", help="torch.compile's slow mode instead of its default")
    parser.add_argument("--fresh", action="store_true", help="forget the results that --out has")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: no meaning, no GPU needed")
    parser.add_argument("--check-only", action="store_true", help="compare with float64, and time nothing")
    parser.add_argument("--no-report", action="store_true", help="leave the results in the journal alone")
    parser.add_argument("--share", default="1/1", help="I/N: every N-th case, from the I-th on")
    parser.add_argument("--avoid", action="append", type=Path, default=[], help="leave out what crashed in that --out")
    parser.add_argument("--memory-share", type=float, default=1.0, help="of the GPU's memory, at most this share")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """0; 1 if a kernel of ours was wrong or failed; 2 without a GPU; 75 after a device fault (start again)."""
    arguments = parse(argv)
    # Run by its path, this file sees its own folder, whose names are nobody else's business.
    sys.path[0:1] = [str(ROOT), str(ROOT / "kernels")]
    import torch

    from benchmarks.kernels import device, report, sweep
    from benchmarks.kernels.harness import Options
    from benchmarks.kernels.timing import make_clock

    if not arguments.dry_run and not torch.cuda.is_available():
        print(
            "error: the kernel benchmarks need a CUDA device; --dry-run does without and means nothing", file=sys.stderr
        )
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "journal.jsonl"
    if arguments.fresh:
        path.unlink(missing_ok=True)
    target = torch.device("cpu" if arguments.dry_run else "cuda")
    if arguments.memory_share < 1 and target.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(arguments.memory_share)
    dtype = torch.float32 if arguments.dry_run else getattr(torch, DTYPES[arguments.dtype])
    batches = [2] if arguments.dry_run else arguments.batch or [8, 32]
    chosen = sweep.cases(arguments.model, batches, dtype, arguments.op, tiny=arguments.dry_run)
    first, every = (int(part) for part in arguments.share.split("/"))
    seconds = 0.0 if arguments.check_only else 0.0005 if arguments.dry_run else 0.03
    options = Options(target, make_clock(target), seconds, arguments.max_autotune)
    journal = sweep.Journal(path)
    for folder in arguments.avoid:
        journal.avoid(sweep.Journal(folder / path.name))
    deadline_s = min(time.time() + 60 * arguments.minutes, arguments.stop_at)
    if not sweep.run(chosen[first - 1 :: every], options, journal, deadline_s):
        # The interpreter's own shutdown could wait for the lost device.
        sys.stdout.flush()
        os._exit(sweep.EXIT_DEVICE_FAULT)
    red = report.red_by_rows(journal.rows)
    if not (arguments.check_only or arguments.no_report):
        mark = report.DRY_RUN if arguments.dry_run else ""
        found, measured = device.environment(target), device.ceilings(target)
        print(report.write_all(arguments.out, journal.rows, red, found, measured, mark))
        if journal.unreached:
            print("Not reached:\n" + "\n".join(f"- {name}" for name in journal.unreached))
    given_up = any(row.implementation == sweep.ALL and row.status == "failed" for row in journal.rows)
    return 1 if red or report.failed_variants(journal.rows) or given_up or journal.crashes() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
