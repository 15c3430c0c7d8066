"""What all guards together cost of a training step of stage 2, at their default intervals.

Both sides are the trainer's own step on the same network, in one process, on a batch of cached latents; the loader is
left out of both. On: finite checks with the gradient's norm, losses by noise level and the rule for spikes, phases and
watchdog, the search for slow ranks, the account of bad samples. Off: each of them replaced by what does nothing.
Steps take turns (on, off, off, on, ...), and the figure is the median over pairs of their times' ratio, with the range
that holds it at 95%. Not blocks of steps: what else a machine does changes within seconds, and would be taken for the
guards' cost. The comparison of the ranks comes every `train.check_ranks_every_images`: it is timed alone and added as
its share of a step (with one rank there is nobody to compare with). Goal: at most 1.01.

    python -m benchmarks.guards [--device cuda] [--case demo] [--stage 1] [--pairs 300]
    torchrun --nproc-per-node 2 -m benchmarks.guards --case demo

On one CPU thread the clock is the process's own time, the watchdog's thread included.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from benchmarks.harness import Way, median_range, take_turns
from benchmarks.measured import command_line, is_trial, parse, set_threads, spread, step_clock, write_results
from benchmarks.train_step import Case, cases, prepared, random_batch
from ldm_scale.__main__ import run_command
from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.schema import DataConfig
from ldm_scale.data import Loader
from ldm_scale.data.policy import LossAccount
from ldm_scale.engine import env, phases
from ldm_scale.engine.preemption import StopRequest
from ldm_scale.engine.watchdog import Watchdog
from ldm_scale.telemetry.tensorboard import ScalarWriter
from ldm_scale.telemetry.throughput import TrainProgress
from ldm_scale.training import trainer as training
from ldm_scale.training.diffusion_step import DiffusionTask
from ldm_scale.training.sample_losses import SampleLosses
from ldm_scale.training.skipping import StepGuard

GOAL = 1.01
WARMUP_PAIRS = 2
CHECKS = 5  # comparisons of the ranks that are timed
NEVER = 10**12  # images


def main(argv: Sequence[str]) -> int:
    """0; whether the goal is reached is said, and is for a person to judge by the median's range."""
    parser = command_line("All guards together against none.", cases(), "pairs", 300)
    parser.add_argument("--stage", type=int, choices=range(4), default=1, help="of ZeRO")
    arguments = parse(parser, argv)
    here = env.start(env.read_launch(), replace(cases()["demo"].config.train, device=arguments.device))
    set_threads(here.device, here.launch.local_world_size)
    results: dict[str, Any] = {}
    for name in arguments.case or cases():
        results[name] = measure(cases()[name], here, arguments.stage, arguments.pairs, name)
    if here.is_main:
        print(table(results))
        if not is_trial(arguments.pairs, "pairs"):
            write_results(arguments.out, "guards", here.device, results)
    env.stop()
    return 0


def measure(case: Case, here: env.Environment, stage: int, num_pairs: int, name: str) -> dict[str, Any]:
    """Times and ratios of a case. Collective: all ranks."""
    with prepared(case, here, stage) as steps, tempfile.TemporaryDirectory() as folder:
        run = Run(steps.task, Path(folder))
        clock = step_clock(here.device, here.world_size)
        ways, shown = {"on": Way(run.step, run.guarded), "off": Way(run.step, run.unguarded)}, here.is_main
        turns = take_turns(ways, num_pairs, warmup=WARMUP_PAIRS, clock=clock, name=name, unit="pair", shows=shown)
        check = {"check": Way(run.compare_ranks)}
        checks = take_turns(check, CHECKS, warmup=0, clock=clock, name=f"{name} ranks compared", shows=shown)
    check_s, step_s, ratios = checks.spreads()["check"]["median"], turns.spreads(), turns.ratios("on", "off")
    every, batch = case.config.train.check_ranks_every_images, steps.task.plan.global_batch
    share = check_s * batch / every / step_s["off"]["median"]
    return {
        "parameters": sum(parameter.numel() for parameter in steps.task.network.parameters()),
        "config": config_to_dict(case.config),
        "zero_stage": stage,
        "ranks": here.world_size,
        "pairs": num_pairs,
        "clock": "process time" if clock is time.process_time else "wall time",
        "step_s": step_s,
        "ratio_on_to_off": spread(ratios),
        "ratio_median_range": median_range(ratios),
        "check_ranks_s": check_s,
        "check_ranks_share_of_step": share,
        "overall_ratio": spread(ratios)["median"] + share,
    }


class Run:
    """A trainer whose steps are made one by one, without loader, validation or saves."""

    def __init__(self, task: DiffusionTask, run_dir: Path) -> None:
        train = replace(
            task.config.train,
            total_images=NEVER,
            log_every_images=NEVER,
            validate_every_images=NEVER,
            sample_every_images=NEVER,
            checkpoint_every_images=0,
            checkpoint_every_s=0.0,
            check_ranks_every_images=0,  # timed alone
        )
        config = replace(task.config, run_dir=str(run_dir), train=train)
        self._task, self._config = task, config
        dataset = SimpleNamespace(digest="", num_samples=NEVER, labels=[], shards=[])
        with mock.patch.multiple(training, open_unindexed=lambda _: None, open_manifest=lambda *_: dataset):
            self._trainer = training.Trainer(config, task, task.environment)
        here = task.environment
        self._trainer.guard = StepGuard(config, self._trainer.state, here.rank)
        self._trainer.losses = SampleLosses(LossAccount(), run_dir, cast(Any, dataset), DataConfig(), here.is_main)
        self._writer = ScalarWriter(run_dir, here.is_main, None)
        self._progress = TrainProgress(NEVER, 0, False, "guards")
        self._loader, self._stop = cast(Loader, SimpleNamespace(waited_s=0.0)), StopRequest()
        self._batch = random_batch(task)
        self.compare_ranks()  # before the first step, as always

    def step(self) -> None:
        """One step of the trainer, on the images that the loader would give next."""
        trainer = self._trainer
        phases.enter("data", trainer.state.step)
        numbers = self._batch.image_numbers + trainer.state.cur_images
        batch = replace(self._batch, image_numbers=numbers)
        trainer._step([batch], self._loader, self._writer, self._progress, self._stop)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Everything on, as it is configured by default."""
        meeting = self._task.environment.meeting
        assert meeting is not None, "started here"
        with Watchdog(self._config.watchdog, Path(self._config.run_dir), self._task.environment.rank, meeting):
            yield

    @contextmanager
    def unguarded(self) -> Iterator[None]:
        """None of it. What only serves the guards is not computed either."""
        trainer, task = self._trainer, self._task
        nobody: Callable[..., Any] = lambda *_: None  # noqa: E731  # a name for the type
        with ExitStack() as stack:
            for owner, name, replacement in (
                (phases, "enter", nobody),
                (phases, "meet", nobody),
                (task, "observations", lambda: {}),
                (task, "note_losses", nobody),
                (trainer.guard, "judge", nobody),
                (trainer._stragglers, "step", lambda *_: {}),
                (trainer.losses, "named", lambda _: []),
            ):
                stack.enter_context(mock.patch.object(owner, name, replacement))
            yield

    def compare_ranks(self) -> None:
        """The comparison of the ranks, as the trainer makes it."""
        self._trainer._compare_ranks([self._batch])


def table(results: dict[str, Any]) -> str:
    """A line per case."""
    lines = [
        f"{'step with all guards / with none':<36}{'median':>8}{'at 95% within':>20}{'ranks compared':>16}{'pairs':>7}"
    ]
    for name, result in results.items():
        ratio = result["ratio_on_to_off"]
        within = "{:.4f} .. {:.4f}".format(*result["ratio_median_range"])
        label = f"{name} ({result['parameters'] / 1e6:.1f}M, {result['ranks']} rank(s))"
        compared = f"+{result['check_ranks_share_of_step']:.3%}"
        lines.append(f"{label:<36}{ratio['median']:>8.4f}{within:>20}{compared:>16}{result['pairs']:>7}")
    is_reached = all(result["overall_ratio"] <= GOAL for result in results.values())
    return "\n".join([*lines, f"goal: at most {GOAL}; {'reached' if is_reached else 'missed'}"])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
