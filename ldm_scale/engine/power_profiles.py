"""Power-function profiles of averaged weights, and their post-hoc combination. Numbers only, no weights.

The average at time T weighs the weights of time t by p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on [0, T]. Its
relative standard deviation (that of t, divided by T) stays the same however long the training lasts, so it names the
profile; gamma is found from it. Averages of a few profiles, snapshot from time to time, span nearly all others: the
combination of least squares stands for a profile that nobody kept.

Beside the paper's least squares the coefficients sum to 1, so that weights which never move come out as they are
whatever the fit's error. With enough snapshots the sum is 1 by itself and nothing changes.

Source: arXiv:2312.02696, section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """A power-function profile that ends at a time. Units: images for `end`, or anything else in common."""

    relative_std: float
    end: float


@dataclass(frozen=True)
class Fit:
    """A profile as a combination of others."""

    coefficients: tuple[float, ...]  # they sum to 1
    error: float  # |combination - profile| / |profile|, norms over time


def exponent_of(relative_std: float) -> float:
    """gamma of a profile's relative standard deviation, at most 1 / sqrt(12) (the uniform average, gamma = 0).

    Source: arXiv:2312.02696, eq. 3 solved for gamma: (gamma + 2)^2 (gamma + 3) std^2 = gamma + 1, largest root.
    """
    inverse = relative_std**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def kept_share(exponent: float, images: int, batch: int) -> float:
    """Share of the old average that a step of `batch` images keeps, which reaches `images` in all.

    The first step keeps nothing: the profile gives the weights before training no share.
    Source: arXiv:2312.02696, eq. 2, beta(t) = (1 - 1/t)^(gamma + 1), with t in steps of the batch.
    """
    return float((1.0 - batch / images) ** (exponent + 1.0))


def inner_products(rows: Sequence[Profile], columns: Sequence[Profile]) -> Array:
    """Integrals over time of the products of profiles. Shapes: returns (rows, columns).

    Source: arXiv:2312.02696, appendix C; the earlier profile is zero after its end: one power is left to integrate.
    """
    (gamma_a, end_a), (gamma_b, end_b) = _vectors(rows), _vectors(columns)
    gamma_a, end_a = gamma_a[:, None], end_a[:, None]
    shorter, longer = np.minimum(end_a, end_b), np.maximum(end_a, end_b)
    gamma_longer = np.where(end_a > end_b, gamma_a, gamma_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return np.asarray(scale * (shorter / longer) ** gamma_longer / longer)


def fit_profile(wanted: Profile, known: Sequence[Profile]) -> Fit:
    """The known profiles' combination that is nearest to the wanted one. Source: arXiv:2312.02696, appendix C."""
    # In units of the wanted end, and every known profile of norm 1: neighbours are nearly parallel as it is.
    known = [Profile(profile.relative_std, profile.end / wanted.end) for profile in known]
    target = [Profile(wanted.relative_std, 1.0)]
    gram, projections = inner_products(known, known), inner_products(known, target)[:, 0]
    norms = np.sqrt(np.diag(gram))
    size = len(known)
    system = np.zeros((size + 1, size + 1))
    system[:size, :size] = gram / np.outer(norms, norms)
    system[:size, size] = system[size, :size] = 1.0 / norms  # the multiplier of: coefficients sum to 1
    right = np.append(projections / norms, 1.0)
    x = np.linalg.lstsq(system, right, rcond=1e-12)[0][:size] / norms
    x /= x.sum()  # exactly
    square = float(inner_products(target, target)[0, 0])
    missed = float(x @ gram @ x - 2.0 * x @ projections) + square
    return Fit(tuple(x.tolist()), float(np.sqrt(max(missed, 0.0) / square)))


def _vectors(profiles: Sequence[Profile]) -> tuple[Array, Array]:
    return (
        np.array([exponent_of(profile.relative_std) for profile in profiles]),
        np.array([profile.end for profile in profiles], dtype=np.float64),
    )
