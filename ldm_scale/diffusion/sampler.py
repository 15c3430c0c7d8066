"""Reverse processes: DDIM and ancestral DDPM over a subset of the timesteps.

Coefficients are Python floats, read from the schedule once, so that a step never waits for the device; latents stay
in the type of the initial noise (give float32) whatever the denoiser computes in. The two samplers end differently,
each as its reference does: DDIM's last step goes to the noise level of t = 0 (which is not quite 0), DDPM's to 0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm_scale.diffusion.guidance import Denoiser
from ldm_scale.diffusion.prediction import x0_from_eps
from ldm_scale.diffusion.schedule import NoiseSchedule, sampling_timesteps
from ldm_scale.errors import ConfigError


@dataclass(frozen=True)
class ImageNoise:
    """Noise in which image i depends on `seeds[i]` alone: not on the batch, the other images or the device.

    Every draw has its own generator, seeded by (seed, draw), so draws may be taken in any order.
    Shapes: shape is one image's (c, h, w).
    """

    seeds: tuple[int, ...]
    shape: tuple[int, ...]
    device: torch.device | str = "cpu"

    def initial(self) -> Tensor:
        """z_T ~ N(0, I), (len(seeds), c, h, w) in float32."""
        return self._draw("initial")

    def step(self, index: int) -> Tensor:
        """The noise of sampling step `index` (0 = first), (len(seeds), c, h, w) in float32."""
        return self._draw(f"step {index}")

    def _draw(self, name: str) -> Tensor:
        images = []
        for seed in self.seeds:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            images.append(torch.randn(self.shape, generator=generator))
        return torch.stack(images).to(self.device)


def sample(
    denoiser: Denoiser,
    initial_noise: Tensor,
    schedule: NoiseSchedule,
    *,
    sampler: Literal["ddim", "ddpm"],
    num_steps: int,
    eta: float = 0.0,
    step_noise: Callable[[int], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents z_0 that the reverse process reaches from z_T = `initial_noise`, without gradients.

    `denoiser(z, t)` returns eps; `step_noise(i)` the noise of step i (unused by DDIM with eta 0); `progress(n)` is
    called after every step with the number of steps done.
    Shapes: initial_noise (B, c, h, w); t (B,) int64; step_noise(i) and the result as initial_noise.
    Raises: ConfigError if num_steps or eta cannot be used.
    Source: arXiv:2010.02502, eq. 12 and 16 (ddim); arXiv:2006.11239, algorithm 2 with the posterior of eq. 7 (ddpm).
    """
    _check_eta(sampler, eta)
    timesteps = sampling_timesteps(schedule.num_timesteps, num_steps)
    alphas_cumprod: list[float] = schedule.alphas_cumprod.tolist()
    stochastic = sampler == "ddpm" or eta > 0.0
    assert step_noise is not None or not stochastic, f"{sampler} with eta {eta} needs step_noise"

    z = initial_noise
    for index, t in enumerate(timesteps):
        alpha_bar = alphas_cumprod[t]
        alpha_bar_prev = _previous_alpha_bar(sampler, alphas_cumprod, timesteps, index)
        with torch.no_grad():
            eps = denoiser(z, torch.full((z.shape[0],), t, dtype=torch.int64, device=z.device)).to(z.dtype)
            noise = step_noise(index) if stochastic and step_noise is not None else None
            if sampler == "ddim":
                z = ddim_step(z, eps, alpha_bar, alpha_bar_prev, eta, noise)
            else:
                assert noise is not None, "checked above"
                z = ddpm_step(z, eps, alpha_bar, alpha_bar_prev, noise)
        if progress is not None:
            progress(index + 1)
    return z


def ddim_step(
    z_t: Tensor, eps: Tensor, alpha_bar: float, alpha_bar_prev: float, eta: float, noise: Tensor | None
) -> Tensor:
    """Latents at the previous visited timestep; `noise` may be None if eta is 0.

    Source: arXiv:2010.02502, eq. 12 with sigma of eq. 16.
    """
    sigma = eta * math.sqrt(posterior_variance(alpha_bar, alpha_bar_prev))
    direction = math.sqrt(max(0.0, 1.0 - alpha_bar_prev - sigma**2))
    z = math.sqrt(alpha_bar_prev) * x0_from_eps(z_t, eps, alpha_bar) + direction * eps
    return z if noise is None else z + sigma * noise


def ddpm_step(z_t: Tensor, eps: Tensor, alpha_bar: float, alpha_bar_prev: float, noise: Tensor) -> Tensor:
    """A draw from the posterior q(z_prev | z_t, x0) at the x0 that `eps` implies (variance "fixed small").

    Between visited timesteps the step's own beta is 1 - abar_t / abar_prev (arXiv:2102.09672, eq. 19).
    Source: arXiv:2006.11239, eq. 7.
    """
    alpha = alpha_bar / alpha_bar_prev
    x0_share = math.sqrt(alpha_bar_prev) * (1.0 - alpha) / (1.0 - alpha_bar)
    z_share = math.sqrt(alpha) * (1.0 - alpha_bar_prev) / (1.0 - alpha_bar)
    mean = x0_share * x0_from_eps(z_t, eps, alpha_bar) + z_share * z_t
    return mean + math.sqrt(posterior_variance(alpha_bar, alpha_bar_prev)) * noise


def posterior_variance(alpha_bar: float, alpha_bar_prev: float) -> float:
    """Variance of q(z_prev | z_t, x0), 0 at the last step (arXiv:2006.11239, eq. 7; arXiv:2010.02502, eq. 16)."""
    return (1.0 - alpha_bar_prev) / (1.0 - alpha_bar) * (1.0 - alpha_bar / alpha_bar_prev)


def _previous_alpha_bar(
    sampler: Literal["ddim", "ddpm"], alphas_cumprod: list[float], timesteps: Sequence[int], index: int
) -> float:
    """abar at the timestep after `timesteps[index]`, which for the last one is the sampler's own end."""
    if index + 1 < len(timesteps):
        return alphas_cumprod[timesteps[index + 1]]
    return alphas_cumprod[0] if sampler == "ddim" else 1.0


def _check_eta(sampler: Literal["ddim", "ddpm"], eta: float) -> None:
    if not 0.0 <= eta <= 1.0:
        raise ConfigError(f"sampling.eta = {eta}: must be between 0 (deterministic) and 1 (DDPM-like)")
    if sampler == "ddpm" and eta != 0.0:
        raise ConfigError(f"sampling.eta = {eta}: eta belongs to sampling.sampler=ddim; leave it at 0 for ddpm")
