"""Spikes: planted ones are found in the step where they happen, thousands of clean steps raise no alarm."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from ldm_scale.config.schema import SpikesConfig
from ldm_scale.engine.spikes import NUM_LEVELS, SpikeHistory, judge, level_sums

CONFIG = SpikesConfig()
LEVEL_MEANS = np.geomspace(1.0, 0.01, NUM_LEVELS)  # of a diffusion loss, from little noise to much


def _diffusion_step(rng: np.random.Generator, batch: int, step: int) -> tuple[float, list[float]]:
    """A step's mean loss and sums by level: losses that fall in training, gamma distributed around their level's."""
    levels = rng.integers(NUM_LEVELS, size=batch)
    falling = 0.3 + 0.7 * math.exp(-step / 300)
    losses = falling * LEVEL_MEANS[levels] * rng.gamma(4.0, 0.25, size=batch)
    return float(losses.mean()), level_sums(losses.tolist(), levels.tolist())


@pytest.mark.parametrize("batch", [4, 64, 1024])
def test_clean_steps_raise_no_alarm_and_planted_spikes_are_found_at_once(batch: int) -> None:
    rng = np.random.default_rng(batch)
    history = SpikeHistory()
    for step in range(2_000):
        assert judge(CONFIG, history, *_diffusion_step(rng, batch, step)) is None, step
    found = []
    for step in range(2_000, 2_200):
        loss, totals = _diffusion_step(rng, batch, step)
        if step in (2_050, 2_051, 2_150):
            loss, totals = 30 * loss, [30 * total for total in totals[:NUM_LEVELS]] + totals[NUM_LEVELS:]
        if judge(CONFIG, history, loss, totals) is not None:
            found.append(step)
    assert found == [2_050, 2_051, 2_150]


def test_a_batch_of_hard_levels_is_no_spike_and_a_bad_one_of_easy_levels_is() -> None:
    rng = np.random.default_rng(5)
    history = SpikeHistory()
    for step in range(300):
        judge(CONFIG, history, *_diffusion_step(rng, 64, 10_000 + step))
    hard, easy = [0] * 64, [NUM_LEVELS - 1] * 64
    hard_losses = (0.3 * LEVEL_MEANS[0] * rng.gamma(4.0, 0.25, size=64)).tolist()
    assert judge(CONFIG, history, 0.0, level_sums(hard_losses, hard)) is None
    spike = judge(CONFIG, history, 0.0, level_sums([0.3 * LEVEL_MEANS[-1] * 5.0] * 64, easy))
    assert spike is not None, "five times what its level gives, though far below the mean loss"
    assert spike.times == pytest.approx(5.0, rel=0.2)
    assert spike.deviations > CONFIG.factor


def test_a_loss_without_levels() -> None:
    rng = np.random.default_rng(7)
    history = SpikeHistory()
    for step in range(2_000):
        assert judge(CONFIG, history, (0.1 + math.exp(-step / 200)) * rng.gamma(30.0, 1 / 30), []) is None, step
    spike = judge(CONFIG, history, 1.0, [])
    assert spike is not None
    assert "robust standard deviations" in str(spike)


def test_spikes_do_not_enter_the_history_but_a_new_course_of_the_run_does() -> None:
    history = SpikeHistory()
    for _ in range(100):
        judge(CONFIG, history, 1.0, [])
    before = dataclasses.replace(history, logs=list(history.logs))
    for _ in range(10):
        assert judge(CONFIG, history, 9.0, []) is not None
        assert history.logs == before.logs
    assert judge(CONFIG, history, 1.0, []) is None
    assert history.in_a_row == 0
    found = [judge(CONFIG, history, 9.0, []) is not None for _ in range(300)]
    assert found == [True] * 64 + [False] * 236, "half a window of them, then they are what is usual"


def test_nothing_is_judged_before_there_is_something_to_compare_with() -> None:
    history = SpikeHistory()
    assert [judge(CONFIG, history, 10.0**i, []) for i in range(CONFIG.window_steps // 2)] == [None] * 64


def test_a_history_that_was_saved_decides_alike() -> None:
    rng = np.random.default_rng(3)
    history = SpikeHistory()
    for step in range(200):
        judge(CONFIG, history, *_diffusion_step(rng, 8, step))
    resumed = SpikeHistory(**json.loads(json.dumps(dataclasses.asdict(history))))
    assert resumed == history
    steps = [_diffusion_step(rng, 8, step) for step in range(200, 400)]
    steps[50] = (50.0, [1e3 * total for total in steps[50][1]])
    assert [judge(CONFIG, history, *step) for step in steps] == [judge(CONFIG, resumed, *step) for step in steps]
    assert resumed == history


def test_a_loss_of_zero_says_nothing() -> None:
    history = SpikeHistory()
    for loss in [0.0] * 100 + [1.0]:
        assert judge(CONFIG, history, loss, []) is None
    assert history.logs == [0.0]
