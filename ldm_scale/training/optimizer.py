"""The learning rate as a function of the images seen: nothing to save, the same on any number of ranks."""

from __future__ import annotations

import math

from ldm_scale.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, peak: float, images: int, total_images: int) -> float:
    """Learning rate of the step that starts after `images` images: linear warm-up, then constant or a half cosine.

    Raises: nothing; a run continued beyond total_images keeps the last value.
    Source: arXiv:1608.03983, eq. 5 (cosine, one period).
    """
    if images < config.warmup_images:
        return peak * (images + 1) / (config.warmup_images + 1)
    if config.decay == "constant":
        return peak
    span = max(1, total_images - config.warmup_images)
    progress = min(1.0, (images - config.warmup_images) / span)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
