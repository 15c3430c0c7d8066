"""Layouts as a condition: tokens computed by hand, their order, the null, and boxes that are refused."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest
import torch

from ldm_scale.conditioning.base import Conditioner, Conditions, Tools
from ldm_scale.conditioning.layout import LayoutCondition, grid_side
from ldm_scale.config.schema import LayoutConditioningConfig
from ldm_scale.data.annotations import Box, Layout, SceneObject, View, layout_of
from ldm_scale.errors import ConfigError
from ldm_scale.telemetry import log
from tests.helpers.weights import random_state

PAPER = LayoutConditioningConfig(depth=1, width=16, num_heads=2, head_dim=4)
SMALL = dataclasses.replace(PAPER, num_classes=20, num_tokens=30, max_objects=3)
TOOLS = Tools(torch.device("cpu"))
SIZE = (4, 4)
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def make(config: LayoutConditioningConfig = SMALL) -> LayoutCondition:
    condition = LayoutCondition(config)
    condition.load_state_dict(random_state(condition))
    return condition.eval()


def layout(*objects: tuple[int, Box], crop: Box = WHOLE) -> Layout:
    return Layout(tuple(SceneObject(label, box) for label, box in objects), crop)


def prepare(condition: LayoutCondition, *layouts: Layout) -> torch.Tensor:
    return condition.prepare(Conditions(layouts=layouts), TOOLS)


def test_the_papers_tokens() -> None:
    condition = make(PAPER)
    tokens = condition.tokens(layout((17, (0.25, 0.5, 0.75, 1.0)), crop=(0.1, 0.0, 0.6, 0.5)))
    assert (condition.side, condition.none, len(tokens)) == (90, 8191, 92)
    # Of 89: 0.25 -> 22.25 -> 22, 0.5 -> 44.5 -> 44 (to the even one, as Python rounds), 0.75 -> 66.75 -> 67.
    assert tokens[:3] == [17, 44 * 90 + 22, 89 * 90 + 67]
    assert tokens[3:90] == [8191] * 87
    # 0.1 -> 8.9 -> 9, 0.6 -> 53.4 -> 53.
    assert tokens[90:] == [9, 44 * 90 + 53]


def test_the_grid_lies_on_the_whole_picture_and_is_mirrored_with_it() -> None:
    """A square of half of a picture of 200 x 100, with an object that it cuts and one that it does not reach."""
    objects = [(5, (10.0, 10.0, 60.0, 40.0)), (6, (150.0, 0.0, 190.0, 100.0))]
    condition = make(PAPER)
    for mirror, corners in ((False, (4, 27, 18, 62)), (True, (62, 85, 27, 71))):
        tokens = condition.tokens(layout_of(objects, View((200, 100), (40.0, 20.0, 140.0, 100.0), mirror)))
        left, right, crop_left, crop_right = corners
        # Of 89, down: 0.1 -> 8.9 -> 9, 0.4 -> 35.6 -> 36, 0.2 -> 17.8 -> 18, 1 -> 89.
        assert tokens[:4] == [5, 9 * 90 + left, 36 * 90 + right, condition.none]
        assert tokens[90:] == [18 * 90 + crop_left, 89 * 90 + crop_right]


def test_corners_of_the_grid_stay_below_none() -> None:
    assert make(PAPER).tokens(layout((0, WHOLE)))[:3] == [0, 0, 8099]
    # A square number of tokens leaves its last one to "none", so that the grid is one smaller.
    assert [grid_side(n) for n in (5, 9, 10, 8192, 8100, 8101)] == [2, 2, 3, 90, 89, 90]


def test_objects_come_by_falling_area_whatever_the_order() -> None:
    condition = make()
    objects = [(3, (0.0, 0.0, 0.5, 0.5)), (9, (0.0, 0.0, 1.0, 0.5)), (2, (0.5, 0.5, 1.0, 1.0))]
    expected = condition.tokens(layout(*objects))
    # 0.5 of 4 cells -> 2.
    assert expected == [9, 0, 14, 2, 12, 24, 3, 0, 12, 0, 24]
    for seed in range(6):
        shuffled = random.Random(seed).sample(objects, len(objects))
        assert condition.tokens(layout(*shuffled)) == expected


def test_of_too_many_objects_the_smallest_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log, "_said", set())
    condition = make()
    sizes = (0.3, 0.9, 0.1, 0.5)
    crowded = layout(*((label, (0.0, 0.0, size, size)) for label, size in enumerate(sizes)))
    tokens = prepare(condition, crowded, layout(), crowded)
    assert tokens[0, 0:9:3].tolist() == [1, 3, 0]
    assert condition.truncated == 2
    assert capsys.readouterr().err.count("a layout of 4 objects, where conditioning.layout.max_objects=3") == 1


def test_an_empty_scene_is_not_the_null() -> None:
    condition = make()
    inputs = prepare(condition, layout(), layout((1, WHOLE)))
    null = condition.null(inputs)
    assert null.tolist() == [[29] * 11] * 2
    assert inputs[0].tolist() == [29] * 9 + [0, 24]
    empty, full = condition(inputs, SIZE)
    nothing = condition(null, SIZE)[0]
    assert empty.shape == (11, 16)
    for a, b in ((empty, full), (empty, nothing), (full, nothing)):
        assert not torch.allclose(a, b, atol=1e-2)


def test_dropped_rows_are_null() -> None:
    conditioner = Conditioner({"layout": make()})
    inputs = {"layout": prepare(make(), layout((1, WHOLE)), layout((2, WHOLE)))}
    dropped = conditioner.drop(inputs, torch.tensor([[0.05], [0.2]]))["layout"]
    assert dropped[0].tolist() == [29] * 11
    assert torch.equal(dropped[1], inputs["layout"][1])


def test_gradients_reach_every_parameter() -> None:
    condition = make()
    (condition(prepare(condition, layout((1, WHOLE))), SIZE).square() * torch.randn(16)).sum().backward()
    assert [name for name, p in condition.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    "box",
    [
        (-0.1, 0.0, 0.5, 0.5),
        (0.0, 0.0, 1.5, 0.5),
        (0.0, 0.5, 0.5, 1.01),
        (0.5, 0.0, 0.5, 0.5),
        (0.0, 0.6, 0.5, 0.5),
        (0.0, float("nan"), 0.5, 0.5),
    ],
)
def test_a_box_outside_or_without_area_is_refused(box: Box) -> None:
    message = rf"^object of class 7: box {re.escape(str(list(box)))} is not within the image or has no area; .*$"
    with pytest.raises(ConfigError, match=message):
        prepare(make(), layout((7, box)))
    with pytest.raises(ConfigError, match=r"^crop: box"):
        prepare(make(), layout(crop=box))


@pytest.mark.parametrize("label", [20, -1])
def test_a_class_out_of_range_is_named(label: int) -> None:
    message = rf"^object of class {label}: conditioning\.layout\.num_classes=20 numbers them from 0 to 19; .*$"
    with pytest.raises(ConfigError, match=message):
        prepare(make(), layout((label, WHOLE)))


def test_layouts_are_needed() -> None:
    with pytest.raises(ConfigError, match="no layouts"):
        make().prepare(Conditions(captions=["a"]), TOOLS)
