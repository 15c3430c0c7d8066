"""Confidence intervals of figures that are functions of a whole set of samples.

The delete-half jackknife: a figure is computed again over random halves of the samples, drawn without replacement, and
the spread over halves is the standard error over all of them. No image is in a half twice, as it would be in a
bootstrap's resample: copies are nearest neighbours at distance 0 and pairs of the largest kernel, so that a bootstrap
of neighbour and kernel figures is one of other figures. The halves' bias, of figures that have one, cancels in the
spread. The reference stays as it is: the interval says what other samples of the same model would give.
Source: Shao and Wu 1989, "A general theory for jackknife variance estimation".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 20
SEED = 0


@dataclass(frozen=True)
class Halves:
    """Random halves of samples 0 to num_samples - 1, the same whenever they are asked for; `of` says what those are."""

    num_samples: int
    resamples: int = RESAMPLES
    of: str = "the samples, the reference fixed"

    @property
    def size(self) -> int:
        """Samples in a half; the middle one of an odd number is left out."""
        return self.num_samples // 2

    def indices(self) -> list[Tensor]:
        """The halves. Shapes: (num_samples // 2,) each, ascending."""
        generator = torch.Generator().manual_seed(SEED)
        return [
            torch.randperm(self.num_samples, generator=generator)[: self.size].sort().values
            for _ in range(self.resamples)
        ]

    @property
    def method(self) -> str:
        """How an interval was made, to be written beside it."""
        return f"Student's t over {self.resamples} random halves (delete-half jackknife, seed {SEED}) of {self.of}"

    def interval(
        self, value: float, over_halves: Sequence[float], bounds: tuple[float, float] = (-math.inf, math.inf)
    ) -> dict[str, Any]:
        """The interval around a value, from the figure's values over the halves; cut to what the figure can be."""
        assert len(over_halves) == self.resamples > 1, "a value for each half"
        spread = torch.tensor(over_halves, dtype=torch.float64).var(correction=1).item()
        # Of a half the variance is that of all times (1 / size - 1 / num_samples) * num_samples.
        error = (spread * self.size / (self.num_samples - self.size)) ** 0.5
        return interval_around(value, error, self.resamples - 1, self.method, bounds)


def share_interval(share: float, count: int) -> dict[str, Any]:
    """Wilson's score interval of LEVEL of a share of so many images; not without width at 0 and 1 either.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    from scipy.stats import binomtest

    found = binomtest(round(share * count), count).proportion_ci(LEVEL, method="wilson")
    return {
        "level": LEVEL,
        "low": float(found.low),
        "high": float(found.high),
        "standard_error": math.sqrt(share * (1 - share) / count),
        "method": f"Wilson's score interval of a share of {count} images",
    }


def interval_around(
    value: float,
    error: float,
    freedom: int,
    method: str,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, Any]:
    """Student's interval of LEVEL around a value with a standard error of so many degrees of freedom, cut to bounds."""
    from scipy.special import stdtrit

    width = float(stdtrit(freedom, 0.5 + LEVEL / 2)) * error
    return {
        "level": LEVEL,
        "low": max(bounds[0], value - width),
        "high": min(bounds[1], value + width),
        "standard_error": error,
        "method": method,
    }
