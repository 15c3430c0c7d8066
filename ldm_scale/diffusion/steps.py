"""Single steps between two noise levels, each from what one network output says about the clean latents and the noise.

All hold for z = alpha z_0 + sigma noise with any alpha and sigma, so that one formula serves every process. Levels are
Python floats, so that a step never waits for the device; where one has no signal (alpha 0) or no noise (sigma 0) the
formulas stay finite.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm_scale.diffusion.process import Level


def ddim_step(
    x0: Tensor, eps: Tensor, now: Level, then: Level, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """Latents at `then`; `noise` may be None if eta is 0.

    With eta 0 this is Euler's step of the probability flow: for edm in sigma (arXiv:2206.00364, algorithm 1, line 6),
    for flow in t.
    Source: arXiv:2010.02502, eq. 12 with sigma of eq. 16.
    """
    deviation = eta * math.sqrt(posterior_variance(now, then))
    direction = math.sqrt(max(0.0, then.sigma**2 - deviation**2))
    z = then.alpha * x0 + direction * eps
    return z if noise is None else z + deviation * noise


def ddpm_step(z: Tensor, x0: Tensor, now: Level, then: Level, noise: Tensor) -> Tensor:
    """A draw from the posterior q(z_then | z_now, x0) (variance "fixed small").

    Between visited timesteps the step's own beta is 1 - abar_now / abar_then (arXiv:2102.09672, eq. 19).
    Source: arXiv:2006.11239, eq. 7.
    """
    alpha_ratio = now.alpha / then.alpha
    noise_share = (then.sigma / now.sigma) ** 2
    mean = then.alpha * (1.0 - alpha_ratio**2 * noise_share) * x0 + alpha_ratio * noise_share * z
    return mean + math.sqrt(posterior_variance(now, then)) * noise


def posterior_variance(now: Level, then: Level) -> float:
    """Variance of q(z_then | z_now, x0), 0 where `then` has no noise (arXiv:2006.11239, eq. 7)."""
    return then.sigma**2 * (1.0 - (now.alpha * then.sigma / (then.alpha * now.sigma)) ** 2)


def dpmpp_2m_step(
    z: Tensor, x0: Tensor, previous_x0: Tensor | None, before: Level | None, now: Level, then: Level
) -> Tensor:
    """Latents at `then`, of second order where the step before is known and the step does not end at no noise.

    Shapes: previous_x0 is x0 at the level `before`, both None at the first step.
    Source: arXiv:2211.01095, algorithm 2 (2M).
    """
    drift = -math.expm1(-_log_snr_step(now, then))  # 1 - exp(-h)
    return then.sigma / now.sigma * z + then.alpha * drift * _extrapolated(x0, previous_x0, before, now, then)


def dpmpp_2m_sde_step(
    z: Tensor, x0: Tensor, previous_x0: Tensor | None, before: Level | None, now: Level, then: Level, noise: Tensor
) -> Tensor:
    """A draw of the reverse process at `then`; order as `dpmpp_2m_step`.

    Source: arXiv:2211.01095, section 5 and appendix D (SDE-DPM-Solver++(2M)).
    """
    h = _log_snr_step(now, then)
    drift = -math.expm1(-2.0 * h)
    mean = then.sigma / now.sigma * math.exp(-h) * z
    mean = mean + then.alpha * drift * _extrapolated(x0, previous_x0, before, now, then)
    return mean + then.sigma * math.sqrt(drift) * noise


def _extrapolated(x0: Tensor, previous_x0: Tensor | None, before: Level | None, now: Level, then: Level) -> Tensor:
    """x0 at the middle of the step in log SNR, from its last two values."""
    if previous_x0 is None or before is None or then.sigma == 0.0:
        return x0
    # After a level without signal the distance is infinite and the slope 0.
    half_ratio = 0.5 * _log_snr_step(now, then) / _log_snr_step(before, now)
    return x0 + half_ratio * (x0 - previous_x0)


def _log_snr_step(now: Level, then: Level) -> float:
    """h: the step in ln(alpha / sigma), infinite from no signal and to no noise."""
    if now.alpha == 0.0 or then.sigma == 0.0:
        return math.inf
    return math.log(then.alpha / then.sigma) - math.log(now.alpha / now.sigma)
