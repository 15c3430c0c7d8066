"""Rates against torch.distributions and counts by hand."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm_scale.config.schema import AutoencoderConfig
from ldm_scale.evaluation.rate import CodeUsage, GaussianRate, numbers_per_pixel

PIXELS = 3 * 8 * 8


@pytest.fixture
def posteriors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.5, 1.0, 3.0, 7.0]).view(1, 4, 1, 1)
    mean = torch.randn(3, 4, 2, 2, generator=generator) * scale + scale
    return mean, torch.randn(3, 4, 2, 2, generator=generator) - 3


def rate_of(mean: torch.Tensor, logvar: torch.Tensor) -> GaussianRate:
    rate = GaussianRate(mean.shape[1])
    rate.add(mean[:1], logvar[:1], PIXELS // 3)
    rate.add(mean[1:], logvar[1:], 2 * PIXELS // 3)
    return rate


def test_kl_from_the_standard_normal(posteriors: tuple[torch.Tensor, torch.Tensor]) -> None:
    mean, logvar = posteriors
    nats = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum().item()
    assert rate_of(mean, logvar).bits_per_pixel == pytest.approx(nats / math.log(2) / PIXELS, rel=1e-5)


def test_kl_from_fitted_gaussians(posteriors: tuple[torch.Tensor, torch.Tensor]) -> None:
    mean, logvar = (value.double() for value in posteriors)
    centre = mean.mean(dim=(0, 2, 3), keepdim=True)
    spread = (logvar.exp() + (mean - centre).square()).mean(dim=(0, 2, 3), keepdim=True).sqrt()
    nats = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(centre, spread)).sum().item()
    rate = rate_of(mean, logvar)
    assert rate.fitted_bits_per_pixel == pytest.approx(nats / math.log(2) / PIXELS, rel=1e-9)
    assert rate.fitted_bits_per_pixel < rate.bits_per_pixel


def test_code_usage_by_hand() -> None:
    usage = CodeUsage(8)
    usage.add(torch.tensor([[[0, 0], [0, 0]]]), 16)
    usage.add(torch.tensor([[[5, 5], [7, 7]]]), 16)
    # 0 half of the time, 5 and 7 a quarter each: 1.5 bits a code, and 8 codes on 32 pixels.
    assert usage.share_used == 3 / 8
    assert usage.num_chosen == 8
    assert usage.entropy_bits == pytest.approx(1.5)
    assert usage.perplexity == pytest.approx(2**1.5)
    assert usage.bits_per_pixel == pytest.approx(3 * 8 / 32)
    assert usage.fitted_bits_per_pixel == pytest.approx(1.5 * 8 / 32)


def test_numbers_per_pixel() -> None:
    assert numbers_per_pixel(AutoencoderConfig(channel_multipliers=(1, 2, 4), latent_channels=3)) == 3 / 16
