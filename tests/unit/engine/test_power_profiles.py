"""Power-function profiles against numerical integration; combinations of snapshots against tracked averages."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
from numpy.typing import NDArray

from ldm_scale.engine.power_profiles import (
    Profile,
    exponent_of,
    fit_profile,
    inner_products,
    kept_share,
)

STDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.28)


def _profile(t: NDArray[np.float64], profile: Profile) -> NDArray[np.float64]:
    gamma = exponent_of(profile.relative_std)
    values = (gamma + 1) / profile.end * np.clip(t / profile.end, 0, None) ** gamma
    return np.where(t <= profile.end, values, 0.0)


@pytest.mark.parametrize("std", STDS)
def test_a_width_and_its_exponent_belong_together(std: float) -> None:
    gamma = exponent_of(std)
    # arXiv:2312.02696, eq. 3.
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(std, rel=1e-9)
    # The definition: the standard deviation of t under p(t) on [0, 1].
    t = np.linspace(0, 1, 20_001)
    p = _profile(t, Profile(std, 1.0))
    mean = scipy.integrate.simpson(t * p, x=t)
    variance = scipy.integrate.simpson((t - mean) ** 2 * p, x=t)
    assert scipy.integrate.simpson(p, x=t) == pytest.approx(1.0, abs=1e-4)
    assert np.sqrt(variance) == pytest.approx(std, rel=1e-4)


def test_published_exponents() -> None:
    """arXiv:2312.02696: gamma = 6.94 has a relative standard deviation of 0.10 and 16.97 one of 0.05."""
    assert exponent_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.005)


@pytest.mark.parametrize("std", STDS)
def test_steps_weigh_the_run_by_the_profile(std: float) -> None:
    """An average of one-hot weights holds every step's share: the profile's integral over that step."""
    steps, batch = 50, 12
    shares = np.zeros(steps)
    for step in range(steps):
        keep = kept_share(exponent_of(std), (step + 1) * batch, batch)
        shares = keep * shares
        shares[step] += 1 - keep
    powers = (np.arange(steps + 1) / steps) ** (exponent_of(std) + 1)
    np.testing.assert_allclose(shares, [b - a for a, b in pairwise(powers)], rtol=0, atol=1e-14)


def test_inner_products_are_integrals() -> None:
    profiles = [Profile(0.05, 1.0), Profile(0.05, 0.6), Profile(0.2, 0.6), Profile(0.28, 0.35)]
    products = inner_products(profiles, profiles)
    np.testing.assert_allclose(products, products.T, rtol=1e-12)
    t = np.linspace(0, 1, 40_001)
    for i, a in enumerate(profiles):
        for j, b in enumerate(profiles):
            assert scipy.integrate.trapezoid(_profile(t, a) * _profile(t, b), t) == pytest.approx(
                products[i, j], rel=2e-3
            ), (a, b)


def _combined(known: list[Profile], coefficients: tuple[float, ...], t: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sum([x * _profile(t, profile) for x, profile in zip(coefficients, known, strict=True)], axis=0)


@pytest.mark.parametrize("std", [0.02, 0.07, 0.2])
def test_a_fits_error_is_the_distance_of_the_curves(std: float) -> None:
    known = [Profile(width, end) for end in range(1000, 9000, 1000) for width in (0.05, 0.1)]
    wanted = Profile(std, 8000)
    fit = fit_profile(wanted, known)
    assert sum(fit.coefficients) == pytest.approx(1.0, abs=1e-12)
    t = np.linspace(0, 8000, 40_001)
    target = _profile(t, wanted)
    missed = scipy.integrate.trapezoid((_combined(known, fit.coefficients, t) - target) ** 2, t)
    assert fit.error == pytest.approx(np.sqrt(missed / scipy.integrate.trapezoid(target**2, t)), rel=5e-3)
    # Any other combination whose coefficients sum to 1 is farther away.
    generator = np.random.default_rng(0)
    for _ in range(20):
        step = generator.normal(size=len(known)) * 0.05
        other = np.array(fit.coefficients) + step - step.mean()
        assert scipy.integrate.trapezoid((_combined(known, tuple(other), t) - target) ** 2, t) > missed


def test_a_known_profile_is_fitted_by_itself() -> None:
    known = [Profile(0.05, 50), Profile(0.1, 50), Profile(0.05, 100), Profile(0.1, 100)]
    fit = fit_profile(Profile(0.1, 100), known)
    assert fit.error < 1e-7
    np.testing.assert_allclose(fit.coefficients, [0, 0, 0, 1], atol=1e-7)


def test_more_snapshots_reach_more_profiles() -> None:
    def error(std: float, count: int) -> float:
        ends = [(i + 1) / count for i in range(count)]
        return fit_profile(Profile(std, 1.0), [Profile(width, end) for end in ends for width in (0.05, 0.1)]).error

    for std in (0.02, 0.03, 0.07, 0.15, 0.2, 0.25):
        errors = [error(std, count) for count in (1, 4, 16, 64, 200)]
        assert errors == sorted(errors, reverse=True), std
        assert errors[-1] < 0.01, std
    assert error(0.2, 1) > 0.5
