"""What a whole training step of stage 2 costs over the bare one: everything on but validation, on the same network.

Bare is forward, eps loss, backward and AdamW under ZeRO, with noise and times drawn where the network is. Everything
is what the trainer does with a batch of cached latents: captions or classes prepared, a random stream for each image
number, stratified times, conditioning dropped, the loss per image, metrics reduced over the ranks and refused if not
finite, the update of the exponential average. The loader and TensorBoard are left out of both. Steps take turns (bare,
everything, everything, bare, ...), and the result is the median over pairs of their times' ratio; goal: at most 1.03.

The comparison of the ranks comes between steps, every `train.check_ranks_every_images`; it is timed alone and added as
its share of a step. One rank has nobody to compare with: start two for it.

    python -m benchmarks.train_step [--device cuda] [--case demo] [--stage 1] [--pairs 20]
    torchrun --nproc-per-node 2 -m benchmarks.train_step --case demo

On one CPU thread the clock is the process's own time.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import unet_step
from benchmarks.harness import Way, take_turns
from benchmarks.measured import command_line, is_trial, parse, set_threads, spread, step_clock, write_results
from ldm_scale.__main__ import run_command
from ldm_scale.config.compose import load_config
from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import AutoencoderConfig, ClassConditioningConfig, ConditioningConfig, Config, ZeroConfig
from ldm_scale.data import Batch
from ldm_scale.data.batch import join
from ldm_scale.engine import collectives, env
from ldm_scale.engine.health import RankBatch, check_ranks
from ldm_scale.errors import NumericsError
from ldm_scale.interchange.artifact import write_artifact
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.models.build import build_autoencoder, build_seeded
from ldm_scale.training.diffusion_step import DiffusionTask
from ldm_scale.training.skipping import StepGuard
from ldm_scale.training.state import TrainingState

GOAL = 1.03
WARMUP_PAIRS = 3
CHECKS = 5  # comparisons of the ranks that are timed
CAPTIONS = ("a red square on the left", "two green circles", "a small blue triangle", "nothing at all")

Clock = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """A model and the shape of the latents that it trains on; the configuration has everything on."""

    config: Config
    latent_channels: int
    latent_side: int


def cases() -> dict[str, Case]:
    """What is measured, by name: the models of `unet_step`, conditioned."""
    demo = load_config(["experiment=demo_text"])
    demo = replace(demo, diffusion=replace(demo.diffusion, stratified_times=True))
    ldm8 = unet_step.cases()["ldm8"]
    assert ldm8.context_width is not None, "classes are a context"
    classes = ConditioningConfig(classes=ClassConditioningConfig(width=ldm8.context_width))
    return {
        "demo": Case(
            demo,
            demo.autoencoder.latent_channels,
            demo.data.resolution // demo.autoencoder.downsampling_factor,
        ),
        "ldm8": Case(
            replace(demo, unet=ldm8.unet, conditioning=classes, train=replace(demo.train, global_batch=ldm8.batch)),
            ldm8.latent_channels,
            ldm8.latent_side,
        ),
    }


def main(argv: Sequence[str]) -> int:
    """0; whether the goal is reached is said, and is for a person to judge by the spread."""
    parser = command_line("A whole training step against the bare one.", cases(), "pairs", 20)
    parser.add_argument("--stage", type=int, choices=range(4), default=1, help="of ZeRO")
    arguments = parse(parser, argv)
    train = replace(cases()["demo"].config.train, device=arguments.device)
    here = env.start(env.read_launch(), train)
    set_threads(here.device, here.launch.local_world_size)
    results: dict[str, Any] = {}
    for name in arguments.case or cases():
        case = cases()[name]
        results[name] = measure(case, here, arguments.stage, arguments.pairs, name)
    if here.is_main:
        print(table(results))
        if not is_trial(arguments.pairs, "pairs"):
            write_results(arguments.out, "train_step", here.device, results)
    env.stop()
    return 0


def measure(case: Case, here: env.Environment, stage: int, num_pairs: int, name: str) -> dict[str, Any]:
    """Times and ratios of a case. Collective: all ranks."""
    with prepared(case, here, stage) as steps:
        return _measure(steps, num_pairs, name)


@contextmanager
def prepared(case: Case, here: env.Environment, stage: int) -> Iterator[Steps]:
    """The two steps, on latents that a batch brings along as a cache does. Collective: all ranks."""
    # Of an autoencoder that is hardly one: its own networks are never asked.
    latents = AutoencoderConfig(
        kind="kl",
        base_channels=1,
        channel_multipliers=(1,),
        num_res_blocks=1,
        latent_channels=case.latent_channels,
        norm_groups=1,
        mid_attention=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        state = build_seeded(lambda: build_autoencoder(latents), seed=0).state_dict()
        write_artifact(
            artifact, dict(state), latents, LatentStatistics(posterior="mode"), {"resolution": case.latent_side}
        )
        config = replace(
            case.config,
            artifact=str(artifact),
            autoencoder=latents,
            zero=ZeroConfig(stage=stage),
            data=replace(case.config.data, resolution=case.latent_side),
            latents=replace(case.config.latents, sample_posterior=False),
        )
        task = DiffusionTask(config, batch_plan(config, here.world_size), here)
        yield Steps(task, random_batch(task))


def _measure(steps: Steps, num_pairs: int, name: str) -> dict[str, Any]:
    task, here = steps.task, steps.task.environment
    config = task.config
    clock = step_clock(here.device, here.world_size)
    ways = {"bare": Way(steps.bare), "everything": Way(steps.everything)}
    shown = here.is_main
    turns = take_turns(ways, num_pairs, warmup=WARMUP_PAIRS, clock=clock, name=name, unit="pair", shows=shown)
    check = {"check": Way(steps.compare_ranks)}
    checks = take_turns(check, CHECKS, warmup=1, clock=clock, name=f"{name} ranks compared", shows=shown)
    check_s = checks.spreads()["check"]["median"]
    ratio, step_s = spread(turns.ratios("everything", "bare")), turns.spreads()
    every = config.train.check_ranks_every_images
    share = check_s * task.plan.global_batch / every / step_s["bare"]["median"]
    return {
        "parameters": sum(parameter.numel() for parameter in task.network.parameters()),
        "config": config_to_dict(config),
        "ranks": here.world_size,
        "pairs": num_pairs,
        "clock": "process time" if clock is time.process_time else "wall time",
        "step_s": step_s,
        "ratio_to_bare": ratio,
        "check_ranks_s": check_s,
        "check_ranks_share_of_step": share,
        "overall_ratio": ratio["median"] + share,
    }


def random_batch(task: DiffusionTask) -> Batch:
    """This rank's part of a global batch of random latents, each with a caption and a class; pinned as loaded ones."""
    plan, rank = task.plan, task.environment.rank
    generator = torch.Generator().manual_seed(1 + rank)
    first = rank * plan.micro_batch
    count, kinds = plan.micro_batch, task.config.conditioning.classes
    channels, *sides = task.latent_shape
    batch = Batch(
        images=torch.empty(0, 3, task.config.data.resolution, task.config.data.resolution),
        captions=[CAPTIONS[i % len(CAPTIONS)] for i in range(count)],
        classes=torch.arange(count) % (kinds.num_classes if kinds else 1),
        keys=[f"{rank}/{i}" for i in range(count)],
        image_numbers=torch.arange(first, first + count),
        bad=[],
        moments=torch.randn(count, 2 * channels, *sides, generator=generator),  # means and log-variances
        cached=torch.ones(count, dtype=torch.bool),
    )
    return join([batch], pin=task.environment.device.type == "cuda")


class Steps:
    """The two steps, on one network and one optimizer."""

    def __init__(self, task: DiffusionTask, batch: Batch) -> None:
        self.task, self.batch = task, batch
        self._images = 0
        self._state = TrainingState()
        self._guard = StepGuard(task.config, self._state, task.environment.rank)
        self._inputs = task.inputs(batch)  # of the bare step: prepared once
        self._z = task.encode(batch)

    def bare(self) -> None:
        task, z = self.task, self._z
        t = torch.randint(task.process.num_timesteps, (len(z),), device=z.device)
        noise = torch.randn_like(z)
        output = task.model(task.process.add_noise(z, noise, t), t, self._inputs)
        task.model.backward(F.mse_loss(output.float(), noise))
        task.model.step(task.lr(self._images))

    def everything(self) -> None:
        task, batch = self.task, self.batch
        # The images of the next global batch, as the loader would number them.
        part = task.plan.micro_batch * task.environment.world_size
        firsts = range(self._images, self._images + task.plan.global_batch, part)
        batches = [replace(batch, image_numbers=batch.image_numbers + first) for first in firsts]
        metrics = task.accumulate(batches, self._images) | task.observations()
        names = sorted(metrics)
        values = torch.stack([metrics[name].double().cpu() for name in names]).to(task.environment.device)
        means = collectives.mean_over_ranks(values).tolist()
        trouble = self._guard.judge(dict(zip(names, means, strict=True)), [])
        if trouble is not None and trouble.skips:
            raise NumericsError(trouble.words)
        task.update(self._images)
        self._images += task.plan.global_batch

    def compare_ranks(self) -> None:
        numbers, keys = self.batch.image_numbers.tolist(), self.batch.keys
        check_ranks(self.task.trained, RankBatch(numbers, keys, len(keys)), self._images)


def table(results: dict[str, Any]) -> str:
    """A line per case."""
    lines = [f"{'whole step / bare step':<32}{'median':>8}{'quartiles':>18}{'ranks compared':>16}{'pairs':>7}"]
    for name, result in results.items():
        ratio = result["ratio_to_bare"]
        quartiles = f"{ratio['lower_quartile']:.3f} .. {ratio['upper_quartile']:.3f}"
        label = f"{name} ({result['parameters'] / 1e6:.1f}M, {result['ranks']} rank(s))"
        compared = f"+{result['check_ranks_share_of_step']:.3%}"
        lines.append(f"{label:<32}{ratio['median']:>8.3f}{quartiles:>18}{compared:>16}{result['pairs']:>7}")
    within = all(result["overall_ratio"] <= GOAL for result in results.values())
    return "\n".join([*lines, f"goal: at most {GOAL}; {'reached' if within else 'missed'}"])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
