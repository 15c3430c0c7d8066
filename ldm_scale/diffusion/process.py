"""The forward process and the network's part in it: one object per configuration, the same for training and sampling.

z_t = alpha(t) z_0 + sigma(t) noise, with three kinds of time t, (B,): integers 0 .. T-1 (eps, v and x0, where
alpha^2 + sigma^2 = 1), sigma itself (edm, alpha = 1) and (0, 1] (flow, alpha = 1 - t, sigma = t). Training, sampling
and guidance meet them through `Process` alone. Noise levels are float64 inside, because 1 - abar and exp(log SNR) lose
digits in float32; what comes out has the type of the latents, float32 or wider.

The network gets `network_input(z_t, t)` and `network_time(t)`; "output" is always its own output, in its own
parameterisation, and `x0` and `eps` read it.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ldm_scale.config.schema import DiffusionConfig
from ldm_scale.diffusion.loss import diffusion_loss, x0_weight
from ldm_scale.diffusion.prediction import Parameterisation, parameterisation
from ldm_scale.diffusion.schedule import alphas_cumprod, sampling_timesteps
from ldm_scale.diffusion.times import normal_quantile
from ldm_scale.errors import ConfigError


class Level(NamedTuple):
    """A noise level on a sampler's way: z_t = alpha z_0 + sigma noise. t is None where no network is asked."""

    t: float | None
    alpha: float
    sigma: float


CLEAN = Level(None, 1.0, 0.0)


class Process(ABC):
    """Forward process, parameterisation and loss of a `DiffusionConfig`."""

    def __init__(self, cfg: DiffusionConfig) -> None:
        self.cfg = cfg

    @property
    def num_timesteps(self) -> int:
        """T of a discrete process; the scale of flow's network time."""
        return self.cfg.num_timesteps

    @property
    def time_dtype(self) -> torch.dtype:
        """Type of t: int64 for timesteps, else float32."""
        return torch.float32

    def to(self, device: torch.device | str) -> Self:
        """The same process for latents on `device`."""
        return self

    @abstractmethod
    def times(self, u: Tensor) -> Tensor:
        """Times of training: the quantile function of their distribution, at uniform numbers u (B,) in [0, 1)."""

    @abstractmethod
    def evaluation_times(self, shares: Tensor) -> Tensor:
        """Times at `shares` (B,) in [0, 1) of the range of noise, least noisy first, for validation in bins."""

    @abstractmethod
    def levels(self, num_steps: int, keep_first_noise: bool = False) -> list[Level]:
        """The `num_steps` noise levels at which sampling asks the network, noisiest first, and the one where it ends.

        That is no noise; with `keep_first_noise` the noise of the first timestep, if there are timesteps.
        Raises: ConfigError if there are not so many.
        """

    @abstractmethod
    def _exact(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, float64."""

    def network_time(self, t: Tensor) -> Tensor:
        """What the network's sinusoidal embedding is given for t. Shapes: t (B,), returns (B,)."""
        return t

    def network_input(self, z_t: Tensor, t: Tensor) -> Tensor:
        """The noised latents as the network sees them, of unit variance."""
        return z_t

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of z_t = alpha z_0 + sigma noise, each (B,) float32."""
        alpha, sigma = self._exact(t)
        return alpha.float(), sigma.float()

    def log_snr(self, t: Tensor) -> Tensor:
        """ln(alpha^2 / sigma^2), (B,) float32; -inf where there is noise alone (arXiv:2107.00630, eq. 2 and 3)."""
        return self._exact_log_snr(t).float()

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = alpha z_0 + sigma noise.

        Shapes: z0 and noise (B, ...), t (B,); returns (B, ...) in float32, or in z0's type where it is wider.
        Source: arXiv:2006.11239, eq. 4; arXiv:2107.00630, eq. 1.
        """
        alpha, sigma = self._exact(t)
        return combine(alpha, z0, sigma, noise)

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network's output is compared with. Shapes: as `add_noise`."""
        rule = self._rule(t)
        return combine(rule.target_z0, z0, rule.target_noise, noise)

    def x0(self, z_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The clean latents that `output` stands for. Shapes: z_t and output (B, ...), t (B,)."""
        rule = self._rule(t)
        return combine(rule.x0_z, z_t, rule.x0_output, output)

    def eps(self, z_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The noise in `z_t` that `output` stands for. Shapes: as `x0`."""
        rule = self._rule(t)
        return combine(rule.eps_z, z_t, rule.eps_output, output)

    def weights(self, t: Tensor) -> Tensor:
        """Weight of each image's loss on the network's own output, (B,) float32."""
        if self.cfg.weighting == "none":
            return torch.ones(t.shape, device=t.device)
        # The error of x0 is x0_output times that of the output; for eps its square is 1 / SNR.
        output_share = self._rule(t).x0_output.square()
        return (x0_weight(self.cfg, self._exact_log_snr(t)) * output_share).float()

    def loss(self, output: Tensor, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Weighted mean error of each image between `output` and its target.

        edm needs no weight beside: its lambda(sigma) makes the error of the output count as it is.
        Shapes: output, z0 and noise (B, ...), t (B,); returns (B,) in float32.
        Source: arXiv:2112.10752, eq. 2; arXiv:2206.00364, eq. 8 (edm); arXiv:2209.03003, eq. 1 (flow).
        """
        return self.weights(t) * diffusion_loss(output, self.target(z0, noise, t), self.cfg.loss)

    def _rule(self, t: Tensor) -> Parameterisation:
        return parameterisation(self.cfg.prediction, *self._exact(t), self.cfg.sigma_data)

    def _exact_log_snr(self, t: Tensor) -> Tensor:
        alpha, sigma = self._exact(t)
        return 2.0 * (alpha.log() - sigma.log())

    def _shares(self, u: Tensor) -> Tensor:
        """Quantiles of t / T: uniform, or logit-normal (arXiv:2403.03206, eq. 19)."""
        if self.cfg.time_distribution == "uniform":
            return u.double()
        return torch.sigmoid(self.cfg.logit_mean + self.cfg.logit_std * normal_quantile(u))


class DiscreteProcess(Process):
    """Timesteps 0 .. T-1 of a table; variance preserving; eps, v or x0."""

    def __init__(self, cfg: DiffusionConfig) -> None:
        """Raises: ConfigError if the schedule is impossible."""
        super().__init__(cfg)
        products = alphas_cumprod(cfg)
        self._alpha, self._sigma = products.sqrt(), (1.0 - products).sqrt()

    @property
    def time_dtype(self) -> torch.dtype:
        """See `Process.time_dtype`."""
        return torch.int64

    def to(self, device: torch.device | str) -> Self:
        """See `Process.to`: the tables move, so that looking them up never waits for the device."""
        moved = copy.copy(self)
        moved._alpha, moved._sigma = self._alpha.to(device), self._sigma.to(device)
        return moved

    def times(self, u: Tensor) -> Tensor:
        """See `Process.times`."""
        return (self._shares(u) * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def evaluation_times(self, shares: Tensor) -> Tensor:
        """See `Process.evaluation_times`: shares of T."""
        return (shares.double() * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def levels(self, num_steps: int, keep_first_noise: bool = False) -> list[Level]:
        """See `Process.levels`."""
        visited = sampling_timesteps(self.num_timesteps, num_steps, trailing=self.cfg.zero_terminal_snr)
        alpha, sigma = self._alpha.tolist(), self._sigma.tolist()
        end = Level(None, alpha[0], sigma[0]) if keep_first_noise else CLEAN
        return [*(Level(t, alpha[t], sigma[t]) for t in visited), end]

    def _exact(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._alpha[t], self._sigma[t]


class EdmProcess(Process):
    """Time is sigma; the network is preconditioned (arXiv:2206.00364, eq. 7 and Table 1)."""

    def __init__(self, cfg: DiffusionConfig) -> None:
        """Raises: ConfigError if sigma has no range or another distribution is asked for."""
        super().__init__(cfg)
        if not 0.0 < cfg.sigma_min < cfg.sigma_max:
            raise ConfigError(
                f"diffusion.sigma_min={cfg.sigma_min}, diffusion.sigma_max={cfg.sigma_max}: must satisfy "
                "0 < sigma_min < sigma_max; the paper has 0.002 and 80"
            )
        if cfg.time_distribution != "uniform":
            raise ConfigError(
                f"diffusion.time_distribution={cfg.time_distribution}: diffusion.prediction=edm draws ln(sigma) from a "
                "normal distribution; set diffusion.time_distribution=uniform, and sigma_log_mean and sigma_log_std"
            )

    def times(self, u: Tensor) -> Tensor:
        """See `Process.times`: ln(sigma) is normal (Table 1, "Noise distribution")."""
        return (self.cfg.sigma_log_mean + self.cfg.sigma_log_std * normal_quantile(u)).exp().float()

    def evaluation_times(self, shares: Tensor) -> Tensor:
        """See `Process.evaluation_times`: even in ln(sigma) between sigma_min and sigma_max."""
        low, high = math.log(self.cfg.sigma_min), math.log(self.cfg.sigma_max)
        return (low + shares.double() * (high - low)).exp().float()

    def levels(self, num_steps: int, keep_first_noise: bool = False) -> list[Level]:
        """See `Process.levels` (arXiv:2206.00364, eq. 5)."""
        _check_num_steps(num_steps)
        high, low = self.cfg.sigma_max ** (1 / self.cfg.rho), self.cfg.sigma_min ** (1 / self.cfg.rho)
        ramp = [i / max(1, num_steps - 1) for i in range(num_steps)]
        sigmas = [(high + share * (low - high)) ** self.cfg.rho for share in ramp]
        return [*(Level(sigma, 1.0, sigma) for sigma in sigmas), CLEAN]

    def network_time(self, t: Tensor) -> Tensor:
        """See `Process.network_time`: c_noise = ln(sigma) / 4."""
        return 0.25 * t.log()

    def network_input(self, z_t: Tensor, t: Tensor) -> Tensor:
        """See `Process.network_input`: times c_in."""
        scale = (t.double().square() + self.cfg.sigma_data**2).rsqrt()
        return expand_like(scale, z_t) * z_t

    def _exact(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.double()
        return torch.ones_like(sigma), sigma


class FlowProcess(Process):
    """Rectified flow: straight lines from the latents (t = 0) to noise (t = 1) (arXiv:2209.03003, eq. 1)."""

    def times(self, u: Tensor) -> Tensor:
        """See `Process.times`."""
        return self._shares(u).float()

    def evaluation_times(self, shares: Tensor) -> Tensor:
        """See `Process.evaluation_times`."""
        return shares.float()

    def levels(self, num_steps: int, keep_first_noise: bool = False) -> list[Level]:
        """See `Process.levels`: even in t from 1."""
        _check_num_steps(num_steps)
        times = [1.0 - i / num_steps for i in range(num_steps)]
        return [*(Level(t, 1.0 - t, t) for t in times), CLEAN]

    def network_time(self, t: Tensor) -> Tensor:
        """See `Process.network_time`: the range in which the embedding tells times apart."""
        return self.num_timesteps * t

    def _exact(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.double()
        return 1.0 - sigma, sigma


def build_process(cfg: DiffusionConfig) -> Process:
    """The process that `cfg` describes, on the CPU.

    Raises: ConfigError if it is impossible, or asks for what its kind of process does not have.
    """
    if cfg.weighting != "none" and cfg.loss == "l1":
        raise ConfigError(
            f"diffusion.weighting={cfg.weighting}: weights are for squared errors, and diffusion.loss=l1 has none; set "
            "diffusion.loss=l2, or diffusion.weighting=none"
        )
    if cfg.prediction not in ("edm", "flow"):
        return DiscreteProcess(cfg)
    if cfg.schedule != "linear" or cfg.zero_terminal_snr:
        given = "zero_terminal_snr=true" if cfg.zero_terminal_snr else f"schedule={cfg.schedule}"
        raise ConfigError(
            f"diffusion.{given}: is of timesteps, which diffusion.prediction={cfg.prediction} does not have; set "
            "diffusion.schedule=linear (which it does not read) and diffusion.zero_terminal_snr=false"
        )
    return EdmProcess(cfg) if cfg.prediction == "edm" else FlowProcess(cfg)


def combine(first_share: Tensor, first: Tensor, second_share: Tensor, second: Tensor) -> Tensor:
    """first_share first + second_share second, in float32 or the wider of the two's types.

    Shapes: shares (B,), first and second (B, ...).
    """
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    first, second = first.to(dtype), second.to(dtype)
    return expand_like(first_share, first) * first + expand_like(second_share, second) * second


def offset_noise(noise: Tensor, constants: Tensor, strength: float) -> Tensor:
    """Noise with a random constant added to every channel of every image, so that a model learns mean brightness.

    Shapes: noise (B, c, h, w), constants (B, c) standard normal; strength is `DiffusionConfig.noise_offset`.
    Source: N. Guttenberg, "Diffusion with offset noise" (2023); arXiv:2307.01952, section 2.5, uses 0.05.
    """
    return noise + strength * constants[:, :, None, None]


def expand_like(per_image: Tensor, like: Tensor) -> Tensor:
    """`per_image` (B,) as (B, 1, ..., 1) with as many dimensions as `like`, in its type."""
    return per_image.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ConfigError(f"sampling.num_steps={num_steps}: must be at least 1; raise it")
