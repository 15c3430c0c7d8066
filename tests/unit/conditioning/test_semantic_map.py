"""Semantic maps: against explicit one-hot planes, halving and a 1x1 convolution; unknown pixels and wrong labels."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from ldm_scale.conditioning.base import Conditioner, Conditions, Tools
from ldm_scale.conditioning.semantic_map import SemanticMapCondition
from ldm_scale.config.schema import SemanticMapConditioningConfig
from ldm_scale.errors import ConfigError

TOOLS = Tools(torch.device("cpu"))
LABELS = 7


@pytest.fixture
def condition() -> SemanticMapCondition:
    torch.manual_seed(0)
    return SemanticMapCondition(SemanticMapConditioningConfig(LABELS, channels=3, drop_probability=0.5))


def random_maps(height: int = 16, width: int = 16) -> torch.Tensor:
    maps = torch.randint(0, LABELS, (2, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    maps[:, :3, 2] = 255
    return maps


def planes(maps: torch.Tensor) -> torch.Tensor:
    """One-hot, (B, LABELS, H, W) float64; zeros where unknown."""
    return torch.stack([maps == label for label in range(LABELS)], dim=1).double()


def test_equals_one_hot_planes_halved_twice_and_convolved(condition: SemanticMapCondition) -> None:
    maps = random_maps()
    reduced = planes(maps)
    for _ in range(2):
        reduced = F.interpolate(reduced, scale_factor=0.5, mode="bilinear")
    weight = condition.projection.weight[:LABELS].T.double()[..., None, None]
    torch.testing.assert_close(condition(maps, (4, 4)).double(), F.conv2d(reduced, weight), atol=1e-6, rtol=0)


def test_any_sizes_with_the_same_ratio(condition: SemanticMapCondition) -> None:
    maps = random_maps(18, 12)
    weight = condition.projection.weight[:LABELS].T.double()[..., None, None]
    for size in ((9, 6), (6, 4), (12, 8), (36, 24)):
        expected = F.conv2d(F.adaptive_avg_pool2d(planes(maps), size), weight)
        torch.testing.assert_close(condition(maps, size).double(), expected, atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="semantic map of 18x12 pixels for latents of 9x9: must have the same ratio"):
        condition(maps, (9, 9))


def test_an_unknown_map_is_the_null_and_gives_zeros(condition: SemanticMapCondition) -> None:
    inputs = condition.prepare(Conditions(maps=random_maps()), TOOLS)
    null = condition.null(inputs)
    assert null.dtype == inputs.dtype
    assert not condition(null, (4, 4)).any()
    assert (condition(inputs, (4, 4)) != 0).all()


def test_dropping_replaces_whole_maps(condition: SemanticMapCondition) -> None:
    conditioner = Conditioner({"semantic_map": condition})
    inputs = conditioner.prepare(Conditions(maps=random_maps()), TOOLS)
    dropped = conditioner.drop(inputs, torch.tensor([[0.6], [0.4]]))["semantic_map"]
    assert torch.equal(dropped[0], inputs["semantic_map"][0])
    assert (dropped[1] == 255).all()
    spatial = conditioner(conditioner.null_inputs(inputs), (4, 4)).spatial
    assert spatial is not None
    assert spatial.shape == (2, 3, 4, 4)


def test_gradients_reach_what_occurs_and_nothing_else(condition: SemanticMapCondition) -> None:
    maps = torch.tensor([[[0, 2], [2, 255]]])
    condition(maps, (1, 1)).sum().backward()
    gradient = condition.projection.weight.grad
    assert gradient is not None
    shares = torch.tensor([0.25, 0, 0.5, 0, 0, 0, 0, 0])
    torch.testing.assert_close(gradient, shares[:, None].expand(-1, 3))


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (None, "needs a map of labels for each image"),
        (torch.zeros(2, 4, 4), "shape (2, 4, 4) and type float32: must be whole numbers"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "shape (2, 1, 4, 4) and type uint8"),
        (torch.full((1, 4, 4), 9, dtype=torch.uint8), "label 9: labels go from 0 to 6"),
        (torch.full((1, 4, 4), -1), "label -1: labels go from 0 to 6"),
    ],
)
def test_what_is_no_map_is_refused(condition: SemanticMapCondition, maps: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        condition.prepare(Conditions(maps=maps), TOOLS)
