"""Reverse processes: from noise to latents along noise levels, with one loop for all processes and samplers.

Latents stay in the type of the initial noise (give float32) whatever the denoiser computes in. Samplers end as their
references do: DDIM and PLMS at the noise level of t = 0 (which is not quite 0), the others at 0. Which sampler goes
with which process is in `check_sampler`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ldm_scale.diffusion.guidance import Denoiser
from ldm_scale.diffusion.process import Level, Process
from ldm_scale.diffusion.steps import ddim_step, ddpm_step, dpmpp_2m_sde_step, dpmpp_2m_step
from ldm_scale.errors import ConfigError

Sampler = Literal["ddim", "ddpm", "plms", "dpmpp_2m", "dpmpp_2m_sde", "euler", "heun"]

_TIMESTEP_SAMPLERS = ("ddim", "ddpm", "plms")
_CONTINUOUS_SAMPLERS = ("euler", "heun")
_ENDS_AT_FIRST_TIMESTEP = ("ddim", "plms")
_STOCHASTIC = ("ddpm", "dpmpp_2m_sde")


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
        """N(0, I), (len(seeds), c, h, w) in float32."""
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


@dataclass(frozen=True, eq=False)
class Start:
    """Where sampling begins instead of at noise: latents with noise of an intermediate level (arXiv:2108.01073).

    Shapes: z0 (B, c, h, w). `strength` in (0, 1] is the share of the steps that are taken, at least one.
    """

    z0: Tensor
    strength: float


def sample(
    denoiser: Denoiser,
    initial_noise: Tensor,
    process: Process,
    *,
    sampler: Sampler,
    num_steps: int,
    eta: float = 0.0,
    step_noise: Callable[[int], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
    start: Start | None = None,
) -> Tensor:
    """Latents z_0 that the reverse process reaches from `initial_noise` ~ N(0, I), without gradients.

    The noise is scaled to the deviation that z_t has at the first level if the latents' is 1. `denoiser(z, t)` returns
    the network's output; `step_noise(i)` the noise of step i (unused by deterministic samplers); `progress(n)` is
    called after every step with the number of steps done, `observe(n, x0)` before it with those done so far and the
    clean latents that the network predicts there.
    Shapes: initial_noise (B, c, h, w); t (B,) of `process.time_dtype`; step_noise(i) and the result as initial_noise.
    Raises: ConfigError if sampler, num_steps, eta or start cannot be used.
    Source: arXiv:2010.02502 (ddim); arXiv:2006.11239, algorithm 2 (ddpm); arXiv:2202.09778, section 3.3 (plms);
    arXiv:2211.01095, algorithm 2 (dpmpp_2m); arXiv:2206.00364, algorithm 1 (euler, heun).
    """
    check_sampler(sampler, process, eta)
    process = process.to(initial_noise.device)
    levels = process.levels(num_steps, keep_first_noise=sampler in _ENDS_AT_FIRST_TIMESTEP)
    first = 0 if start is None else num_steps - steps_taken(num_steps, start.strength)
    stochastic = sampler in _STOCHASTIC or eta > 0.0
    assert step_noise is not None or not stochastic, f"{sampler} with eta {eta} needs step_noise"

    z = _initial(initial_noise, levels[first], start)
    run = _Run(denoiser, process, sampler, eta, levels)
    with torch.no_grad():
        for index in range(first, num_steps):
            noise = step_noise(index) if stochastic and step_noise is not None else None
            z, x0 = run.step(z, index, noise)
            if observe is not None:
                observe(index - first, x0)
            if progress is not None:
                progress(index + 1 - first)
    return z


def check_sampler(sampler: Sampler, process: Process, eta: float = 0.0) -> None:
    """Nothing, if `sampler` can follow `process`.

    Raises: ConfigError otherwise, with samplers that can.
    """
    prediction = process.cfg.prediction
    discrete = prediction not in ("edm", "flow")
    if sampler in _TIMESTEP_SAMPLERS and not discrete:
        raise ConfigError(
            f"sampling.sampler={sampler}: visits timesteps, which diffusion.prediction={prediction} does not have; set "
            "sampling.sampler=heun, euler, dpmpp_2m or dpmpp_2m_sde"
        )
    if sampler in _CONTINUOUS_SAMPLERS and discrete:
        raise ConfigError(
            f"sampling.sampler={sampler}: needs continuous time, and diffusion.prediction={prediction} has timesteps; "
            "set sampling.sampler=ddim (the same first-order step), plms, ddpm, dpmpp_2m or dpmpp_2m_sde"
        )
    if not 0.0 <= eta <= 1.0:
        raise ConfigError(f"sampling.eta={eta}: must be between 0 (deterministic) and 1 (DDPM-like)")
    if sampler != "ddim" and eta != 0.0:
        raise ConfigError(f"sampling.eta={eta}: eta belongs to sampling.sampler=ddim; leave it at 0 for {sampler}")


@dataclass(eq=False)
class _Run:
    """One sampling: what its steps share, and what multistep samplers remember."""

    denoiser: Denoiser
    process: Process
    sampler: Sampler
    eta: float
    levels: list[Level]
    _old: list[Tensor] = field(default_factory=list)  # eps (plms) or x0 (dpmpp_2m) of past levels, newest last

    def step(self, z: Tensor, index: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latents at level index + 1 from those at level index, and the clean ones that were predicted there."""
        x0, eps = self._ask(z, self.levels[index])
        return self._stepped(z, x0, eps, index, noise), x0

    def _stepped(self, z: Tensor, x0: Tensor, eps: Tensor, index: int, noise: Tensor | None) -> Tensor:
        now, then = self.levels[index], self.levels[index + 1]
        if self.sampler in ("ddim", "euler"):
            return ddim_step(x0, eps, now, then, self.eta, noise)
        if self.sampler == "ddpm":
            assert noise is not None, "checked by the caller"
            return ddpm_step(z, x0, now, then, noise)
        if self.sampler == "heun":
            return self._heun(z, x0, eps, now, then)
        if self.sampler == "plms":
            return self._plms(z, x0, eps, now, then)
        previous = self._old[-1] if self._old else None
        before = self.levels[index - 1] if self._old else None
        self._old = [x0]
        if self.sampler == "dpmpp_2m":
            return dpmpp_2m_step(z, x0, previous, before, now, then)
        assert noise is not None, "checked by the caller"
        return dpmpp_2m_sde_step(z, x0, previous, before, now, then, noise)

    def _ask(self, z: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """x0 and eps at a level."""
        assert level.t is not None, "no network is asked at the last level"
        t = torch.full((z.shape[0],), level.t, dtype=self.process.time_dtype, device=z.device)
        output = self.denoiser(z, t).to(z.dtype)
        return self.process.x0(z, output, t), self.process.eps(z, output, t)

    def _heun(self, z: Tensor, x0: Tensor, eps: Tensor, now: Level, then: Level) -> Tensor:
        """Euler's step, corrected by the slope at its end; the last step has none (algorithm 1, lines 6 to 9).

        The slope is alpha' x0 + sigma' eps, and alpha and sigma are linear in time in both processes.
        """
        z_then = ddim_step(x0, eps, now, then)
        if then.t is None:
            return z_then
        x0_then, eps_then = self._ask(z_then, then)
        d_alpha, d_sigma = then.alpha - now.alpha, then.sigma - now.sigma
        return z + 0.5 * (d_alpha * (x0 + x0_then) + d_sigma * (eps + eps_then))

    def _plms(self, z: Tensor, x0: Tensor, eps: Tensor, now: Level, then: Level) -> Tensor:
        """A DDIM step along an extrapolation of the last four eps (Adams-Bashforth), the first corrected as Heun's."""
        old = [*self._old, eps][-4:]
        self._old = old
        if len(old) == 1:
            # Without signal, x0 cannot be told from another noise: that step stays DDIM's.
            if then.t is None or now.alpha == 0.0:
                return ddim_step(x0, eps, now, then)
            _, eps_then = self._ask(ddim_step(x0, eps, now, then), then)
            mean = (eps + eps_then) / 2
        elif len(old) == 2:
            mean = (3 * old[-1] - old[-2]) / 2
        elif len(old) == 3:
            mean = (23 * old[-1] - 16 * old[-2] + 5 * old[-3]) / 12
        else:
            mean = (55 * old[-1] - 59 * old[-2] + 37 * old[-3] - 9 * old[-4]) / 24
        return ddim_step(x0 + now.sigma / now.alpha * (eps - mean), mean, now, then)


def _initial(noise: Tensor, level: Level, start: Start | None) -> Tensor:
    """Where sampling begins. A strength of 1 is noise alone, also where the first level would leave some image."""
    if start is None or start.strength == 1.0:
        return noise * math.hypot(level.alpha, level.sigma)
    return level.alpha * start.z0.to(noise.dtype) + level.sigma * noise


def steps_taken(num_steps: int, strength: float) -> int:
    """Steps that a `Start` of that strength leaves of `num_steps`.

    Raises: ConfigError for a strength that is none.
    """
    if not 0.0 < strength <= 1.0:
        raise ConfigError(f"strength={strength}: must be above 0 (keep the image) and at most 1 (noise alone)")
    return max(1, int(num_steps * strength + 1e-9))  # 100 * 0.29 is 28.999...
