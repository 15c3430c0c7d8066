"""Metrics that are not finite stop the run and say where."""

from __future__ import annotations

import math

import pytest

from ldm_scale.engine.health import require_finite
from ldm_scale.errors import NumericsError


def test_finite_metrics_pass() -> None:
    require_finite({"loss": 0.0, "norm": 1e300, "negative": -5.0}, step=1, images=8)
    require_finite({}, step=0, images=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_others_are_named_with_step_and_images(value: float) -> None:
    with pytest.raises(NumericsError) as caught:
        require_finite({"loss/l1": 0.5, "loss/kl": value, "weight": value}, step=41, images=5_248)
    message = str(caught.value)
    assert f"step 41 (5248 images): loss/kl={value}, weight={value};" in message
    assert "loss/l1" not in message
