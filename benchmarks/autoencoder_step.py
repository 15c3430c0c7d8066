"""Memory and speed of a stage-1 training step with the discriminator on, with and without activation checkpointing.

A step is the trainer's own (`AutoencoderTask.accumulate` and `update`, on one rank): both networks' passes, all losses,
both optimizers, on random smooth images; data loading is not part of it. Each setting runs in a fresh process, whose
peak of resident memory is read at its end; what it held before the first step is given beside it.

    python -m benchmarks.autoencoder_step [--experiment openmoji_kl_f8_small] [--resolution 64] [--steps 10]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import Way, take_turns
from benchmarks.measured import RESULTS, set_threads, write_results
from ldm_scale.__main__ import run_command
from ldm_scale.config.compose import load_config
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Recomputation
from ldm_scale.data import Batch
from ldm_scale.engine import env

WARMUP_STEPS = 2
EXPERIMENTS = ("openmoji_kl_f4_small", "openmoji_kl_f8_small", "openmoji_vq_f4_small")
MARK = "result: "


def main(argv: Sequence[str]) -> int:
    """0."""
    parser = argparse.ArgumentParser(description="A stage-1 training step's memory and speed.")
    parser.add_argument("--experiment", action="append", help=f"default: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), help="one setting, in this process")
    arguments = parser.parse_args(argv)
    experiments = arguments.experiment or list(EXPERIMENTS)
    if arguments.checkpointing is not None:
        result = measure(experiments[0], arguments.resolution, arguments.checkpointing, arguments.steps)
        print(MARK + json.dumps(result))
        return 0
    results: dict[str, Any] = {}
    for experiment in experiments:
        results[experiment] = {}
        for name, checkpointing in (("plain", "none"), ("checkpointing", "full")):
            command = [sys.executable, "-m", "benchmarks.autoencoder_step", "--experiment", experiment]
            command += ["--resolution", str(arguments.resolution), "--steps", str(arguments.steps)]
            output = subprocess.run(
                [*command, "--checkpointing", checkpointing], stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            line = next(line for line in output.splitlines() if line.startswith(MARK))
            results[experiment][name] = json.loads(line.removeprefix(MARK))
    print(table(results))
    set_threads(torch.device("cpu"))
    write_results(arguments.out, "autoencoder_step", torch.device("cpu"), results)
    return 0


def measure(experiment: str, resolution: int, checkpointing: Recomputation, num_steps: int) -> dict[str, Any]:
    """Step times and memory of an experiment's networks, far enough into it that the discriminator is felt."""
    from ldm_scale.training.autoencoder_step import AutoencoderTask  # imports DeepSpeed, which prints

    config = load_config([f"experiment={experiment}", "data.manifest=unused", f"data.resolution={resolution}"])
    config = replace(config, train=replace(config.train, activation_checkpointing=checkpointing))
    launch = env.read_launch()
    here = env.start(launch, config.train)
    set_threads(here.device)
    task = AutoencoderTask(config, batch_plan(config, launch.world_size), here)
    held_gib = _peak_gib()
    # Past its start, its ramp and any pretraining.
    images = config.autoencoder_loss.discriminator_start_images + config.autoencoder_loss.adversarial_ramp_images
    batches: list[Batch] = []
    metrics: dict[str, Any] = {}

    @contextmanager
    def new_batch() -> Iterator[None]:
        nonlocal images
        seed = images // task.plan.global_batch
        batches[:] = [_batch(resolution, task.plan.micro_batch, images, seed)] * task.plan.accumulation_steps
        yield
        assert "loss/generator" in metrics, "the generator feels the discriminator in every step that is timed"
        images += task.plan.global_batch

    def train() -> None:
        nonlocal metrics
        metrics = task.accumulate(batches, images)
        task.update(images)

    name = f"{experiment} checkpointing={checkpointing}"
    ways = {"step": Way(train, around=new_batch)}
    turns = take_turns(ways, num_steps, warmup=WARMUP_STEPS, clock=time.process_time, name=name, unit="step")
    step_s = turns.spreads()["step"]
    env.stop()
    return {
        "resolution": resolution,
        "batch": task.plan.global_batch,
        "threads": torch.get_num_threads(),
        "clock": "process time",
        "step_s": step_s,
        "images_per_s": task.plan.global_batch / step_s["median"],
        "peak_mem_gib": _peak_gib(),
        "peak_mem_gib_before_the_first_step": held_gib,
    }


def table(results: dict[str, Any]) -> str:
    """A line per experiment and setting."""
    lines = [f"{'training step with GAN':<40}{'images/s':>10}{'peak GiB':>10}{'of the step':>13}"]
    for experiment, settings in results.items():
        for name, result in settings.items():
            peak = result["peak_mem_gib"]
            step = peak - result["peak_mem_gib_before_the_first_step"]
            lines.append(f"{experiment + ', ' + name:<40}{result['images_per_s']:>10.2f}{peak:>10.2f}{step:>13.2f}")
    return "\n".join(lines)


def _batch(resolution: int, count: int, first_number: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    return Batch(
        images=F.interpolate(coarse, size=resolution, mode="bilinear"),
        captions=[""] * count,
        classes=torch.full((count,), -1),
        keys=["random"] * count,
        image_numbers=torch.arange(count) + first_number,
        bad=[],
    )


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
