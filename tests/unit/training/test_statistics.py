"""Latent statistics: merged without cancelling, one scalar or channel by channel, refused for constant latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm_scale.errors import NumericsError
from ldm_scale.training.statistics import Moments, latent_statistics, merge, require_difference


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e9])
def test_merged_moments_equal_numpys_over_all_data(offset: float) -> None:
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 0.01, 30.0])[None, :, None, None]
    parts = [offset + scales * rng.normal(size=(size, 3, 2, 4)) for size in (1, 90, 0, 3, 250, 1)]
    merged = merge(Moments.of(torch.from_numpy(part)) for part in parts)
    whole = np.concatenate(parts)
    assert merged.count.tolist() == [whole.size / 3] * 3
    np.testing.assert_allclose(merged.mean.numpy(), whole.mean(axis=(0, 2, 3)), rtol=1e-12)
    # Sums of squares would keep no digit of the variance at an offset of 1e9, where 0.01 is 1e5 roundings.
    np.testing.assert_allclose(merged.std.numpy(), (whole - offset).std(axis=(0, 2, 3)), rtol=1e-4)
    scalar = merged.over_channels()
    assert scalar.mean.item() == pytest.approx(whole.mean(), rel=1e-12)
    assert scalar.std.item() == pytest.approx((whole - offset).std(), rel=1e-6)


def test_one_scalar_without_a_shift_by_default() -> None:
    z = torch.randn(50, 2, 4, 4) * 3 + 1
    statistics = latent_statistics(Moments.of(z), 50, "scalar", "sample")
    assert (statistics.shift, statistics.num_images, statistics.channel_mean) == (0.0, 50, ())
    assert statistics.scale == pytest.approx(1 / z.double().std(correction=0).item(), rel=1e-6)


def test_each_channel_gets_mean_zero_and_deviation_one() -> None:
    z = torch.randn(50, 3, 4, 4) * torch.tensor([0.1, 1.0, 9.0]).view(3, 1, 1) + torch.tensor([5.0, 0.0, -2.0]).view(
        3, 1, 1
    )
    statistics = latent_statistics(Moments.of(z), 50, "per_channel", "mode")
    normalized = statistics.normalize(z)
    assert normalized.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(normalized.std(dim=(0, 2, 3), correction=0), torch.ones(3))
    torch.testing.assert_close(statistics.denormalize(normalized), z, rtol=1e-5, atol=1e-5)
    assert statistics.posterior == "mode"


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_constant_latents_are_refused(value: float) -> None:
    moments = merge(Moments.of(torch.full((size, 2, 2, 2), value)) for size in (3, 5))
    for kind in ("scalar", "per_channel"):
        with pytest.raises(NumericsError, match="constant or not finite"):
            latent_statistics(moments, 8, kind, "sample")


def test_one_constant_channel_names_itself() -> None:
    z = torch.randn(8, 3, 4, 4)
    z[:, 1] = 0.5
    with pytest.raises(NumericsError, match=r"channel 1 of the latents of 8 images.*latents.statistics=scalar"):
        latent_statistics(Moments.of(z), 8, "per_channel", "sample")
    latent_statistics(Moments.of(z), 8, "scalar", "sample")


def test_not_finite_latents_are_refused() -> None:
    z = torch.randn(4, 2, 2, 2)
    z[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        latent_statistics(Moments.of(z), 4, "scalar", "sample")


def _places(mean: torch.Tensor) -> Moments:
    return Moments.of(mean.flatten(1)[:, :, None, None])


def test_images_that_differ_by_noise_alone_are_refused() -> None:
    one = torch.randn(1, 3, 4, 4)
    same, noise = one.expand(16, -1, -1, -1), torch.randn(16, 3, 4, 4)
    with pytest.raises(NumericsError, match="the latents of 16 images differ by 0 from image to image"):
        require_difference(_places(same), Moments.of(same + noise), 16)
    collapsed = 1e-4 * noise
    with pytest.raises(NumericsError, match="collapsed to noise"):
        require_difference(_places(collapsed), Moments.of(collapsed + torch.randn(16, 3, 4, 4)), 16)
    require_difference(_places(noise), Moments.of(noise), 16)
    require_difference(_places(one), Moments.of(one), 1)
