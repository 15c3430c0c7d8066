"""What the network's output means: the algebra between it, the noised latents and their two ends.

Every parameterisation is linear, so that each is six coefficients of the noise level. They hold for z_t = alpha z_0 +
sigma noise; v asks for alpha^2 + sigma^2 = 1, edm for alpha = 1, flow for alpha + sigma = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["eps", "v", "x0", "edm", "flow"]


@dataclass(frozen=True, eq=False)
class Parameterisation:
    """Coefficients per image, (B,) each.

    target = target_z0 z_0 + target_noise noise; x0 = x0_z z_t + x0_output output; eps = eps_z z_t + eps_output output.
    """

    target_z0: Tensor
    target_noise: Tensor
    x0_z: Tensor
    x0_output: Tensor
    eps_z: Tensor
    eps_output: Tensor


def parameterisation(prediction: Prediction, alpha: Tensor, sigma: Tensor, sigma_data: float = 1.0) -> Parameterisation:
    """The coefficients of `prediction` at noise levels.

    Where a coefficient has no finite value (eps without signal, x0 without noise) it is not finite here either.
    Shapes: alpha and sigma (B,).
    Source: arXiv:2006.11239, eq. 15 (eps); arXiv:2202.00512, appendix D (v); arXiv:2206.00364, eq. 7 and Table 1 (edm);
    arXiv:2209.03003, eq. 1 with time reversed (flow).
    """
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction == "eps":
        return Parameterisation(zero, one, 1 / alpha, -sigma / alpha, zero, one)
    if prediction == "v":
        return Parameterisation(-sigma, alpha, alpha, -sigma, sigma, alpha)
    if prediction == "x0":
        return Parameterisation(one, zero, zero, one, 1 / sigma, -alpha / sigma)
    if prediction == "flow":
        return Parameterisation(-one, one, one, -sigma, one, alpha)
    variance = sigma.square() + sigma_data**2
    skip, out = sigma_data**2 / variance, sigma * sigma_data / variance.sqrt()
    # (1 - skip) / out and its like, with the sigma that they share divided out: exact for any sigma.
    residual = sigma / (sigma_data * variance.sqrt())
    return Parameterisation(
        target_z0=residual,
        target_noise=-sigma_data / variance.sqrt(),
        x0_z=skip,
        x0_output=out,
        eps_z=sigma / variance,
        eps_output=-sigma_data / variance.sqrt(),
    )
