"""The sweeps beside the ladder of the training step: by batch, resolution, recomputation and ZeRO stage.

All values of a sweep take turns in one process. Batches and resolutions train different images, so they have images/s
and no speed-up; recomputation and ZeRO stages must leave the result as it is, and are compared first.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Way, speed_up, take_turns
from benchmarks.measured import own_peak, step_clock
from benchmarks.step_ways import (
    CHECKED_IMAGES,
    LEARNING_RATE,
    TOLERANCE,
    TOO_LARGE,
    adamw,
    cast,
    fitting,
    loss,
    network,
    rows,
    rungs,
    timed,
    train,
    using,
)
from benchmarks.unet_step import Batch, Case, inputs, random_batch
from ldm_scale.config.schema import OptimizerConfig, Recomputation, ZeroConfig
from ldm_scale.engine import collectives, env
from ldm_scale.engine.zero import ShardedModel
from ldm_scale.interchange.comparison import relative_difference

Rows = list[dict[str, Any]]

WARMUP_ROUNDS = 3
STAGES = range(4)  # of ZeRO
BATCH_FACTORS = (0.25, 0.5, 1, 2)  # of the case's batch
SIDE_FACTORS = (0.5, 1, 2)  # of the latents' side
RECOMPUTED: tuple[Recomputation, ...] = ("none", "selective", "full")
# Of losses before and after an update; and of gradients, whose parts are added in another order when recomputed.
TOLERANCES = {torch.float32: TOLERANCE, torch.bfloat16: 1e-2}


def by_batch(case: Case, here: env.Environment, rounds: int, name: str) -> Rows:
    """Images/s at other batches."""
    sizes = sorted({max(1, int(case.batch * factor)) for factor in BATCH_FACTORS})
    return _by_case({f"batch {n}": replace(case, batch=n) for n in sizes}, here, rounds, "batch", name)


def by_resolution(case: Case, here: env.Environment, rounds: int, name: str) -> Rows:
    """Images/s at other sides of the latents."""
    sides = [int(case.latent_side * factor) for factor in SIDE_FACTORS]
    least = 2 ** (len(case.unet.channel_multipliers) - 1)
    found = {f"latents {side}x{side}": replace(case, latent_side=side) for side in sides if side % least == 0}
    return _by_case(found, here, rounds, "resolution", name)


def _by_case(found: dict[str, Case], here: env.Environment, rounds: int, part: str, name: str) -> Rows:
    device, setting = here.device, rungs(here.device)[-1].setting
    module = network(next(iter(found.values())), device).to(here.dtype)
    optimizer = adamw(list(module.parameters()), True, LEARNING_RATE)
    peaks: dict[str, float] = {}

    @contextmanager
    def around(label: str) -> Iterator[None]:
        with using(module, setting), own_peak(device, module, optimizer, peaks, label):
            yield

    ways = {
        label: Way(
            partial(train, module, optimizer, cast(random_batch(case, device), here.dtype)), partial(around, label)
        )
        for label, case in found.items()
    }
    ways, clock = fitting(ways), step_clock(device, here.world_size)
    turns = take_turns(ways, rounds, warmup=WARMUP_ROUNDS, clock=clock, name=f"{name}: {part}")
    return [
        {"part": part, "name": label, "batch": case.batch, "latent_side": case.latent_side}
        | (timed(turns, label, case.batch, peaks) if label in ways else {"missing": TOO_LARGE})
        for label, case in found.items()
    ]


def by_recomputation(case: Case, here: env.Environment, rounds: int, name: str) -> Rows:
    """Speed with less or more computed again in backward, of the same gradients."""
    device, setting = here.device, rungs(here.device)[-1].setting
    module: Any = network(case, device).to(here.dtype)
    batch = cast(random_batch(case, device), here.dtype)
    gradients, checked = {}, cast(rows(batch, slice(CHECKED_IMAGES)), here.dtype)
    for kind in RECOMPUTED:
        with using(module, setting):
            module.checkpoint_activations = kind
            module.zero_grad()
            torch.autograd.backward(loss(module, checked)[0])
            gradients[kind] = torch.cat([p.grad.float().flatten() for p in module.parameters()])
    optimizer = adamw(list(module.parameters()), True, LEARNING_RATE)
    peaks: dict[str, float] = {}

    @contextmanager
    def around(kind: Recomputation) -> Iterator[None]:
        module.checkpoint_activations = kind
        with using(module, setting), own_peak(device, module, optimizer, peaks, kind):
            yield

    ways = {kind: Way(partial(train, module, optimizer, batch), partial(around, kind)) for kind in RECOMPUTED}
    ways, clock = fitting(ways), step_clock(device, here.world_size)
    turns = take_turns(ways, rounds, warmup=WARMUP_ROUNDS, clock=clock, name=f"{name}: recomputed")
    found, base = [], next(iter(ways), RECOMPUTED[0])
    for kind in RECOMPUTED:
        row = {"part": "recomputed", "name": f"recomputed: {kind}", "batch": case.batch}
        if kind not in ways:
            found.append(row | {"missing": TOO_LARGE})
            continue
        off = relative_difference(gradients[kind], gradients["none"])
        found.append(
            row | timed(turns, kind, case.batch, peaks) | speed_up(turns, kind, base, off, TOLERANCES[here.dtype])
        )
    return found


def by_stage(case: Case, here: env.Environment, rounds: int, name: str) -> Rows:
    """Speed under ZeRO by stage, of the same losses. Collective: all ranks."""
    module, batch = network(case, here.device), cast(random_batch(case, here.device), here.dtype)
    models, losses = dict[int, ShardedModel](), dict[int, torch.Tensor]()
    for stage in STAGES:
        try:
            models[stage] = sharded(copy.deepcopy(module), stage, case.batch, here)
            losses[stage] = first_losses(models[stage], batch)
        except torch.OutOfMemoryError:
            if here.world_size > 1:
                raise  # the other ranks may have had room, and wait in a collective
        if stage not in losses:
            models.pop(stage, None)
            gc.collect()  # an engine is a cycle; only now is the traceback gone too, which held activations
            torch.cuda.empty_cache()
    ways = {f"ZeRO {stage}": Way(partial(train_sharded, model, batch)) for stage, model in models.items()}
    clock, shows = step_clock(here.device, here.world_size), here.is_main
    turns = take_turns(ways, rounds, warmup=WARMUP_ROUNDS, clock=clock, name=f"{name}: ZeRO", shows=shows)
    found, base, allowed = [], next(iter(models), 0), TOLERANCES[here.dtype]
    for stage in STAGES:
        label, images = f"ZeRO {stage}", case.batch * here.world_size
        row = {"part": "zero", "name": f"{label}, {here.world_size} rank(s)", "batch": images}
        if stage not in models:
            found.append(row | {"missing": f"{TOO_LARGE}, beside the stages before"})
            continue
        off = relative_difference(losses[stage], losses[base])
        found.append(row | timed(turns, label, images, {}) | speed_up(turns, label, f"ZeRO {base}", off, allowed))
    return found


def sharded(module: nn.Module, stage: int, micro_batch: int, here: env.Environment) -> ShardedModel:
    """The network under ZeRO, as training has it. Collective: all ranks."""
    return ShardedModel(
        module,
        optimizer=OptimizerConfig(),
        zero=ZeroConfig(),
        stage=stage,
        micro_batch=micro_batch,
        accumulation_steps=1,
        environment=here,
    )


def train_sharded(model: ShardedModel, batch: Batch, lr: float = LEARNING_RATE) -> torch.Tensor:
    """The loss of one step. Collective: all ranks."""
    prediction = model(*inputs(batch))
    value = torch.nn.functional.mse_loss(prediction.float(), batch.noise)
    model.backward(value)
    model.step(lr)
    return value.detach()


def first_losses(model: ShardedModel, batch: Batch) -> torch.Tensor:
    """Losses before and after an update that is large enough to be seen in them, of all ranks. Shapes: (2,).

    Collective: all ranks.
    """
    losses = torch.stack([train_sharded(model, batch, lr=1e-3) for _ in range(2)])
    return collectives.mean_over_ranks(losses.double())


SWEEPS: dict[str, Callable[[Case, env.Environment, int, str], Rows]] = {
    "batch": by_batch,
    "resolution": by_resolution,
    "recomputed": by_recomputation,
    "zero": by_stage,
}
