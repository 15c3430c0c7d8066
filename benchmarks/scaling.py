"""Weak and strong scaling of the training step over ranks, by ZeRO stage: images/s a rank, efficiency, communication.

Weak: every rank has the case's batch, so that N ranks train N times as many images a step. Strong: the case's batch is
divided among the ranks. Efficiency is images/s per rank over those of the fewest ranks measured. A step is forward, eps
loss, backward and AdamW under ZeRO; the loader is left out. Strong scaling trains the same images on any number of
ranks: losses before and after an update are compared with those of the fewest ranks, and a setting whose losses differ
gets no efficiency.

Communication is counted in profiled steps beside the timed ones: the share of their time in which a collective was
under way, on rank 0. That includes waiting for the slower ranks and, where ZeRO overlaps it with the backward pass
(CUDA), time that training does not wait for.

    python -m benchmarks.scaling [--ranks 1 --ranks 2] [--stage 1] [--case demo] [--turns 3]     # on this host

starts processes for each number of ranks in turns, in the reversed order in every other one. On a cluster the launcher
starts the ranks, once for each number of them, and the files are joined afterwards:

    srun ... python -m benchmarks.scaling --measure --device cuda --case mid --out DIR       # or torchrun
    python -m benchmarks.scaling --join DIR/scaling-ranks-*.json

More ranks than cores or GPUs share them: on a host of two cores four ranks cannot be faster than two, and the figure
says what sharing costs, not how training scales.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Way, take_turns
from benchmarks.measured import RESULTS, at_least_two, environment, make_folder, wall_clock, write_results
from benchmarks.scaling_report import draw, report, table
from benchmarks.step_sweeps import first_losses, sharded, train_sharded
from benchmarks.step_ways import cast, network, rows
from benchmarks.unet_step import Batch, Case, cases, random_batch
from ldm_scale.__main__ import run_command
from ldm_scale.config.schema import TrainConfig
from ldm_scale.engine import env

WARMUP_STEPS, PROFILED_STEPS = 2, 2
MIN_TURNS = 3  # what is written has a range
STEPS = 8  # timed ones of a turn
MODES = ("weak", "strong")
MEASURED = {"case", "unet", "ranks", "hosts", "cores_of_the_host", "device", "environment", "rows"}
COLLECTIVES = ("gloo:", "ncclDevKernel", "ncclKernel")  # how the profiler names them


def main(argv: Sequence[str]) -> int:
    """0; 1 if ranks that were started here failed."""
    arguments = parsed(argv)
    stages = arguments.stage or [0, 1, 2, 3]
    if arguments.join:
        finish(arguments.join, arguments.out)
    elif arguments.measure:
        name = arguments.case or "demo"
        here = env.start(env.read_launch(), TrainConfig(device=arguments.device))
        torch.set_num_threads(1)  # whatever the number of ranks: a run would share the host's cores among them
        found = measure(cases()[name], here, stages, arguments.steps, name)
        if here.is_main:
            arguments.out.mkdir(parents=True, exist_ok=True)
            path = arguments.out / f"scaling-ranks-{here.world_size}.json"
            path.write_text(json.dumps(found, indent=2) + "\n")
        env.stop()
    else:
        try:
            finish(turns_here(arguments, stages), arguments.out)
        except subprocess.CalledProcessError as error:
            print(f"error: the ranks ended with {error.returncode}; why is said above", file=sys.stderr)
            return 1
    return 0


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; ends the process where they do not go together."""
    parser = argparse.ArgumentParser(description="Weak and strong scaling over ranks.")
    parser.add_argument("--ranks", type=int, action="append", help="a number of ranks; may be repeated (1, 2, 4)")
    parser.add_argument("--stage", type=int, action="append", choices=range(4), help="of ZeRO; default: all")
    parser.add_argument("--case", choices=tuple(cases()), help="a UNet of unet_step (demo)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=at_least_two, default=STEPS, help=f"timed ones of a turn ({STEPS})")
    parser.add_argument("--turns", type=int, default=3, help="times that each number of ranks is started (3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files")
    parser.add_argument("--measure", action="store_true", help="this process is a rank, which a launcher started")
    parser.add_argument("--join", type=Path, nargs="+", metavar="FILE", help="files of --measure, of any ranks")
    arguments = parser.parse_args(argv)
    if arguments.turns < 1 or min(arguments.ranks or (1,)) < 1:
        parser.error("--turns and --ranks: must be at least 1")
    if arguments.join:
        arguments.join = [_measured(parser, path) for path in arguments.join]
    make_folder(arguments.out)
    if arguments.measure and arguments.join:
        parser.error("--measure and --join: the first makes the files that the second takes; give one")
    if arguments.device == "cuda" and not arguments.join and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return arguments


def _measured(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """What --measure wrote there; ends the process where it did not."""
    try:
        found: Any = json.loads(path.read_text())
        if not found.keys() >= MEASURED:
            raise ValueError("no such file of ranks")
    except (OSError, ValueError, AttributeError):
        parser.error(f"--join {path}: is not there or not of --measure; give files scaling-ranks-*.json")
    return dict(found)


def turns_here(arguments: argparse.Namespace, stages: Sequence[int]) -> list[dict[str, Any]]:
    """What the ranks of every turn measured, in processes of their own on this host."""
    found: list[dict[str, Any]] = []

    def run(ranks: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command += ["-m", "benchmarks.scaling", "--measure", "--out", folder, "--device", arguments.device]
            command += ["--case", arguments.case or "demo", "--steps", str(arguments.steps)]
            command += [part for stage in stages for part in ("--stage", str(stage))]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            found.append(json.loads((Path(folder) / f"scaling-ranks-{ranks}.json").read_text()))

    ways = {f"{ranks} rank(s)": Way(partial(run, ranks)) for ranks in sorted(set(arguments.ranks or (1, 2, 4)))}
    take_turns(ways, arguments.turns, warmup=0, clock=time.perf_counter, name="scaling", unit="turn")
    return found


def measure(case: Case, here: env.Environment, stages: Sequence[int], steps: int, name: str) -> dict[str, Any]:
    """Seconds, losses and shares of communication at this number of ranks. Collective: all ranks."""
    ranks, clock = here.world_size, wall_clock(here.device)
    batches = {"weak": part_of_rank(case, case.batch * ranks, here)}
    if case.batch % ranks == 0:
        batches["strong"] = part_of_rank(case, case.batch, here)
    found = []
    for stage in stages:
        model = sharded(network(case, here.device), stage, case.batch, here)
        # Before all other steps: from the weights as they were made.
        losses = {mode: first_losses(model, batch).tolist() for mode, batch in batches.items() if mode == "strong"}
        ways = {mode: Way(partial(train_sharded, model, batch)) for mode, batch in batches.items()}
        label = f"{name}: {ranks} rank(s), ZeRO {stage}"
        turns = take_turns(ways, steps, warmup=WARMUP_STEPS, clock=clock, name=label, shows=here.is_main)
        for mode, batch in batches.items():
            step = partial(train_sharded, model, batch)
            found.append(
                {
                    "stage": stage,
                    "mode": mode,
                    "images": len(batch.t) * ranks,
                    "step_s": turns.seconds[mode],
                    "communication_share": communication_share(step, clock),
                    "losses": losses.get(mode),
                }
            )
    return {
        "case": name,
        "unet": asdict(case),
        "ranks": ranks,
        "hosts": len({place.host for place in here.meeting.places}) if here.meeting else 1,
        "cores_of_the_host": len(os.sched_getaffinity(0)),
        "device": here.device.type,
        "environment": environment(here.device, time.strftime("%Y-%m-%d", time.gmtime())),
        "rows": found,
    }


def part_of_rank(case: Case, images: int, here: env.Environment) -> Batch:
    """This rank's part of a batch that is the same for any number of ranks."""
    whole, share = random_batch(replace(case, batch=images), here.device), images // here.world_size
    return cast(rows(whole, slice(here.rank * share, (here.rank + 1) * share)), here.dtype)


def communication_share(step: Callable[[], Any], clock: Callable[[], float]) -> float:
    """The share of a few steps' time in which a collective was under way. Collective: all ranks."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        begin_s = clock()
        for _ in range(PROFILED_STEPS):
            step()
        spent_s = clock() - begin_s
    under_way = [(e.time_range.start, e.time_range.end) for e in profiler.events() if e.name.startswith(COLLECTIVES)]
    return covered(under_way) / 1e6 / spent_s  # the profiler counts microseconds


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of what lies in at least one of the intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def finish(found: Sequence[dict[str, Any]], out: Path) -> None:
    """Nothing; the table is printed, and from MIN_TURNS turns on JSON and picture are written."""
    results = report(found)
    print(table(results))
    if min(len(row["turn_s"]) for row in results["rows"]) < MIN_TURNS:
        print(f"a trial: fewer than {MIN_TURNS} turns, nothing written")
        return
    path = write_results(out, "scaling", torch.device(found[0]["device"]), results)
    draw(results, path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
