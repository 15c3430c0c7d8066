"""Batches without a loader behind them."""

from __future__ import annotations

import torch

from ldm_scale.data import Batch


def make_batch(images: torch.Tensor, first_number: int = 0) -> Batch:
    """Images as the loader would hand them over, numbered from `first_number`."""
    count = len(images)
    return Batch(
        images=images,
        captions=[""] * count,
        classes=torch.full((count,), -1),
        keys=["x"] * count,
        image_numbers=torch.arange(count) + first_number,
        bad=[],
    )
