from __future__ import annotations

import numpy as np
import pytest

from ldm_scale.planning.checkpoint_interval import (
    GPU_HOURS_PER_FAILURE,
    best_interval_s,
    lost_share,
    mean_time_between_failures_s,
)

MTBF, RESTART = 10_000.0, 300.0


def _simulated_share(interval: float, cost: float, num_segments: int) -> float:
    """Share of the time that was no training, by playing failures one by one."""
    rng = np.random.default_rng(0)
    spent, next_failure = 0.0, rng.exponential(MTBF)
    for _ in range(num_segments):
        needed = interval + cost
        while spent + needed > next_failure:  # a restart may fail too
            spent = next_failure
            next_failure += rng.exponential(MTBF)
            needed = RESTART + interval + cost
        spent += needed
    return 1 - interval * num_segments / spent


@pytest.mark.parametrize(("interval", "cost"), [(300.0, 20.0), (2_000.0, 200.0), (5_000.0, 20.0)])
def test_the_share_lost_is_that_of_a_simulation(interval: float, cost: float) -> None:
    simulated = _simulated_share(interval, cost, 100_000)
    assert lost_share(interval, cost, RESTART, MTBF) == pytest.approx(simulated, rel=0.03)


@pytest.mark.parametrize("cost", [1.0, 20.0, 300.0, 3_000.0])
def test_no_other_interval_loses_less(cost: float) -> None:
    intervals = np.geomspace(10, 50_000, 4_000)
    least = min(lost_share(interval, cost, RESTART, MTBF) for interval in intervals)
    assert lost_share(best_interval_s(cost, MTBF), cost, RESTART, MTBF) <= least * 1.002


def test_known_figures() -> None:
    # 20 s a save and three hours between failures: 11 minutes by Young's formula.
    assert best_interval_s(20, 3 * 3600) == pytest.approx((2 * 20 * 3 * 3600) ** 0.5, rel=0.03)
    assert best_interval_s(300, 100) == 100
    assert pytest.approx(50_678, rel=1e-3) == GPU_HOURS_PER_FAILURE
    assert mean_time_between_failures_s(16_384) == pytest.approx(54 * 24 * 3600 / 419)
