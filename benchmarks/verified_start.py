"""What verifying a checkpoint costs the start that continues from it, the file's pages forgotten by the system.

One rank trains the demo's text experiment with 74M parameters in all until it has saved, and is killed. Then starts
take turns: as they are, and with a verification that takes every file for whole and reads none. The figure is the
median over rounds of the ratio of their times, from the process to the end of its first step. Goal: at most 1.05.

    OMP_NUM_THREADS=1 python -m benchmarks.verified_start [--rounds 10] [--folder DIR]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.checkpoint import forget
from benchmarks.measured import command_line, is_trial, parse, spread, write_results
from benchmarks.start import RESUMED, TOTAL, Run, make_inputs
from ldm_scale.__main__ import run_command
from ldm_scale.engine.rank_files import complete_folders

VERIFIED, UNVERIFIED = "verified", "unverified"
MODULES = {VERIFIED: "benchmarks.start_rank", UNVERIFIED: "benchmarks.unverified_rank"}
LARGE = (
    "unet.base_channels=128",
    "unet.channel_multipliers=[1,2,4]",
    "unet.num_res_blocks=2",
    "train.global_batch=4",
    "optimizer.warmup_images=4",
)
GOAL = 1.05


def main(argv: Sequence[str]) -> int:
    """0."""
    parser = command_line("A start with and without verification.", ["stage2"], "rounds", 10)
    parser.add_argument(
        "--folder", type=Path, help="where the run lies, on the disk that is meant (default: a temporary)"
    )
    arguments = parse(parser, argv)
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="start", dir=arguments.folder) as folder:
        make_inputs(Path(folder))
        run = Run(Path(folder), "stage2", 1, arguments.device, LARGE)
        run.until_saved()
        checkpoint = complete_folders(run.run_dir / "checkpoints")[-1]
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        starts: dict[str, list[dict[str, float]]] = {kind: [] for kind in MODULES}
        for turn in tqdm(range(arguments.rounds + 1), desc="starts", unit="round"):
            for kind in list(MODULES)[:: 1 if turn % 2 else -1]:
                forget(checkpoint)
                found = run.again(MODULES[kind])
                if turn:  # the first one warms the system's cache
                    starts[kind].append(found)
    results = summary(starts) | {"bytes": size}
    print(table(results))
    if not is_trial(arguments.rounds, "rounds"):
        write_results(arguments.out, "verified_start", torch.device(arguments.device), {"stage2": results})
    return 0


def summary(starts: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Seconds of both kinds of starts and of their parts, and the ratio of a start to the one beside it."""
    seconds = {
        kind: {part: spread([start[part] for start in found]) for part in found[0]} for kind, found in starts.items()
    }
    pairs = zip(starts[VERIFIED], starts[UNVERIFIED], strict=True)
    return {"seconds": seconds, "ratio": spread([one[TOTAL] / other[TOTAL] for one, other in pairs])}


def table(results: dict[str, Any]) -> str:
    """Lines of the two kinds, and the ratio."""
    lines = [
        f"{'checkpoint of ' + format(results['bytes'] / 2**30, '.2f') + ' GiB':<28}{'start s':>9}{RESUMED + ' s':>14}"
    ]
    for kind, parts in results["seconds"].items():
        lines.append(f"{kind:<28}{parts[TOTAL]['median']:>9.2f}{parts[RESUMED]['median']:>14.2f}")
    ratio = results["ratio"]
    quartiles = f"{ratio['lower_quartile']:.3f} .. {ratio['upper_quartile']:.3f}"
    return "\n".join([*lines, f"ratio {ratio['median']:.3f} ({quartiles}), goal {GOAL}"])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
