"""Exponential moving average of the weights, sharded like the optimizer's masters.

Each rank averages the fragments that it owns: no communication per step and 1 / ranks of the memory (stage >= 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ldm_kernels import ema_update
from ldm_scale.config.schema import EmaConfig
from ldm_scale.engine.zero import ShardedModel


class ShardedEma:
    """The average of one `ShardedModel`'s weights; starts as a copy of them."""

    def __init__(self, model: ShardedModel, config: EmaConfig, backend: str = "auto") -> None:
        self._model = model
        self._config = config
        self._backend = backend
        self.values: list[Tensor] = [fragment.master.clone() for fragment in model.fragments]

    def update(self, images: int, batch: int) -> None:
        """Moves the average towards the weights, after a step of `batch` images that reached `images` in all."""
        masters = [fragment.master for fragment in self._model.fragments]
        ema_update(self.values, masters, self.decay(images, batch), backend=self._backend)

    def decay(self, images: int, batch: int) -> float:
        """Share of the old average that a step of `batch` images keeps.

        Source: arXiv:2312.02696, section 3 and its code's ramp-up: the half-life grows with the images seen, so that
        the random initialisation is forgotten early in training.
        """
        half_life = self._config.half_life_images
        if self._config.warmup_ratio > 0:
            half_life = min(half_life, self._config.warmup_ratio * images)
        return float(0.5 ** (batch / max(half_life, 1e-8)))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Computes with the averaged weights inside the block. Collective: all ranks."""
        with self._model.masters_replaced_by(self.values):
            yield

    def reset(self) -> None:
        """Makes the average equal to the weights."""
        with torch.no_grad():
            for value, fragment in zip(self.values, self._model.fragments, strict=True):
                value.copy_(fragment.master)
