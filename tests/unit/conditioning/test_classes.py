"""Classes as a condition: one row each, one for none, and numbers that are refused."""

from __future__ import annotations

import pytest
import torch

from ldm_scale.conditioning.base import Conditioner, Conditions, Tools
from ldm_scale.conditioning.classes import ClassCondition
from ldm_scale.config.schema import ClassConditioningConfig
from ldm_scale.errors import ConfigError

TOOLS = Tools(torch.device("cpu"))
SIZE = (4, 4)


@pytest.fixture
def condition() -> ClassCondition:
    torch.manual_seed(0)
    return ClassCondition(ClassConditioningConfig(num_classes=5, width=8, drop_probability=0.5))


def prepare(condition: ClassCondition, *classes: int) -> torch.Tensor:
    return condition.prepare(Conditions(classes=torch.tensor(classes)), TOOLS)


def test_the_context_is_one_row_of_the_embedding(condition: ClassCondition) -> None:
    context = condition(prepare(condition, 4, 0), SIZE)
    assert context.shape == (2, 1, 8)
    assert torch.equal(context[:, 0], condition.embedding.weight[[4, 0]])


def test_no_class_is_the_null_and_differs_from_all(condition: ClassCondition) -> None:
    inputs = prepare(condition, -1, 0, 1, 2, 3, 4)
    assert inputs.tolist() == [5, 0, 1, 2, 3, 4]
    assert condition.null(inputs).tolist() == [5] * 6
    context = condition(inputs, SIZE)
    assert not any(torch.equal(context[0], other) for other in context[1:])


def test_dropped_rows_are_null(condition: ClassCondition) -> None:
    conditioner = Conditioner({"classes": condition})
    dropped = conditioner.drop({"classes": prepare(condition, 1, 2, 3)}, torch.tensor([[0.9], [0.4], [0.5]]))
    assert dropped["classes"].tolist() == [1, 5, 3]


def test_gradients_reach_the_rows_in_use_and_the_null(condition: ClassCondition) -> None:
    condition(prepare(condition, 1, -1), SIZE).square().sum().backward()
    gradient = condition.embedding.weight.grad
    assert gradient is not None
    assert gradient.any(dim=1).tolist() == [False, True, False, False, False, True]


@pytest.mark.parametrize("label", [5, 100, -2])
def test_a_class_out_of_range_is_named(condition: ClassCondition, label: int) -> None:
    message = rf"^class {label}: conditioning\.classes\.num_classes=5 numbers them from 0 to 4, and -1 is none; .*$"
    with pytest.raises(ConfigError, match=message):
        prepare(condition, 0, label)


def test_classes_are_needed(condition: ClassCondition) -> None:
    with pytest.raises(ConfigError, match="no classes"):
        condition.prepare(Conditions(captions=["a"]), TOOLS)
