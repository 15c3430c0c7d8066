"""Losses per image and their weights against the formulas of the papers."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from ldm_scale.diffusion.loss import diffusion_loss
from tests.helpers.processes import KINDS, process_of, some_times


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_loss_is_each_images_mean_in_float32(kind: Literal["l2", "l1"]) -> None:
    generator = torch.Generator().manual_seed(2)
    prediction = torch.randn(3, 4, 8, 8, generator=generator).bfloat16()
    target = torch.randn(3, 4, 8, 8, generator=generator)
    loss = diffusion_loss(prediction, target, kind)
    reference = torch.nn.functional.mse_loss if kind == "l2" else torch.nn.functional.l1_loss
    expected = torch.stack([reference(p.double(), q.double()) for p, q in zip(prediction, target, strict=True)])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float())


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "p2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weighted_loss_is_the_weighted_error_of_the_clean_latents(kind: str, weighting: Any) -> None:
    """All three papers weight one quantity, the error of x0 at an SNR; the network's parameterisation is no matter."""
    gamma, k = 4.0, 0.5
    process = process_of(kind, weighting=weighting, snr_gamma=gamma, p2_gamma=0.7, p2_k=k)
    t = some_times(process)
    generator = torch.Generator().manual_seed(0)
    z0, noise, output = (torch.randn(len(t), 2, 4, 4, generator=generator).double() for _ in range(3))
    x0 = process.x0(process.add_noise(z0, noise, t), output, t)
    error = (x0 - z0).square().mean(dim=(1, 2, 3))
    alpha, sigma = (c.double() for c in process.coefficients(t))
    snr = alpha.square() / sigma.square()
    weight: Tensor
    if weighting == "min_snr":
        weight = snr.clamp(max=gamma)
    elif weighting == "soft_min_snr":
        weight = snr * gamma / (snr + gamma)
    else:
        weight = snr / (k + snr) ** 0.7
    torch.testing.assert_close(process.loss(output, z0, noise, t).double(), weight * error, rtol=2e-4, atol=1e-7)


def test_weights_of_known_losses() -> None:
    """min-SNR as its paper and diffusers' recipes write it for the network's own output."""
    t = torch.tensor([0, 300, 999])
    for kind in ("eps", "v", "x0"):
        process = process_of(kind, weighting="min_snr")
        snr = process.log_snr(t).exp()
        capped = snr.clamp(max=5.0)
        expected = {"eps": capped / snr, "v": capped / (snr + 1), "x0": capped}[kind]
        torch.testing.assert_close(process.weights(t), expected, rtol=1e-4, atol=0)
    p2 = process_of("eps", weighting="p2")
    torch.testing.assert_close(p2.weights(t), 1 / (1 + p2.log_snr(t).exp()), rtol=1e-4, atol=0)
    assert torch.equal(process_of("eps").weights(t), torch.ones(3))


def test_edm_weights_errors_of_x0_as_its_paper() -> None:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the error of the denoiser D."""
    process = process_of("edm_half")
    t = some_times(process)
    generator = torch.Generator().manual_seed(1)
    z0, noise, output = (torch.randn(len(t), 2, 4, 4, generator=generator).double() for _ in range(3))
    denoised = process.x0(process.add_noise(z0, noise, t), output, t)
    sigma = t.double()
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = weight * (denoised - z0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(process.loss(output, z0, noise, t).double(), expected, rtol=1e-6, atol=0)
