"""Images a second of one core, from shards on the local disk to batches of 64: ours and three others.

`pictures`: JPEGs of 512 px to 256 px in fp32, channels_last, all with our decoder. `latents`: moments of 8x32x32 in
half precision, 16 KiB, with captions. Each way is a process of its own that makes some batches in its turn. What counts
is CPU time, of all threads and loader processes, from the end of one turn to the end of the next, so that neither other
work on the machine nor batches made ahead flatter anybody; elapsed time of a turn, without its first batches, stands
in the file. `--workers 2`: with so many loader processes.

    pip install --no-deps torchdata mosaicml-streaming brotli cramjam python-snappy xxhash catalogue zstd
    OMP_NUM_THREADS=1 python -m benchmarks.loader [--case pictures] [--rounds 15] [--workers 0]
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.loader_cost import cost
from benchmarks.loader_ways import BATCH, INSTALL, NEEDED, prepare, ways
from benchmarks.measured import command_line, is_trial, parse, spread, write_results
from ldm_scale.__main__ import run_command

CASES = {"pictures": (2000, 8), "latents": (16384, 128)}  # samples, batches a turn
AHEAD = 3  # batches that a way may have made before its turn
WARMUP_ROUNDS = 2
BASELINE = "webdataset"


def main(argv: Sequence[str]) -> int:
    """0."""
    parser = command_line("Images a second of one core, from shards to batches.", CASES, "rounds", 15)
    parser.add_argument("--workers", type=int, default=0, help="loader processes (0)")
    arguments = parse(parser, argv)
    if arguments.device != "cpu":
        parser.error("--device cuda: batches are made on the CPU; leave --device out")
    torch.set_num_threads(1)
    missing = [package for package, module in NEEDED.items() if not find_spec(module)]
    if missing:
        print(f"without {' and '.join(missing)}, not installed: {INSTALL}")
    results = {}
    for case in arguments.case or CASES:
        with tempfile.TemporaryDirectory(prefix="loader") as folder:
            prepare(Path(folder), case, CASES[case][0])
            results[case] = measure(Path(folder), case, arguments.rounds, arguments.workers)
            if case == "pictures" and arguments.workers == 0:
                results[case]["cost"] = cost(Path(folder), results[case]["images_per_s"]["ours"]["median"])
    print(table(results))
    if not is_trial(arguments.rounds, "rounds"):
        packages = ["webdataset", "pillow", *(package for package in NEEDED if package not in missing)]
        written = {"versions": {package: version(package) for package in packages}, "cases": results}
        name = f"loader-{arguments.workers}workers" if arguments.workers else "loader"
        write_results(arguments.out, name, torch.device("cpu"), written)
    return 0


def measure(folder: Path, case: str, num_rounds: int, workers: int) -> dict[str, Any]:
    """Images a second of CPU time and of elapsed time of every way, and how often webdataset's they are."""
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Any] = {}
    processes = []
    for name in ways(case):
        ends[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, folder, case, name, workers)))
        processes[-1].start()
    num_batches = CASES[case][1]
    cpu: dict[str, list[float]] = {name: [] for name in ends}
    elapsed: dict[str, list[float]] = {name: [] for name in ends}
    try:
        for turn in range(WARMUP_ROUNDS + num_rounds):
            for name, end in ends.items():
                end.send(num_batches)
                cpu_s, elapsed_s = end.recv()
                if turn >= WARMUP_ROUNDS:
                    cpu[name].append(BATCH * (num_batches + AHEAD) / cpu_s)
                    elapsed[name].append(BATCH * num_batches / elapsed_s)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return {
        "workers": workers,
        "images_a_turn": BATCH * (num_batches + AHEAD),
        "images_per_s": {name: spread(values) for name, values in cpu.items()},
        "over_webdataset": {
            name: spread([a / b for a, b in zip(values, cpu[BASELINE], strict=True)]) for name, values in cpu.items()
        },
        "elapsed_images_per_s": {name: spread(values) for name, values in elapsed.items()},
    }


def serve(connection: Connection, folder: Path, case: str, name: str, workers: int) -> None:
    """Nothing; makes batches when asked to, and answers with the CPU time since the last answer and the elapsed time.

    CPU time is the process's and its children's.
    """
    torch.set_num_threads(1)
    batches = ways(case)[name](folder, workers)
    spent = 0.0
    with suppress(EOFError):
        while True:
            num_batches = connection.recv()
            for _ in range(AHEAD):
                next(batches)
            began = time.perf_counter()
            for _ in range(num_batches):
                array, captions = next(batches)
                assert len(array) == len(captions) == BATCH, (array.shape, len(captions))
            elapsed = time.perf_counter() - began
            before, spent = spent, _cpu_s()
            connection.send((spent - before, elapsed))


def _cpu_s() -> float:
    """CPU time of this process and its children so far."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def table(results: dict[str, Any]) -> str:
    """A line per case and way."""
    lines = [f"{'':<40}{'images/s/core':>14}{'quartiles':>20}{'x webdataset':>14}"]
    for case, result in results.items():
        for name, rates in result["images_per_s"].items():
            lines.append(
                f"{case + ', ' + name:<40}{rates['median']:>14.0f}"
                f"{rates['lower_quartile']:>10.0f}..{rates['upper_quartile']:<8.0f}"
                f"{result['over_webdataset'][name]['median']:>14.3f}"
            )
        for name, share in result.get("cost", {}).get("share_of_image", {}).items():
            lines.append(f"{'of an image: ' + name:<40}{100 * share:>13.2f}%")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
