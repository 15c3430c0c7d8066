"""Checks that keep a broken step out of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ldm_scale.errors import NumericsError


def require_finite(metrics: Mapping[str, float], step: int, images: int) -> None:
    """Returns if all values are finite. The values are equal on all ranks, so all ranks stop together.

    Raises: NumericsError naming the step and the values.
    """
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if bad:
        listed = ", ".join(f"{name}={value}" for name, value in bad.items())
        raise NumericsError(
            f"non-finite after step {step} ({images} images): {listed}; the step's weights are not saved. Continue "
            "from the last checkpoint with a smaller optimizer.lr or optimizer.gradient_clip, or train.precision=fp32"
        )
