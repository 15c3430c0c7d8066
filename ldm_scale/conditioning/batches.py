"""From a batch of the loader to y."""

from __future__ import annotations

from ldm_scale.conditioning.base import Conditioner, Conditions
from ldm_scale.data import Batch
from ldm_scale.engine import seeding


def conditions_of(conditioner: Conditioner, batch: Batch, seed: int) -> Conditions:
    """y of a batch, with what is made of the images themselves (masks, small images) by seed and image numbers."""
    y = Conditions(
        captions=batch.captions,
        text_contexts=batch.text_contexts,
        classes=batch.classes,
        layouts=batch.layouts,
        maps=batch.maps,
        images=batch.images,
    )
    streams = [seeding.stream(seed, "conditioning", number) for number in batch.image_numbers.tolist()]
    return conditioner.simulate(y, batch.images, streams)
