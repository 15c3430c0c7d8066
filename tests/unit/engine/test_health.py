"""Metrics that are not finite stop the run and say where; checksums of tensors."""

from __future__ import annotations

import math

import pytest
import torch

from ldm_scale.engine.health import checksum, require_finite
from ldm_scale.errors import NumericsError


def test_finite_metrics_pass() -> None:
    require_finite({"loss": 0.0, "norm": 1e300, "negative": -5.0}, step=1, images=8)
    require_finite({}, step=0, images=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_others_are_named_with_step_and_images(value: float) -> None:
    with pytest.raises(NumericsError) as caught:
        require_finite({"loss/l1": 0.5, "loss/kl": value, "weight": value}, step=41, images=5_248)
    message = str(caught.value)
    assert f"step 41 (5248 images): loss/kl={value}, weight={value};" in message
    assert "loss/l1" not in message


def test_the_history_that_led_there_is_told() -> None:
    with pytest.raises(NumericsError, match=r"loss=nan \(gradient norm 3, then 8000\); the step's"):
        require_finite({"loss": math.nan}, step=1, images=8, history="gradient norm 3, then 8000")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("size", [1, 1000, 5000])
def test_a_checksum_changes_with_every_bit_and_with_the_order(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randint(0, 2, (size,), generator=generator).to(dtype)
    numbers = {checksum(x)}
    assert checksum(x.clone()) in numbers
    for place in sorted({0, size // 2, size - 1}):
        other = x.clone()
        other[place] = other[place] == 0
        numbers.add(checksum(other))
    assert len(numbers) == 1 + len({0, size // 2, size - 1})
    if size > 1:  # the same elements, two of them exchanged, neighbours and far apart
        y = torch.arange(size).remainder(2).to(dtype)
        exchanged = [y[[1, 0, *range(2, size)]], torch.cat([y[-1:], y[1:-1], y[:1]])]
        assert len({checksum(y), *map(checksum, exchanged)}) == 3


def test_a_checksum_of_a_view_and_of_what_is_not_finite() -> None:
    x = torch.arange(12.0).view(3, 4)
    assert checksum(x.t()) == checksum(x.t().contiguous()) != checksum(x)
    y = torch.arange(9000.0)
    for start in range(3):  # fragments begin anywhere in the tensor that the optimizer steps
        assert checksum(y[start : start + 5000]) == checksum(y[start : start + 5000].clone())
    x[1, 1] = math.nan
    assert checksum(x) == checksum(x.clone())
