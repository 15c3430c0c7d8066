"""Exponential moving averages of many tensors at once, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ema_update(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weight, in place, for each pair; both lists in fp32.

    Shapes: pairs of equal shape.
    """
    torch._foreach_lerp_(list(averages), list(weights), 1.0 - decay)
