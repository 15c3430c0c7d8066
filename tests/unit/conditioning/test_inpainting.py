"""Inpainting: what the network is given, holes that are none, and known pixels that come back exactly."""

from __future__ import annotations

import logging
import re

import pytest
import torch
import torch.nn.functional as F

from ldm_scale.conditioning.base import Conditioner, Conditions, Tools
from ldm_scale.conditioning.inpainting import InpaintingCondition, compose_inpainted
from ldm_scale.config.schema import InpaintingConditioningConfig
from ldm_scale.engine.seeding import stream
from ldm_scale.errors import ConfigError

FACTOR = 4


def encode(x: torch.Tensor) -> torch.Tensor:
    """A linear stand-in for the encoder, (B, 3, H, W) to (B, 3, H/4, W/4); grey gives zeros."""
    return 2 * F.avg_pool2d(x, FACTOR)


TOOLS = Tools(torch.device("cpu"), encode=encode)


def build(drop_probability: float = 0.5) -> InpaintingCondition:
    return InpaintingCondition(InpaintingConditioningConfig("mixed", drop_probability), latent_channels=3)


def random_pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def hole(height: int, width: int, *box: int) -> torch.Tensor:
    """A mask with one box (top, left, bottom, right)."""
    mask = torch.zeros(1, 1, height, width)
    mask[..., box[0] : box[2], box[1] : box[3]] = 1
    return mask


def test_inputs_are_the_known_pixels_latents_and_the_touched_cells() -> None:
    x, mask = random_pixels(1, 3, 16, 16), hole(16, 16, 0, 5, 16, 6)  # one pixel wide
    condition = build()
    inputs = condition.prepare(Conditions(images=x, masks=mask), TOOLS)
    assert condition.width == 4
    assert inputs.shape == (1, 4, 4, 4)
    torch.testing.assert_close(inputs[:, :3], encode(torch.where(mask == 1, 0.0, x)))
    assert torch.equal(inputs[0, 3], torch.tensor([[0.0, 1, 0, 0]] * 4))
    assert torch.equal(condition(inputs, (4, 4)), inputs)
    # What is in the hole plays no part.
    other = condition.prepare(Conditions(images=torch.where(mask == 1, 0.7, x), masks=mask), TOOLS)
    assert torch.equal(inputs, other)


def test_training_makes_the_holes_itself() -> None:
    condition, x = build(), random_pixels(3, 3, 32, 32)
    streams = [stream(0, "conditions", number) for number in (0, 1, 0)]
    y = condition.simulate(Conditions(), x, streams)
    assert y.images is x
    assert y.masks is not None
    assert y.masks.shape == (3, 1, 32, 32)
    assert not torch.equal(y.masks[0], y.masks[1])
    inputs = condition.prepare(y, TOOLS)
    assert set(inputs[:, 3].unique().tolist()) == {0.0, 1.0}
    given = Conditions(masks=hole(32, 32, 0, 0, 8, 8).expand(3, -1, -1, -1))
    assert condition.simulate(given, x, streams).masks is given.masks


def test_null_and_dropping() -> None:
    conditioner = Conditioner({"inpainting": build()})
    y = Conditions(images=random_pixels(2, 3, 16, 16), masks=hole(16, 16, 0, 0, 8, 8).expand(2, -1, -1, -1))
    inputs = conditioner.prepare(y, TOOLS)
    null = conditioner.null_inputs(inputs)["inpainting"]
    assert not null[:, :3].any()
    assert (null[:, 3] == 1).all()
    dropped = conditioner.drop(inputs, torch.tensor([[0.6], [0.4]]))["inpainting"]
    assert torch.equal(dropped[0], inputs["inpainting"][0])
    assert torch.equal(dropped[1], null[1])


def test_gradients_reach_the_latents() -> None:
    inputs = random_pixels(1, 4, 4, 4).requires_grad_()
    build()(inputs, (4, 4)).sum().backward()
    assert torch.equal(inputs.grad, torch.ones_like(inputs))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (None, "there is no mask; give both"),
        (torch.zeros(1, 1, 8, 16), "mask of 8x16 pixels for an image of 16x16: must have the image's size"),
        (torch.zeros(1, 16, 16), "masks of shape (1, 16, 16) for images of shape (1, 3, 16, 16)"),
        (torch.zeros(1, 3, 16, 16), "must be (images, 1, height, width)"),
        (torch.full((1, 1, 16, 16), 0.5), "with the value 0.5: must be 1 in the hole and 0"),
        (torch.full((1, 1, 16, 16), 255, dtype=torch.uint8), "with the value 255"),
        (torch.full((1, 1, 16, 16), float("nan")), "with the value nan"),
    ],
)
def test_what_is_no_mask_is_refused(masks: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build().prepare(Conditions(images=random_pixels(1, 3, 16, 16), masks=masks), TOOLS)


def test_other_refusals() -> None:
    with pytest.raises(ConfigError, match="there is no image; give both"):
        build().prepare(Conditions(masks=torch.zeros(1, 1, 16, 16)), TOOLS)
    with pytest.raises(ConfigError, match="has latents of 4x4, the sample 8x8"):
        build()(random_pixels(1, 4, 4, 4), (8, 8))


@pytest.mark.parametrize(("value", "message"), [(1.0, "1 everywhere"), (0.0, "0 everywhere")])
def test_a_hole_of_everything_or_nothing_is_said_once(
    value: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("ldm_scale"), "warning", said.append)
    condition, x = build(), random_pixels(1, 3, 16, 16)
    mask = torch.full((1, 1, 16, 16), value)
    for _ in range(2):
        inputs = condition.prepare(Conditions(images=x, masks=mask), TOOLS)
    assert len(said) == 1
    assert message in said[0]
    assert (inputs[:, 3] == value).all()
    torch.testing.assert_close(inputs[:, :3], encode(x) * (1 - value))
    # Nothing to do: the result is the input; nothing known: it is the sample.
    sample = random_pixels(1, 3, 16, 16).flip(-1)
    assert torch.equal(compose_inpainted(sample, x, mask), sample if value else x)


def test_known_pixels_come_back_exactly() -> None:
    x, sample = random_pixels(1, 3, 16, 16), random_pixels(1, 3, 16, 16).flip(-1)
    mask = hole(16, 16, 4, 4, 9, 12)
    whole = compose_inpainted(sample, x, mask)
    assert torch.equal(whole, torch.where(mask == 1, sample, x))
    assert torch.equal(compose_inpainted(sample, x, mask.bool()), whole)


def test_the_fade_lies_outside_of_the_hole() -> None:
    x, sample = torch.full((1, 3, 16, 16), -1.0), torch.ones(1, 3, 16, 16)
    mask = hole(16, 16, 0, 0, 16, 4)
    row = compose_inpainted(sample, x, mask, feather=3)[0, 0, 8]
    expected = torch.tensor([1.0] * 4 + [0.5, 0.0, -0.5] + [-1.0] * 9)
    torch.testing.assert_close(row, expected)
    assert (row[7:] == -1).all()


def test_a_sample_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("sample of shape (1, 3, 8, 8) for an image of shape (1, 3, 16")):
        compose_inpainted(random_pixels(1, 3, 8, 8), random_pixels(1, 3, 16, 16), torch.zeros(1, 1, 16, 16))
