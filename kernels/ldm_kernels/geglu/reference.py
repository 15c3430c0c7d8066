"""The gated feed-forward activation, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def geglu(projection: Tensor) -> Tensor:
    """value * gelu(gate) of the two halves of the last dimension, value first, gelu with the exact erf.

    Shapes: projection (..., 2D); returns (..., D).
    Source: arXiv:2002.05202, eq. 6.
    """
    value, gate = projection.chunk(2, dim=-1)
    return value * F.gelu(gate)
