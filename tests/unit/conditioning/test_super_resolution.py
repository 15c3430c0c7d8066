"""Super-resolution: what is concatenated, sizes that fit, and what does not."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from ldm_scale.conditioning.base import Conditioner, Conditions, Tools
from ldm_scale.conditioning.super_resolution import LowResolutionCondition
from ldm_scale.config.schema import LowResolutionConditioningConfig
from ldm_scale.engine.seeding import stream
from ldm_scale.errors import ConfigError

TOOLS = Tools(torch.device("cpu"))


def build(factor: int = 4, degradation: str = "bicubic", drop_probability: float = 0.5) -> LowResolutionCondition:
    return LowResolutionCondition(LowResolutionConditioningConfig(factor, degradation, drop_probability))  # type: ignore[arg-type]


def random_pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("degradation", ["bicubic", "bsr"])
def test_training_makes_the_small_image_itself(degradation: str) -> None:
    condition, x = build(degradation=degradation), random_pixels(2, 3, 32, 24)
    streams = [stream(0, "conditions", index) for index in range(2)]
    inputs = condition.prepare(condition.simulate(Conditions(), x, streams), TOOLS)
    assert inputs.shape == (2, 3, 8, 6)
    assert inputs.dtype == torch.float32
    assert torch.equal(condition(inputs, (8, 6)), inputs)
    # Given ones stay.
    y = Conditions(low_resolution=random_pixels(2, 3, 8, 6))
    assert condition.simulate(y, x, streams) is y


def test_a_degraded_image_depends_on_its_own_stream_alone() -> None:
    condition, x = build(degradation="bsr"), random_pixels(1, 3, 32, 32).expand(3, -1, -1, -1)
    together = condition.simulate(Conditions(), x, [stream(0, "c", n) for n in (0, 1, 0)]).low_resolution
    alone = condition.simulate(Conditions(), x[:1], [stream(0, "c", 1)]).low_resolution
    assert together is not None
    assert alone is not None
    assert torch.equal(together[1], alone[0])
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])


def test_it_is_enlarged_where_the_factor_exceeds_f() -> None:
    condition, small = build(factor=8), random_pixels(1, 3, 4, 4)
    expected = F.interpolate(small, size=(16, 16), mode="bicubic")
    enlarged = condition(small, (16, 16))
    assert enlarged.shape == (1, 3, 16, 16)
    # Two bicubic kernels, a = -1/2 and -3/4.
    assert (enlarged - expected).abs().max() < 0.3
    assert condition.image_size(small) == (32, 32)


def test_null_and_dropping() -> None:
    conditioner = Conditioner({"low_resolution": build()})
    inputs = conditioner.prepare(Conditions(low_resolution=random_pixels(2, 3, 8, 8)), TOOLS)
    dropped = conditioner.drop(inputs, torch.tensor([[0.6], [0.4]]))["low_resolution"]
    assert torch.equal(dropped[0], inputs["low_resolution"][0])
    assert not dropped[1].any()
    assert not conditioner.null_inputs(inputs)["low_resolution"].any()
    never = Conditioner({"low_resolution": build(drop_probability=0.0)})
    assert torch.equal(never.null_inputs(inputs)["low_resolution"], inputs["low_resolution"])
    assert conditioner.spatial_channels == 3


def test_gradients_reach_the_image() -> None:
    small = random_pixels(1, 3, 4, 4).requires_grad_()
    build()(small, (8, 8)).sum().backward()
    torch.testing.assert_close(small.grad, torch.full_like(small, 4.0), atol=2.0, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    condition = build()
    with pytest.raises(ConfigError, match="needs the image that is to be enlarged"):
        condition.prepare(Conditions(), TOOLS)
    with pytest.raises(ConfigError, match=re.escape("shape (1, 1, 8, 8): must be (images, 3, height, width)")):
        condition.prepare(Conditions(low_resolution=random_pixels(1, 1, 8, 8)), TOOLS)
    with pytest.raises(ConfigError, match=r"of 8x6 pixels beside an image of 32x32: .*factor=4 makes it 32x24"):
        condition.prepare(
            Conditions(low_resolution=random_pixels(1, 3, 8, 6), images=random_pixels(1, 3, 32, 32)), TOOLS
        )
    for size in ((8, 8), (4, 3)):
        with pytest.raises(ConfigError, match=f"of 8x6 pixels for latents of {size[0]}x{size[1]}: .* to 32x24 pixels"):
            condition(random_pixels(1, 3, 8, 6), size)
    with pytest.raises(ConfigError, match=r"images of 30x32 pixels do not divide by .*factor=4"):
        condition.simulate(Conditions(), random_pixels(1, 3, 30, 32), [])
