"""The rule for loss spikes on a real training: alarms in clean steps, and which bad batches it finds.

The training is the configured one, on one rank. `--bad N` spoils the batches of N steps, spread evenly over the last
four fifths, by the kinds of `kinds` in turn. Every other step is clean, and an alarm in one is a false alarm. How far
each step lies above the median is kept whether or not it is a spike, so that the result tells how close the rule was
to a false alarm, and to a miss.

    python -m benchmarks.spikes --name clean --out DIR experiment=demo_text train.total_images=32000
    python -m benchmarks.spikes --name bad --bad 10 --out DIR experiment=demo_text train.total_images=32000 \
        spikes.action=skip run_dir=runs/spikes_bad
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.measured import environment
from ldm_scale.__main__ import run_command
from ldm_scale.config.compose import load_config
from ldm_scale.config.schema import Config, SpikesConfig
from ldm_scale.config.validate import validate
from ldm_scale.data import Batch
from ldm_scale.engine import env
from ldm_scale.engine.spikes import Spike, SpikeHistory, judge
from ldm_scale.operations.train import train
from ldm_scale.training import skipping
from ldm_scale.training.autoencoder_step import AutoencoderTask
from ldm_scale.training.diffusion_step import DiffusionTask
from ldm_scale.training.task import Task

CLEAN_SHARE = 0.2  # of the run, before the first bad batch
Pixels = Callable[[Tensor], Tensor]


@dataclass
class Step:
    """What the rule said of a step."""

    step: int
    deviations: float | None  # robust, above the median; None before there is something to compare with
    is_spike: bool
    bad: str | None  # how its batch was spoilt


def main(argv: Sequence[str]) -> int:
    """0, after OUT/NAME.json is written."""
    parser = argparse.ArgumentParser(description="False alarms and finds of the rule for loss spikes.")
    parser.add_argument("overrides", nargs="+", metavar="key=value", help="such as experiment=demo_text")
    parser.add_argument("--bad", type=int, default=0, help="steps whose batch is spoilt (0)")
    parser.add_argument("--name", required=True, help="of the JSON file")
    parser.add_argument("--out", type=Path, required=True, help="its folder")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.overrides)
    validate(config, world_size=1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = summary(config, measure(config, arguments.bad))
    where = environment(torch.device("cpu"), datetime.now(UTC).date().isoformat())
    document = {"command": ["benchmarks.spikes", *argv], "environment": where} | report
    (arguments.out / f"{arguments.name}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(table(report))
    return 0


def measure(config: Config, num_bad: int) -> list[Step]:
    """What the rule said of each step of the training, which runs here on one rank until it ends or is told to."""
    num_steps = config.train.total_images // config.train.global_batch
    steps: list[Step] = []
    names = list(kinds(config.stage))
    begin = CLEAN_SHARE * num_steps
    places = [int(begin + (i + 0.5) * (num_steps - begin) / num_bad) for i in range(num_bad)]
    planned = {step: names[i % len(names)] for i, step in enumerate(places)}
    task_type = AutoencoderTask if config.stage == "autoencoder" else DiffusionTask
    accumulate = task_type.accumulate

    def spoiling(task: Any, batches: Sequence[Batch], images: int) -> dict[str, Tensor]:
        kind = planned.get(images // config.train.global_batch)
        if kind is None:
            return accumulate(task, batches, images)
        with kinds(config.stage)[kind](task, batches) as spoilt:
            return accumulate(task, spoilt, images)

    def noting(rule: SpikesConfig, history: SpikeHistory, loss: float, totals: Sequence[float]) -> Spike | None:
        # A rule that finds every step remarkable tells by how much; on a copy, for the history takes in what it sees.
        anything = judge(replace(rule, factor=-1e9), copy.deepcopy(history), loss, totals)
        spike = judge(rule, history, loss, totals)
        far = None if anything is None else anything.deviations
        steps.append(Step(len(steps), far, spike is not None, planned.get(len(steps))))
        return spike

    with mock.patch.object(task_type, "accumulate", spoiling), mock.patch.object(skipping, "judge", noting):
        if not train(config, env.read_launch()):
            print(f"stopped: the figures are those of {len(steps)} steps")
    return steps


def kinds(stage: str) -> dict[str, Callable[[Task, Sequence[Batch]], Any]]:
    """How a batch may be bad, by name: contexts that are given the task and the batches, and give the spoilt ones."""
    noise = torch.Generator().manual_seed(1)
    ways = {
        "pixels from 0 to 255": _pixels(lambda x: (x + 1) * 127.5),
        "random pixels": _pixels(lambda x: torch.rand(x.shape, generator=noise) * 2 - 1),
        "all pixels 3": _pixels(lambda x: torch.full_like(x, 3.0)),
    }
    if stage == "diffusion":
        ways |= {"another image's noise": _other_noise, "another image's caption": _other_captions}
    return ways


def summary(config: Config, steps: Sequence[Step]) -> dict[str, Any]:
    """Counts, and the deviations of clean and of bad steps."""
    clean = [step for step in steps if step.bad is None]
    known = sorted(step.deviations for step in clean if step.deviations is not None)
    bad = [step for step in steps if step.bad is not None]
    return {
        "experiment": config.experiment,
        "stage": config.stage,
        "seed": config.train.seed,
        "global_batch": config.train.global_batch,
        "spikes": asdict(config.spikes),
        "steps": len(steps),
        "clean_steps_judged": len(known),
        "false_alarms": [asdict(step) for step in clean if step.is_spike],
        "deviations_of_clean_steps": {
            "median": known[len(known) // 2],
            "99%": known[int(0.99 * len(known))],
            "max": known[-1],
        },
        "bad_batches": [asdict(step) for step in bad],
        "bad_batches_found": sum(step.is_spike for step in bad),
    }


def table(report: dict[str, Any]) -> str:
    """Lines for people."""
    far = report["deviations_of_clean_steps"]
    lines = [
        f"{report['experiment']}, seed {report['seed']}: {report['steps']} steps of {report['global_batch']} images, "
        f"{report['clean_steps_judged']} clean ones judged, {len(report['false_alarms'])} false alarms; the farthest "
        f"clean step lies {far['max']:.1f} robust deviations above the median (99%: {far['99%']:.1f}; "
        f"a spike: above {report['spikes']['factor']:g})"
    ]
    for step in report["bad_batches"]:
        said = "found" if step["is_spike"] else "not found"
        lines.append(f"  step {step['step']:>6} {step['bad']:<26}{step['deviations']:>8.1f}  {said}")
    if report["bad_batches"]:
        lines.append(f"found: {report['bad_batches_found']} of {len(report['bad_batches'])} bad batches")
    return "\n".join(lines)


def _pixels(change: Pixels) -> Callable[[Task, Sequence[Batch]], Any]:
    @contextmanager
    def spoil(task: Task, batches: Sequence[Batch]) -> Iterator[Sequence[Batch]]:
        yield [replace(batch, images=change(batch.images)) for batch in batches]

    return spoil


@contextmanager
def _other_captions(task: Task, batches: Sequence[Batch]) -> Iterator[Sequence[Batch]]:
    yield [replace(batch, captions=[*batch.captions[1:], batch.captions[0]]) for batch in batches]


@contextmanager
def _other_noise(task: Task, batches: Sequence[Batch]) -> Iterator[Sequence[Batch]]:
    """The noise that is added is not the one that the network's output is compared with."""
    assert isinstance(task, DiffusionTask)
    add_noise = task.process.add_noise

    def other(z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return add_noise(z, noise.roll(1, dims=0), t)

    with mock.patch.object(task.process, "add_noise", other):
        yield batches


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
