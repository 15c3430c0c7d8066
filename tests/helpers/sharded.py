"""A small network under ZeRO, and its parameters put together again from all ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ldm_scale.config.schema import OptimizerConfig, TrainConfig, ZeroConfig
from ldm_scale.engine import env
from ldm_scale.engine.collectives import gather_objects
from ldm_scale.engine.zero import ShardedModel
from ldm_scale.models.build import build_seeded

BATCH, ACCUMULATION = 8, 2
OPTIMIZER = OptimizerConfig(lr=1.0, weight_decay=0.1, gradient_clip=0.5)


class Network(nn.Module):
    """Parameters of odd sizes, so that the ranks' slices cut through them; one that is smaller than the ranks."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))  # type: ignore[no-any-return]


def network(seed: int = 11) -> Network:
    return build_seeded(Network, seed)


def sharded(module: nn.Module, stage: int, precision: str = "fp32", **zero: bool) -> ShardedModel:
    """The network under ZeRO on this rank, whose process group it starts; `zero` are fields of `ZeroConfig`."""
    environment = env.start(env.read_launch(), TrainConfig(device="cpu", precision=precision))  # type: ignore[arg-type]
    return ShardedModel(
        module,
        optimizer=OPTIMIZER,
        zero=ZeroConfig(**zero),
        stage=stage,
        micro_batch=BATCH // environment.world_size // ACCUMULATION,
        accumulation_steps=ACCUMULATION,
        environment=environment,
    )


def data(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one global batch."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(BATCH, 5, generator=generator), torch.randn(BATCH, 1, generator=generator)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target).square().mean()


def train_step(model: ShardedModel, step: int, lr: float, scale: float = 1.0, squares: Any = None) -> float:
    """One global batch, divided among ranks and micro-batches; the gradient's norm before clipping.

    The square that is known before the step is appended to `squares`.
    """
    x, target = data(step)
    size = BATCH // model.environment.world_size // ACCUMULATION
    for micro in range(ACCUMULATION):
        start = (model.environment.rank * ACCUMULATION + micro) * size
        model.backward(scale * squared_error(model(x[start : start + size]), target[start : start + size]))
    if squares is not None:
        squares.append(model.gradient_square())
    return model.step(lr)


def predict(model: ShardedModel) -> Tensor:
    with torch.no_grad():
        return model(data(0)[0]).float().clone()  # type: ignore[no-any-return]


def whole(model: ShardedModel, values: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters put together from all ranks' pieces, NaN where none has any; how often each element occurred."""
    mine = [(f.name, f.shape, f.offset, v.clone()) for f, v in zip(model.fragments, values, strict=True)]
    result: dict[str, Tensor] = {}
    count: dict[str, Tensor] = {}
    for pieces in gather_objects(mine):
        for name, shape, offset, value in pieces:
            flat = result.setdefault(name, torch.full(shape, math.nan)).view(-1)
            flat[offset : offset + value.numel()] = value
            count.setdefault(name, torch.zeros(shape)).view(-1)[offset : offset + value.numel()] += 1
    return result, count


def masters(model: ShardedModel) -> dict[str, Tensor]:
    return whole(model, [fragment.master for fragment in model.fragments])[0]


def moments(model: ShardedModel, key: str) -> dict[str, Tensor]:
    return whole(model, [model.moments(fragment)[key] for fragment in model.fragments])[0]


def max_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest absolute difference of two sets of tensors of the same names and shapes."""
    assert {n: t.shape for n, t in actual.items()} == {n: t.shape for n, t in expected.items()}
    differences = torch.stack([(actual[name] - expected[name]).detach().abs().max() for name in expected])
    return math.inf if differences.isnan().any() else float(differences.max())
