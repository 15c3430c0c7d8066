"""Both stages on OpenMoji at 128 px on one GPU, in calls that continue one another: captions to pictures.

    python -m benchmarks.gpu_demo [--out runs/gpu_demo] [--minutes 8] [--total-minutes 14] [--device cpu]

The first call trains the autoencoder, the second the diffusion model (`experiment=gpu_demo_autoencoder` and
`gpu_demo_text`); where one ends, by its time or by SIGTERM, the next goes on. Whatever the calls have come to is in
OUT/results, in files under 16 MB: grid.png, curves.png, report.json, report.md, and model/, the averaged weights in
float16, which `ldm_scale.load_diffusion` reads. Runs and checkpoints stay in OUT, where the next call looks for them.

Exit status 2 without a GPU. Shards are rendered beforehand; without them the command that does it is printed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu_demo import stages as training
from benchmarks.gpu_proof.pieces import ROOT
from ldm_scale.__main__ import run_command
from ldm_scale.config.compose import load_config
from ldm_scale.errors import ConfigError

REPORT_S = 50.0  # kept for the results, where there is something to show


def main(argv: Sequence[str]) -> int:
    """0 when everything has ended, or this call's time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_demo", help="folder of runs and results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of this call")
    parser.add_argument("--total-minutes", type=float, default=14.0, help="of all calls; decided by the first one")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it out, for hours")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("gpu-demo needs a CUDA device, and torch sees none (--device cpu does without, in hours)")
    stages = default_stages(arguments.out, arguments.device)
    training.require_inputs(stages)
    # As Ctrl-C: the training is asked to stop, and its checkpoint waited for.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return demonstrate(
        stages, arguments.out, 60 * arguments.minutes, 60 * arguments.total_minutes, training.run_process
    )


def default_stages(out: Path, device: str) -> list[training.Stage]:
    """The two experiments, in `out`."""
    first, second, on = out / "autoencoder", out / "text", f"train.device={device}"
    return [
        # The discriminator, which a third of stage 1 trains and feels, makes a step about half as long again.
        _stage("autoencoder", 1.2, "experiment=gpu_demo_autoencoder", f"run_dir={first}", on),
        _stage("text", 1.0, "experiment=gpu_demo_text", f"run_dir={second}", f"artifact={first / 'artifact'}", on),
    ]


def _stage(name: str, slowdown: float, *overrides: str) -> training.Stage:
    return training.Stage(name, load_config(overrides), overrides, slowdown)


def demonstrate(
    stages: Sequence[training.Stage], out: Path, call_s: float, total_s: float, launch: training.Launch
) -> int:
    """0; trains for this call's seconds and writes the results of the second stage, as far as it is."""
    begin_s = time.time()
    plan_path = out / training.PLAN
    # A call that begins with stage 1 is hardly the last one, and leaves the results to the next.
    reserve_s = REPORT_S if stages[0].result is not None else 0.0
    finished = training.train(stages, plan_path, total_s - REPORT_S, begin_s, begin_s + call_s - reserve_s, launch)
    plan = training.Plan.read(plan_path, total_s)
    told = training.described(plan.stages, stages)
    if finished or (reserve_s > 0 and stages[-1].has_checkpoint):
        # Only here: networks and matplotlib take seconds to import.
        from benchmarks.gpu_demo.results import write

        write(out / "results", stages, plan, finished)
        print((out / "results" / "report.md").read_text())
    else:
        print("no results yet")
    ended = "all is done" if finished else "call again to go on"
    print(f"{told}; {time.time() - begin_s:.0f} s in this call, {plan.used_s:.0f} s in all; {ended}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
