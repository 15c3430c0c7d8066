"""The learning rate at every image count, the ends of warm-up and decay included."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from ldm_scale.config.schema import OptimizerConfig
from ldm_scale.training.optimizer import learning_rate

PEAK, WARMUP, TOTAL = 2e-4, 1_000, 9_000


def _rate(images: int, decay: str = "constant", warmup: int = WARMUP, total: int = TOTAL) -> float:
    config = OptimizerConfig(lr=1.0, warmup_images=warmup, decay=decay)  # type: ignore[arg-type]
    return learning_rate(config, PEAK, images, total)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_warm_up_rises_in_a_straight_line_from_nearly_nothing_to_the_peak(decay: str) -> None:
    rates = [_rate(images, decay) for images in range(0, WARMUP + 1, 100)]
    assert 0 < rates[0] < PEAK / WARMUP
    steps = [b - a for a, b in pairwise(rates)]
    assert steps == pytest.approx([PEAK / (WARMUP + 1) * 100] * 10, rel=1e-9)
    assert rates[-1] == pytest.approx(PEAK, rel=1e-12)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert _rate(0, "constant", warmup=0) == PEAK
    assert _rate(0, "cosine", warmup=0) == PEAK


def test_constant_stays_also_beyond_the_end() -> None:
    assert [_rate(images) for images in (WARMUP, TOTAL - 1, TOTAL, 10 * TOTAL)] == [PEAK] * 4


def test_cosine_is_half_a_period_from_the_warm_ups_end_to_the_last_image() -> None:
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        images = WARMUP + round(share * (TOTAL - WARMUP))
        expected = PEAK * math.cos(math.pi / 2 * share) ** 2  # the half-angle form of (1 + cos(pi share)) / 2
        assert _rate(images, "cosine") == pytest.approx(expected, rel=1e-9, abs=1e-20)
    rates = [_rate(images, "cosine") for images in range(WARMUP, TOTAL + 1, 250)]
    assert rates == sorted(rates, reverse=True)


def test_cosine_stays_at_zero_when_a_run_goes_on_beyond_its_end() -> None:
    assert [_rate(images, "cosine") for images in (TOTAL, TOTAL + 1, 3 * TOTAL)] == pytest.approx([0.0] * 3, abs=1e-20)


def test_the_peak_is_the_callers() -> None:
    # The discriminator's differs from the optimizer section's.
    config = OptimizerConfig(lr=1.0)
    assert learning_rate(config, 3e-5, 0, TOTAL) == 3e-5
