"""The autoencoder: shapes, statistics that are undone exactly, the posterior, its KL divergence."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as distributions_kl

from ldm_scale.config.schema import AutoencoderConfig
from ldm_scale.models.autoencoder import LOGVAR_RANGE, AutoencoderOutput, LatentStatistics, kl_divergence
from ldm_scale.models.build import build_autoencoder, build_seeded

SMALL = AutoencoderConfig(
    base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=3, norm_groups=4
)
ODD = [
    SMALL,
    dataclasses.replace(SMALL, channel_multipliers=(2,), mid_attention=False),
    dataclasses.replace(SMALL, channel_multipliers=(1, 3, 2), num_res_blocks=2, latent_channels=5),
    dataclasses.replace(SMALL, channel_multipliers=(1, 1, 2, 5), mid_attention=False),
]


@pytest.mark.parametrize("config", ODD)
def test_latents_are_f_times_smaller_and_come_back(config: AutoencoderConfig) -> None:
    autoencoder = build_autoencoder(config)
    f, c = 2 ** (len(config.channel_multipliers) - 1), config.latent_channels
    assert config.downsampling_factor == f
    x = torch.randn(2, 3, 2 * f, 4 * f)
    mean, logvar = autoencoder.encode_moments(x)
    assert mean.shape == logvar.shape == (2, c, 2, 4)
    pixels = autoencoder.decode_raw(mean)
    assert pixels.shape == x.shape
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    output = AutoencoderOutput(*autoencoder(x, torch.zeros_like(mean)))
    assert torch.allclose(output.reconstruction, pixels, atol=1e-6)
    assert torch.equal(output.mean, mean)
    assert torch.equal(output.logvar, logvar)
    assert output.last_features.shape == (2, config.base_channels * config.channel_multipliers[0], 2 * f, 4 * f)
    again = autoencoder.decoder.conv_out(output.last_features)
    assert torch.equal(again, output.reconstruction), (
        "the adaptive weight takes these features for the last layer's input"
    )


@pytest.mark.parametrize("config", ODD)
def test_every_parameter_has_a_gradient(config: AutoencoderConfig) -> None:
    autoencoder = build_autoencoder(config)
    side = 2 * config.downsampling_factor
    reconstruction, _, mean, logvar, *_ = autoencoder(
        torch.randn(2, 3, side, side), torch.randn(2, config.latent_channels, 2, 2)
    )
    (reconstruction.square().sum() + kl_divergence(mean, logvar).sum()).backward()
    assert [n for n, p in autoencoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_statistics_are_applied_once_and_undone_exactly() -> None:
    autoencoder = build_autoencoder(SMALL)
    x = torch.randn(2, 3, 8, 8)
    raw, _ = autoencoder.encode_moments(x)
    pixels = autoencoder.decode_raw(raw)
    autoencoder.statistics = LatentStatistics(shift=0.4, scale=2.5, num_images=9)
    z = autoencoder.encode(x)
    assert torch.allclose(z, (raw - 0.4) * 2.5, atol=1e-6)
    assert torch.allclose(autoencoder.decode(z), pixels, atol=1e-5)
    assert torch.equal(autoencoder.decode_raw(raw), pixels), "raw latents know of no statistics"


def test_a_sample_of_the_posterior_has_its_mean_and_deviation() -> None:
    autoencoder = build_autoencoder(SMALL)
    autoencoder.statistics = LatentStatistics(shift=0.1, scale=3.0)
    x = torch.randn(1, 3, 8, 8)
    mean, logvar = autoencoder.encode_moments(x)
    noise = torch.randn_like(mean)
    expected = Normal(mean, logvar.div(2).exp())
    z = autoencoder.encode(x, noise)
    assert torch.allclose(z, (expected.mean + expected.stddev * noise - 0.1) * 3.0, atol=1e-5)
    assert torch.equal(autoencoder.encode(x, torch.zeros_like(mean)), autoencoder.encode(x))


def test_the_log_variance_stays_in_its_range() -> None:
    autoencoder = build_autoencoder(SMALL)
    with torch.no_grad():
        autoencoder.quant_conv.weight.mul_(1e6)
    _, logvar = autoencoder.encode_moments(torch.randn(2, 3, 8, 8))
    assert (logvar.min().item(), logvar.max().item()) == LOGVAR_RANGE
    assert logvar.exp().isfinite().all()


def test_kl_divergence_equals_that_of_torch() -> None:
    mean, logvar = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    standard = Normal(torch.zeros(()), torch.ones(()))
    expected = distributions_kl(Normal(mean, (0.5 * logvar).exp()), standard).sum(dim=(1, 2, 3))
    actual = kl_divergence(mean, logvar)
    assert actual.shape == (3,)
    assert torch.allclose(actual, expected, rtol=1e-5)
    assert kl_divergence(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).item() == 0


def test_downsampling_pads_right_and_below_only() -> None:
    # VQGAN's padding: a shift of one pixel that exported weights depend on.
    autoencoder = build_autoencoder(dataclasses.replace(SMALL, norm_groups=8))
    downsample: Any = autoencoder.encoder.downsamples[0]
    x = torch.zeros(1, 8, 6, 6)
    x[:, :, 0, 0] = 1.0
    with torch.no_grad():
        downsample.conv.weight.fill_(1.0)
        downsample.conv.bias.zero_()
    assert downsample(x)[0, 0].tolist() == [[8, 0, 0], [0, 0, 0], [0, 0, 0]]
    x = torch.zeros(1, 8, 6, 6)
    x[:, :, 2, 2] = 1.0  # the corner that two windows share on each axis
    assert downsample(x)[0, 0].tolist() == [[8, 8, 0], [8, 8, 0], [0, 0, 0]]


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_seeded(lambda: build_autoencoder(SMALL), 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    second, other = (build_seeded(lambda: build_autoencoder(SMALL), seed) for seed in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.encoder.conv_in.weight, other.encoder.conv_in.weight)
