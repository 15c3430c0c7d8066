"""Uniform numbers from which the times of training come, through the quantile function of a process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stratified_uniforms(image_numbers: Sequence[int], global_batch: int, offset: float) -> Tensor:
    """Numbers u (B,) in [0, 1), float64, of images of one optimizer step, whose global batch fills [0, 1) evenly.

    Image n of a global batch of k (n counts through the run) has frac(offset + (n mod k) / k): each u alone is uniform
    over random offsets, any k consecutive images have one u in each k-th of [0, 1), and ranks need not talk.
    `offset` in [0, 1) is drawn once per optimizer step, the same on all ranks.
    Source: arXiv:2107.00630, appendix I.1.
    """
    assert 0.0 <= offset < 1.0, f"offset {offset} is outside [0, 1)"
    places = torch.tensor([number % global_batch for number in image_numbers], dtype=torch.float64)
    # Of a sum rounded up to 1 the fraction is 0, never 1.
    return (offset + places / global_batch) % 1.0


def normal_quantile(u: Tensor) -> Tensor:
    """The standard normal number below which a share `u` lies, finite also for u = 0. Shapes: returns u's, float64."""
    smallest = 2.0**-53  # the spacing of uniform float64 numbers
    quantile: Tensor = torch.special.ndtri(u.double().clamp(smallest, 1.0 - smallest))
    return quantile
