"""Moving averages of the weights, sharded like the optimizer's masters.

Each rank averages the fragments that it owns: no communication per step and 1 / ranks of the memory (stage >= 1), 4
bytes an average and a parameter. All averages of a model move in one call, which reads the weights once where the fused
kernel serves.

Averages are named by text, in checkpoints and on command lines alike: "ema" is the exponential one, "ema=0.05" the one
of the power-function profile whose relative standard deviation is 0.05.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ldm_kernels import ema_update
from ldm_scale.config.ranges import MAX_POWER_STD
from ldm_scale.config.schema import EmaConfig
from ldm_scale.engine.power_profiles import exponent_of, kept_share
from ldm_scale.engine.zero import ShardedModel
from ldm_scale.errors import ConfigError

RAW, EMA = "raw", "ema"


def average_names(config: EmaConfig) -> tuple[str, ...]:
    """Names of the averages that are configured; the first is the one shown and exported by default."""
    exponential = (EMA,) if config.half_life_images > 0 else ()
    return exponential + tuple(power_name(std) for std in config.power_stds)


def power_name(relative_std: float) -> str:
    """Name of a power-function profile's average."""
    return f"{EMA}={relative_std!r}"


def power_std(name: str) -> float | None:
    """Relative standard deviation in the name of weights; None for "raw" and "ema".

    Raises: ConfigError if it names no weights.
    """
    if name in (RAW, EMA):
        return None
    prefix, _, text = name.partition("=")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if prefix != EMA or not 0.0 < value <= MAX_POWER_STD:
        raise ConfigError(
            f"weights {name}: must be raw, ema or ema=STD with STD above 0 and at most {MAX_POWER_STD} (the profile's "
            "relative standard deviation); give ema=0.05, for example"
        )
    return value


def canonical_name(weights: str) -> str:
    """A name of weights as checkpoints spell it, such as ema=0.05 for ema=.050.

    Raises: ConfigError if it names no weights.
    """
    std = power_std(weights)
    return weights if std is None else power_name(std)


class ShardedEma:
    """The averages of one `ShardedModel`'s weights; they start as copies of them."""

    def __init__(self, model: ShardedModel, config: EmaConfig, backend: str = "auto") -> None:
        self._model = model
        self._config = config
        self._backend = backend
        self._exponents = {power_name(std): exponent_of(std) for std in config.power_stds}
        self.averages: dict[str, list[Tensor]] = {
            name: [fragment.master.clone() for fragment in model.fragments] for name in average_names(config)
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the averages."""
        return tuple(self.averages)

    def update(self, images: int, batch: int) -> None:
        """Moves the averages towards the weights, after a step of `batch` images that reached `images` in all."""
        masters = [fragment.master for fragment in self._model.fragments]
        decays = [self.decay(name, images, batch) for name in self.averages]
        ema_update(list(self.averages.values()), masters, decays, backend=self._backend)

    def decay(self, name: str, images: int, batch: int) -> float:
        """Share of the old average that a step of `batch` images keeps.

        Source: arXiv:2312.02696: for power-function profiles eq. 2; the exponential average's half-life grows with the
        images seen, so that the random initialisation is forgotten early in training.
        """
        if name in self._exponents:
            return kept_share(self._exponents[name], images, batch)
        half_life = self._config.half_life_images
        if self._config.warmup_ratio > 0:
            half_life = min(half_life, self._config.warmup_ratio * images)
        return float(0.5 ** (batch / max(half_life, 1e-8)))

    @contextmanager
    def active(self, name: str | None = None) -> Iterator[None]:
        """Computes with the averaged weights inside the block; None is the first average. Collective: all ranks."""
        with self._model.masters_replaced_by(self.averages[name or self.names[0]]):
            yield
