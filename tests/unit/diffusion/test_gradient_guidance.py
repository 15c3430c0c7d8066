"""Guidance by gradients against Gaussians, where prior, likelihood and posterior are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_scale.config.schema import DiffusionConfig
from ldm_scale.diffusion.gradient_guidance import classifier_guided, prediction_guided
from ldm_scale.diffusion.guidance import Denoiser
from ldm_scale.diffusion.process import Process, build_process, expand_like
from ldm_scale.diffusion.sampler import sample

CONFIGS = {
    "eps": DiffusionConfig(prediction="eps"),
    "v": DiffusionConfig(prediction="v", zero_terminal_snr=True),
    "x0": DiffusionConfig(prediction="x0", schedule="cosine"),
    "edm": DiffusionConfig(prediction="edm"),
    "flow": DiffusionConfig(prediction="flow"),
}
PRIOR_VARIANCE, LIKELIHOOD_VARIANCE = 0.49, 0.09
Y = 1.5
SHAPE = (1, 2, 2)


def _moments(process: Process, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of z_0 given z_t."""
    alpha, sigma = (expand_like(level, z) for level in process.coefficients(t))
    total = alpha**2 * PRIOR_VARIANCE + sigma**2
    return alpha * PRIOR_VARIANCE / total * z, PRIOR_VARIANCE * sigma**2 / total


def _prior(process: Process) -> Denoiser:
    """The perfect denoiser of N(0, PRIOR_VARIANCE), in the process's parameterisation."""

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        mean, _ = _moments(process, z, t)
        alpha, sigma = (expand_like(level, z) for level in process.coefficients(t))
        return process.target(mean, (z - alpha * mean) / sigma, t)

    return denoise


def _posterior_mean(process: Process, z: Tensor, t: Tensor) -> Tensor:
    """E[z_0 | z_t, y]."""
    mean, variance = _moments(process, z, t)
    return (mean / variance + Y / LIKELIHOOD_VARIANCE) / (1 / variance + 1 / LIKELIHOOD_VARIANCE)


def _log_likelihood(process: Process, z: Tensor, t: Tensor) -> Tensor:
    """ln p(y | z_t) but for a constant."""
    mean, variance = _moments(process, z, t)
    return (-((Y - mean) ** 2) / (2 * (variance + LIKELIHOOD_VARIANCE))).flatten(1).sum(dim=1)


def _inputs(process: Process) -> tuple[Tensor, Tensor]:
    t = process.evaluation_times(torch.tensor([0.1, 0.5, 0.9]))
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2, t


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gaussian_prior_and_likelihood_give_their_posterior(name: str) -> None:
    process = build_process(CONFIGS[name])
    z, t = _inputs(process)
    guided = classifier_guided(_prior(process), process, lambda z, t: _log_likelihood(process, z, t), scale=1.0)
    x0 = process.x0(z, guided(z, t), t)
    torch.testing.assert_close(x0, _posterior_mean(process, z, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_clean_latents_guides_through_the_prediction(name: str) -> None:
    """The prediction is linear in z_t, so the gradient is (y - mean) d mean / dz over the variance."""
    process = build_process(CONFIGS[name])
    z, t = _inputs(process)
    prior = _prior(process)

    def log_prob(x0: Tensor) -> Tensor:
        return (-((Y - x0) ** 2) / (2 * LIKELIHOOD_VARIANCE)).flatten(1).sum(dim=1)

    mean, _ = _moments(process, z, t)
    alpha, sigma = (expand_like(level, z) for level in process.coefficients(t))
    gradient = (Y - mean) / LIKELIHOOD_VARIANCE * alpha * PRIOR_VARIANCE / (alpha**2 * PRIOR_VARIANCE + sigma**2)
    output = prediction_guided(prior, process, log_prob, scale=0.3)(z, t)
    expected = process.eps(z, prior(z, t), t) - 0.3 * sigma * gradient
    torch.testing.assert_close(process.eps(z, output, t), expected, rtol=1e-4, atol=1e-4)
    assert not output.requires_grad


@pytest.mark.parametrize(("name", "sampler"), [("eps", "ddim"), ("v", "dpmpp_2m"), ("edm", "heun"), ("flow", "euler")])
def test_samples_have_the_posteriors_mean_and_deviation(name: str, sampler: str) -> None:
    process = build_process(CONFIGS[name])
    guided = classifier_guided(_prior(process), process, lambda z, t: _log_likelihood(process, z, t), scale=1.0)
    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    z0 = sample(guided, noise, process, sampler=sampler, num_steps=100)  # type: ignore[arg-type]
    precision = 1 / PRIOR_VARIANCE + 1 / LIKELIHOOD_VARIANCE
    assert abs(z0.mean() - Y / LIKELIHOOD_VARIANCE / precision) < 0.03
    assert abs(z0.std() / precision**-0.5 - 1) < 0.08


def test_without_signal_nothing_is_guided() -> None:
    process = build_process(CONFIGS["v"])
    z, t = torch.randn(2, *SHAPE), torch.tensor([999, 500])
    output = prediction_guided(lambda z, t: 0.5 * z, process, lambda x0: x0.flatten(1).sum(dim=1), scale=1.0)(z, t)
    assert torch.equal(output[0], 0.5 * z[0])
    assert (output[1] != 0.5 * z[1]).all()


def test_scale_0_is_the_denoiser_itself() -> None:
    process = build_process(CONFIGS["eps"])
    denoiser = _prior(process)
    assert classifier_guided(denoiser, process, lambda z, t: z.sum(), 0.0) is denoiser
    assert prediction_guided(denoiser, process, lambda x0: x0.sum(), 0.0) is denoiser
