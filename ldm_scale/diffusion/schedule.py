"""Discrete schedules: how much noise each of T timesteps holds, and which timesteps a sampler visits.

Timesteps are the integers 0 .. T-1 and t = 0 is already slightly noisy, as in the released latent diffusion models.
Tables are float64: a product of a thousand factors near one loses digits in float32, and so does one minus it.
Sampling visits evenly spaced timesteps shifted by one ("leading" spacing with offset 1): the convention that Stable
Diffusion ships with, so that samples agree with other software step by step. Its price is that a step count that does
not divide T leaves the noisiest timesteps out (50 of 1000 starts at 981, 750 at 750), and that few steps start where
the image would still be seen: one step at 1, which returns the noise. So fewer than ten steps are visited from the end
("trailing" spacing: 4 of 1000 start at 999), and so is a schedule that ends in noise alone, with any number of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm_scale.config.schema import DiffusionConfig
from ldm_scale.errors import ConfigError

_MAX_COSINE_BETA = 0.999
# Fewer are trailing. Ten of 1000 start at 901, where the paper's schedule leaves an eighth of the image's amplitude.
_LEAST_LEADING_STEPS = 10


def alphas_cumprod(cfg: DiffusionConfig) -> Tensor:
    """abar (T,) of the schedule that `cfg` names, float64 on the CPU.

    "linear" is the latent diffusion paper's: linear in sqrt(beta), not in beta.
    Raises: ConfigError if the betas are not increasing inside (0, 1), or nothing could be learned at the last timestep.
    Source: arXiv:2112.10752, appendix B (linear); arXiv:2102.09672, eq. 17 (cosine).
    """
    if cfg.num_timesteps < 1:
        raise ConfigError(f"diffusion.num_timesteps={cfg.num_timesteps}: must be at least 1")
    if not 0.0 < cfg.beta_start <= cfg.beta_end < 1.0:
        raise ConfigError(
            f"diffusion.beta_start={cfg.beta_start}, diffusion.beta_end={cfg.beta_end}: must satisfy "
            "0 < beta_start <= beta_end < 1, the noise grows with t; the paper has 0.00085 and 0.012"
        )
    if cfg.schedule == "cosine":
        betas = _cosine_betas(cfg.num_timesteps)
    else:
        betas = torch.linspace(cfg.beta_start**0.5, cfg.beta_end**0.5, cfg.num_timesteps, dtype=torch.float64) ** 2
    products = torch.cumprod(1.0 - betas, dim=0)
    if not cfg.zero_terminal_snr:
        return products
    if cfg.prediction == "eps":
        raise ConfigError(
            "diffusion.zero_terminal_snr=true: at the last timestep the latents are the noise, and "
            "diffusion.prediction=eps would learn nothing there; set diffusion.prediction=v or x0"
        )
    return rescale_to_zero_terminal_snr(products)


def rescale_to_zero_terminal_snr(products: Tensor) -> Tensor:
    """abar (T,) whose last is 0: sqrt(abar) shifted, then scaled so that the first stays.

    Raises: ConfigError for a single timestep, which is both.
    Source: arXiv:2305.08891, algorithm 1.
    """
    if len(products) < 2:
        raise ConfigError("diffusion.zero_terminal_snr=true: needs at least 2 timesteps; raise diffusion.num_timesteps")
    roots = products.sqrt()
    return ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))).square()


def sampling_timesteps(num_timesteps: int, num_steps: int, trailing: bool = False) -> list[int]:
    """The `num_steps` timesteps that a sampler visits, noisiest first.

    Multiples of floor(T / S), shifted up by one. S = T visits every timestep, so there the shift must be 0.
    Trailing, as fewer than ten steps always are: round(T - i T / S) - 1 for i = 0 .. S-1.
    Raises: ConfigError unless 1 <= num_steps <= num_timesteps.
    Source: arXiv:2010.02502, appendix D.2 ("linear" subsequence); arXiv:2305.08891, Table 2 ("leading", "trailing").
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ConfigError(
            f"sampling.num_steps={num_steps}: must be between 1 and diffusion.num_timesteps={num_timesteps}; change it"
        )
    if trailing or num_steps < _LEAST_LEADING_STEPS:
        return [round(num_timesteps - i * num_timesteps / num_steps) - 1 for i in range(num_steps)]
    stride = num_timesteps // num_steps
    offset = min(1, num_timesteps - 1 - (num_steps - 1) * stride)
    return [offset + i * stride for i in reversed(range(num_steps))]


def _cosine_betas(num_timesteps: int) -> Tensor:
    times = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    products = torch.cos((times + 0.008) / 1.008 * math.pi / 2).square()
    return (1.0 - products[1:] / products[:-1]).clamp(max=_MAX_COSINE_BETA)
