"""Checksums of tensors."""

from __future__ import annotations

import math

import pytest
import torch

from ldm_scale.engine.health import checksum


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
