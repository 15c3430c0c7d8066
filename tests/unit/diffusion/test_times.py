"""Uniform numbers of training: evenly spread over a global batch, whoever holds its images."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from ldm_scale.diffusion.times import normal_quantile, stratified_uniforms


@pytest.mark.parametrize("offset", [0.0, 0.37, 1.0 - 2.0**-53])
@pytest.mark.parametrize("first", [0, 24, 1_000_003])
def test_every_part_of_a_global_batch_has_one_number_in_each_stratum(first: int, offset: float) -> None:
    u = stratified_uniforms(range(first, first + 12), 12, offset)
    assert u.dtype == torch.float64
    assert ((u >= 0) & (u < 1)).all()
    # The strata begin at the offset; a distance of 1/12 around the circle is theirs, up to the last digit.
    around = torch.cat([u.sort().values, u.min()[None] + 1]).diff()
    torch.testing.assert_close(around, torch.full((12,), 1 / 12, dtype=torch.float64), rtol=0, atol=1e-12)


def test_numbers_do_not_depend_on_who_asks() -> None:
    whole = stratified_uniforms(range(48, 64), 16, 0.25)
    parts = torch.cat([stratified_uniforms(range(48 + i, 64, 4), 16, 0.25) for i in range(4)])
    assert torch.equal(parts.reshape(4, 4).T.flatten(), whole)


def test_each_image_is_uniform_over_offsets() -> None:
    generator = torch.Generator().manual_seed(0)
    offsets = torch.rand(4000, generator=generator).tolist()
    u = torch.cat([stratified_uniforms([5], 16, offset) for offset in offsets])
    assert stats.kstest(u.numpy(), "uniform").pvalue > 0.01


def test_normal_quantile_is_finite_everywhere_and_scipys() -> None:
    u = torch.tensor([0.0, 1e-12, 0.025, 0.5, 0.8, 1.0 - 2.0**-53], dtype=torch.float64)
    quantiles = normal_quantile(u)
    assert quantiles.isfinite().all()
    torch.testing.assert_close(quantiles[1:], torch.from_numpy(stats.norm.ppf(u[1:].numpy())), rtol=1e-6, atol=1e-12)
