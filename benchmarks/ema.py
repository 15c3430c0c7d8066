"""What averages of the weights cost: time of a stage-2 training step with 0, 1 and 3 of them, and their memory.

A step is what the trainer does after the data: forward, eps loss, backward and AdamW under ZeRO on one rank, then the
update of the averages (exponential alone; exponential and two power-function profiles), all in one process on the same
network. Steps take turns (0, 1, 3, 3, 1, 0, ...), and the result is the median over rounds of the ratio to the step
without an average, so that whatever else slows the machine down hits all of a round. A share of a few percent is below
what a busy machine lets one see in whole steps, so the update is timed alone too. On one CPU thread the clock is the
process's own time.

    python -m benchmarks.ema [--device cuda] [--case demo] [--stage 1] [--rounds 20]

Memory is counted, not estimated: bytes of every tensor that ZeRO's rank holds of weights, moments and averages.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import Way, take_turns
from benchmarks.measured import command_line, is_trial, parse, set_threads, spread, step_clock, write_results
from benchmarks.unet_step import Case, random_batch
from benchmarks.unet_step import common_cases as cases
from ldm_scale.__main__ import run_command
from ldm_scale.config.schema import EmaConfig, OptimizerConfig, TrainConfig, ZeroConfig
from ldm_scale.engine import env
from ldm_scale.engine.ema import ShardedEma
from ldm_scale.engine.zero import ShardedModel
from ldm_scale.models.build import build_seeded, build_unet

WARMUP_ROUNDS = 3
LEARNING_RATE = 1e-5
AVERAGES = {"1": EmaConfig(), "3": EmaConfig(power_stds=(0.05, 0.1))}


def main(argv: Sequence[str]) -> int:
    """0."""
    parser = command_line("Time and memory of averages of the weights.", cases(), "rounds", 20)
    parser.add_argument("--stage", type=int, choices=range(4), default=1, help="of ZeRO")
    arguments = parse(parser, argv)
    here = env.start(env.read_launch(), TrainConfig(device=arguments.device))
    set_threads(here.device, here.launch.local_world_size)
    results: dict[str, Any] = {}
    for name in arguments.case or cases():
        case = cases()[name]
        results[name] = {"case": asdict(case)} | measure(case, here, arguments.stage, arguments.rounds, name)
    print(table(results))
    env.stop()
    if not is_trial(arguments.rounds, "rounds"):
        write_results(arguments.out, "ema", here.device, results)
    return 0


def measure(case: Case, here: env.Environment, stage: int, num_rounds: int, name: str) -> dict[str, Any]:
    """Times, ratios and bytes of a case."""
    module = build_seeded(
        lambda: build_unet(case.unet, case.latent_channels, case.latent_channels, case.context_width), seed=0
    )
    model = ShardedModel(
        module.train(),
        optimizer=OptimizerConfig(),
        zero=ZeroConfig(),
        stage=stage,
        micro_batch=case.batch,
        accumulation_steps=1,
        environment=here,
    )
    averages = {count: ShardedEma(model, config) for count, config in AVERAGES.items()}
    batch = random_batch(case, here.device)
    images = 0

    clock = step_clock(here.device, here.world_size)
    updates: dict[str, list[float]] = {count: [] for count in averages}  # warm-up included

    def train(count: str) -> None:
        nonlocal images
        images += case.batch
        prediction = model(batch.z_t, batch.t, batch.context)
        model.backward(F.mse_loss(prediction.float(), batch.noise))
        model.step(LEARNING_RATE)
        if count in averages:
            begin_s = clock()
            averages[count].update(images, case.batch)
            updates[count].append(clock() - begin_s)

    ways = {count: Way(partial(train, count)) for count in ("0", *averages)}
    turns = take_turns(ways, num_rounds, warmup=WARMUP_ROUNDS, clock=clock, name=name)
    update_s = {count: spread(values[WARMUP_ROUNDS:]) for count, values in updates.items()}
    parameters = sum(fragment.length for fragment in model.fragments)
    return {
        "zero_stage": stage,
        "parameters_of_the_rank": parameters,
        "rounds": num_rounds,
        "clock": "wall time" if here.device.type == "cuda" or torch.get_num_threads() > 1 else "process time",
        "step_s": turns.spreads(),
        "ratio_to_no_average": {count: spread(turns.ratios(count, "0")) for count in averages},
        "update_s": update_s,
        "update_share_of_step": {
            count: values["median"] / turns.spreads()["0"]["median"] for count, values in update_s.items()
        },
        "bytes_per_parameter": _bytes_per_parameter(model, averages, parameters),
    }


def table(results: dict[str, Any]) -> str:
    """A line per case and number of averages."""
    lines = [f"{'step / step without average':<40}{'median':>8}{'quartiles':>18}{'update alone':>14}{'B/par.':>8}"]
    for name, result in results.items():
        for count, ratio in result["ratio_to_no_average"].items():
            quartiles = f"{ratio['lower_quartile']:.3f} .. {ratio['upper_quartile']:.3f}"
            share = f"{result['update_share_of_step'][count]:.2%}"
            size = result["bytes_per_parameter"]["averages"][count]
            label = f"{name} ({result['parameters_of_the_rank'] / 1e6:.1f}M), averages: {count}"
            lines.append(f"{label:<40}{ratio['median']:>8.3f}{quartiles:>18}{share:>14}{size:>8.1f}")
    return "\n".join(lines)


def _bytes_per_parameter(model: ShardedModel, averages: dict[str, ShardedEma], parameters: int) -> dict[str, Any]:
    masters = sum(fragment.master.nbytes for fragment in model.fragments)
    moments = sum(moment.nbytes for fragment in model.fragments for moment in model.moments(fragment).values())
    return {
        "masters_and_moments": (masters + moments) / parameters,
        "averages": {
            count: sum(tensor.nbytes for values in ema.averages.values() for tensor in values) / parameters
            for count, ema in averages.items()
        },
    }


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
