"""Processes of every kind and denoisers whose answers are known, for the tests of diffusion/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm_scale.config.schema import DiffusionConfig
from ldm_scale.diffusion.guidance import Denoiser
from ldm_scale.diffusion.process import DiscreteProcess, Process, build_process

KINDS: dict[str, dict[str, Any]] = {
    "eps": {},
    "v": {"prediction": "v"},
    "x0": {"prediction": "x0"},
    "cosine_v": {"prediction": "v", "schedule": "cosine"},
    "zero_v": {"prediction": "v", "zero_terminal_snr": True},
    "zero_x0": {"prediction": "x0", "zero_terminal_snr": True},
    "edm": {"prediction": "edm"},
    "edm_half": {"prediction": "edm", "sigma_data": 0.5},
    "flow": {"prediction": "flow"},
}


def process_of(kind: str, **overrides: Any) -> Process:
    """A process by its name in `KINDS`."""
    return build_process(DiffusionConfig(**KINDS[kind] | overrides))


def some_times(process: Process) -> Tensor:
    """Times from little noise to the most that sampling meets."""
    if isinstance(process, DiscreteProcess):
        return torch.tensor([0, 1, 250, 500, 998, 999])
    if process.cfg.prediction == "edm":
        return torch.tensor([0.002, 0.05, 0.5, 1.0, 7.0, 80.0])
    return torch.tensor([0.001, 0.1, 0.5, 0.7, 0.99, 1.0])


def toy_denoiser(process: Process) -> Denoiser:
    """A smooth, bounded function of latents and time that is no denoiser."""

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        seen = process.network_input(z, t)
        phase = process.network_time(t).reshape(-1, 1, 1, 1).to(z.dtype) / 150.0
        return torch.tanh(seen + 0.3 * seen.roll(1, dims=-1)) + 0.2 * torch.sin(phase)

    return denoise


def mixture_denoiser(process: Process, means: Tensor, std: float) -> Denoiser:
    """E[target | z_t], the best there is, where every element of z_0 is from the mixture of N(mean, std^2).

    Written with Bayes' rule for the two ends; the parameterisations appear as their papers define them.
    """

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c.to(z.dtype).reshape(-1, 1, 1, 1, 1) for c in process._exact(t))
        z = z[..., None]
        variance = (alpha * std) ** 2 + sigma**2
        posterior = torch.softmax(-0.5 * (z - alpha * means) ** 2 / variance, dim=-1)
        x0 = (posterior * (means + alpha * std**2 / variance * (z - alpha * means))).sum(-1)
        eps = (posterior * (sigma / variance * (z - alpha * means))).sum(-1)
        alpha, sigma, z = alpha[..., 0], sigma[..., 0], z[..., 0]
        match process.cfg.prediction:
            case "eps":
                return eps
            case "x0":
                return x0
            case "v":
                return alpha * eps - sigma * x0
            case "flow":
                return eps - x0
            case "edm":
                data = process.cfg.sigma_data
                skip = data**2 / (sigma**2 + data**2)
                return (x0 - skip * z) / (sigma * data / (sigma**2 + data**2).sqrt())

    return denoise
