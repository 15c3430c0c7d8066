"""What the network predicts, and the algebra between that and the two ends of the forward process.

The samplers speak eps only. Another prediction type needs its training target here and a conversion to eps wrapped
around the denoiser; schedule, samplers and guidance stay as they are.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def training_target(prediction: Literal["eps"], z0: Tensor, noise: Tensor) -> Tensor:
    """What the network's output is compared with, in the shape of z0.

    Source: arXiv:2006.11239, eq. 14 (eps: the noise that was added).
    """
    assert prediction == "eps", f"no training target for prediction type {prediction!r}"
    return noise


def x0_from_eps(z_t: Tensor, eps: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """The clean latents that `z_t` would have come from if its noise were `eps`.

    Shapes: z_t and eps (B, ...), alpha_bar a number or broadcastable to them.
    Source: arXiv:2006.11239, eq. 15.
    """
    return (z_t - (1.0 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5


def eps_from_x0(z_t: Tensor, x0: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """The noise that `z_t` would hold if its clean latents were `x0`; the inverse of `x0_from_eps`.

    Shapes: as `x0_from_eps`.
    """
    return (z_t - alpha_bar**0.5 * x0) / (1.0 - alpha_bar) ** 0.5
