"""What is dropped of several kinds at once: how often each, how often all, and by what numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_scale.conditioning.base import Conditioner
from ldm_scale.conditioning.classes import ClassCondition
from ldm_scale.config.schema import ClassConditioningConfig, DiffusionConfig
from ldm_scale.diffusion.process import build_process
from ldm_scale.engine import seeding
from ldm_scale.training.latent_task import LatentTask

SEED = 7
NUM_IMAGES = 20_000
ERRORS = 4.0  # standard errors of a share
NULL = 1  # row of the class table


def conditioner_of(*probabilities: float) -> Conditioner:
    sections = [ClassConditioningConfig(num_classes=1, width=2, drop_probability=p) for p in probabilities]
    return Conditioner({f"kind{number}": ClassCondition(section) for number, section in enumerate(sections)})


def draw(numbers: range, num_uniforms: int) -> Tensor:
    """The uniform numbers that training draws for images."""
    diffusion = DiffusionConfig()
    task: Any = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(seed=SEED), diffusion=diffusion),
        process=build_process(diffusion),
        latent_shape=(1, 1, 1),
        to_device=lambda x: x,
    )
    return LatentTask.draw(task, numbers, num_uniforms)[2]


def dropped(conditioner: Conditioner, uniforms: Tensor) -> Tensor:
    """Shapes: returns (B, kinds) bool."""
    inputs = {name: torch.zeros(len(uniforms), dtype=torch.int64) for name in conditioner}
    return torch.stack([row == NULL for row in conditioner.drop(inputs, uniforms).values()], dim=1)


def check_share(found: Tensor, expected: float) -> None:
    error = (expected * (1 - expected) / NUM_IMAGES) ** 0.5
    assert abs(found.double().mean().item() - expected) <= ERRORS * error


@pytest.mark.parametrize("probabilities", [(0.1, 0.1), (0.1, 0.5), (0.2, 0.1, 0.3), (0.1, 0.0, 0.1)])
def test_each_kind_keeps_its_share_and_all_go_together_as_often_as_half_of_the_least(
    probabilities: tuple[float, ...],
) -> None:
    conditioner = conditioner_of(*probabilities)
    found = dropped(conditioner, draw(range(NUM_IMAGES), conditioner.num_uniforms))
    for column, p in enumerate(probabilities):
        check_share(found[:, column], p)
    halves = sorted(p / 2 for p in probabilities if p > 0)
    # By where the shared number lies: below all halves, between two, above all; own numbers must do the rest.
    expected, rest = 0.0, 1.0
    for low, high in zip([0.0, *halves], [*halves, 1.0], strict=True):
        expected += (high - low) * rest
        rest *= high / (1 - high) if high < 1 else 1.0
    together = found[:, [p > 0 for p in probabilities]].all(dim=1)
    check_share(together, expected)
    assert expected >= halves[0]


@pytest.mark.parametrize("probabilities", [(0.1,), (0.0, 0.1)])
def test_a_kind_that_is_dropped_alone_goes_by_its_own_number(probabilities: tuple[float, ...]) -> None:
    conditioner = conditioner_of(*probabilities)
    assert conditioner.num_uniforms == len(probabilities)
    found = dropped(conditioner, draw(range(1000), conditioner.num_uniforms))
    for number in range(1000):
        stream = seeding.stream(SEED, "diffusion", number)
        stream.random()  # the time
        own = stream.random(len(probabilities))
        assert found[number].tolist() == (own < probabilities).tolist()


def test_what_is_dropped_depends_on_the_images_number_alone() -> None:
    conditioner = conditioner_of(0.3, 0.6)
    whole = dropped(conditioner, draw(range(64), 3))
    parts = [dropped(conditioner, draw(range(rank, 64, 4), 3)) for rank in range(4)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, whole[rank::4])
    assert dropped(conditioner_of(1.0, 1.0), draw(range(64), 3)).all()
