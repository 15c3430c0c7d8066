"""The forward process: how much noise a latent carries at each timestep, and which timesteps a sampler visits.

Timesteps are the integers 0 .. T-1 and t = 0 is already slightly noisy, as in the released latent diffusion models.
The tables are computed in float64, because a product of a thousand factors near one loses digits in float32, and
kept in float32. Sampling visits evenly spaced timesteps shifted by one ("leading" spacing with offset 1): the
convention that Stable Diffusion ships with, so that samples agree with other software step by step. Its price is
that a step count that does not divide T leaves the noisiest timesteps out (50 of 1000 starts at 981, 750 at 750).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_scale.config.schema import DiffusionConfig
from ldm_scale.errors import ConfigError


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Tables of the forward process q(z_t | z_0) = N(sqrt(abar_t) z_0, (1 - abar_t) I).

    Shapes: betas (T,), alphas_cumprod (T,), both float32 on one device.
    Source: arXiv:2006.11239, eq. 2 and 4.
    """

    betas: Tensor
    alphas_cumprod: Tensor

    @property
    def num_timesteps(self) -> int:
        """T, the number of noise levels."""
        return self.betas.shape[0]

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its tables on `device`."""
        return NoiseSchedule(self.betas.to(device), self.alphas_cumprod.to(device))

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise.

        Shapes: z0 and noise (B, ...), t (B,) int64; returns (B, ...) in float32, or in z0's type where it is wider.
        Source: arXiv:2006.11239, eq. 4.
        """
        alpha_bar = expand_like(self.alphas_cumprod[t], z0)
        return alpha_bar.sqrt() * z0 + (1.0 - alpha_bar).sqrt() * noise

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio abar_t / (1 - abar_t) in the shape of t (arXiv:2107.00630, eq. 2)."""
        alpha_bar = self.alphas_cumprod[t]
        return alpha_bar / (1.0 - alpha_bar)


def build_schedule(cfg: DiffusionConfig) -> NoiseSchedule:
    """The schedule that `cfg` names, on the CPU.

    "linear" is the latent diffusion paper's: linear in sqrt(beta), not in beta.
    Raises: ConfigError if the betas are not increasing inside (0, 1).
    Source: arXiv:2112.10752, appendix B; arXiv:2006.11239, section 4 (the name).
    """
    if cfg.num_timesteps < 1:
        raise ConfigError(f"diffusion.num_timesteps = {cfg.num_timesteps}: must be at least 1")
    if not 0.0 < cfg.beta_start <= cfg.beta_end < 1.0:
        raise ConfigError(
            f"diffusion.beta_start = {cfg.beta_start}, diffusion.beta_end = {cfg.beta_end}: "
            "must satisfy 0 < beta_start <= beta_end < 1; the paper has 0.00085 and 0.012"
        )
    betas = torch.linspace(cfg.beta_start**0.5, cfg.beta_end**0.5, cfg.num_timesteps, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    return NoiseSchedule(betas.float(), alphas_cumprod.float())


def sampling_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """The `num_steps` timesteps that a sampler visits, noisiest first.

    Multiples of floor(T / S), shifted up by one. S = T visits every timestep, so there the shift must be 0.
    Raises: ConfigError unless 1 <= num_steps <= num_timesteps.
    Source: arXiv:2010.02502, appendix D.2 ("linear" subsequence); arXiv:2305.08891, Table 2 ("leading").
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ConfigError(
            f"sampling.num_steps = {num_steps}: must be between 1 and diffusion.num_timesteps = {num_timesteps}"
        )
    stride = num_timesteps // num_steps
    offset = min(1, num_timesteps - 1 - (num_steps - 1) * stride)
    return [offset + i * stride for i in reversed(range(num_steps))]


def expand_like(per_image: Tensor, like: Tensor) -> Tensor:
    """`per_image` (B,) as (B, 1, ..., 1) with as many dimensions as `like`."""
    return per_image.reshape(-1, *(1,) * (like.ndim - 1))
