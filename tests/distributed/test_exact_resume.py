"""A run that stops after any step and goes on is the unbroken run, to the last bit of all that it writes."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from tests.helpers.resumptions import BATCH, STEPS, Setting, config_of, interrupted, left_by, logged, run_to_end, seen

ALL = tuple(range(1, 13))
# Every pair of values of two columns stands in some row (a test says so).
SETTINGS = (Setting("autoencoder", 2, "bf16", 2, 1, 2, (5,)),)
MORE = (
    Setting("autoencoder", 1, "fp32", 2, 2, 0, (5,)),
    Setting("diffusion", 0, "fp32", 1, 1, 0, (5,)),
    Setting("autoencoder", 0, "fp32", 1, 1, 0),
    Setting("autoencoder", 0, "bf16", 2, 1, 2),
    Setting("diffusion", 0, "fp32", 4, 2, 2),
    Setting("diffusion", 1, "bf16", 1, 2, 2, ALL),
    Setting("diffusion", 1, "fp32", 2, 1, 0),
    Setting("autoencoder", 1, "bf16", 4, 1, 0),
    Setting("diffusion", 2, "fp32", 1, 2, 0),
    Setting("autoencoder", 2, "fp32", 2, 2, 0, ALL),
    Setting("diffusion", 2, "bf16", 4, 1, 2),
    Setting("autoencoder", 3, "bf16", 1, 1, 2),
    Setting("diffusion", 3, "bf16", 2, 2, 0),
    Setting("autoencoder", 3, "fp32", 4, 2, 2),
)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "setting",
    [pytest.param(s, id=str(s)) for s in SETTINGS]
    + [pytest.param(s, id=f"{s}-more", marks=pytest.mark.rest) for s in MORE],
)
def test_a_run_that_stopped_after_a_step_equals_the_unbroken_one(tmp_path: Path, setting: Setting) -> None:
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    config = config_of(setting, tmp_path, "run")  # the same run_dir for all: it is in the checkpoints' configuration
    run_to_end(config, setting.ranks)
    run.rename(unbroken)
    end = STEPS * BATCH
    figures = logged(unbroken)
    assert sorted(figures) == [step * BATCH for step in range(1, STEPS + 1)]
    assert all(any(name.startswith("loss") for name in row) for row in figures.values())
    for steps in setting.after:
        interrupted(config, unbroken, steps)
        run_to_end(config, setting.ranks)
        assert left_by(run, end) == left_by(unbroken, end), f"after {steps} steps"
        assert logged(run, steps * BATCH) == logged(unbroken, steps * BATCH), f"after {steps} steps"
        assert seen(run) == {images: batch for images, batch in seen(unbroken).items() if images >= steps * BATCH}
        run.rename(tmp_path / f"after {steps}")


def test_the_settings_cover_all_pairs() -> None:
    columns = {
        "stage": ("autoencoder", "diffusion"),
        "zero": (0, 1, 2, 3),
        "precision": ("fp32", "bf16"),
        "ranks": (1, 2, 4),
        "accumulation": (1, 2),
        "workers": (0, 2),
    }
    covered = {
        (one, getattr(setting, one), other, getattr(setting, other))
        for setting in SETTINGS + MORE
        for one, other in combinations(columns, 2)
    }
    missing = [
        pair
        for one, other in combinations(columns, 2)
        for pair in ((one, a, other, b) for a in columns[one] for b in columns[other])
        if pair not in covered
    ]
    assert not missing, missing
    assert len(SETTINGS + MORE) == 15
    assert sum(setting.after == ALL for setting in MORE) == 2
