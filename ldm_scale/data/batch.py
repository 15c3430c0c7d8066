"""Batches: samples put together, and the parts that loader processes made of one batch joined.

Pictures lie in channels_last memory, the layout that convolutions run in. On a machine with a GPU the joined tensors
are in pinned memory, which copies to it take without waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm_scale.data.annotations import LAYOUT, MAP, Layout
from ldm_scale.data.arrays import all_finite, not_finite
from ldm_scale.data.decode import DecodedSample, DecodeSettings, to_pixels
from ldm_scale.data.latents import CONTEXTS
from ldm_scale.data.policy import SkippedSample


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: b samples, n of them from a latent cache, with moments instead of an image.

    Shapes: images (b - n, 3, H, W), fp32 in [-1, 1]; classes and image_numbers (b,), int64; moments (n, C, h, w) in
    the cache's type; cached (b,), bool; maps (b, H, W), uint8.
    """

    images: torch.Tensor
    captions: list[str]
    classes: torch.Tensor  # -1 where a sample has no class
    keys: list[str]
    image_numbers: torch.Tensor  # positions in the global stream, counted from the start of training
    bad: list[SkippedSample]  # skipped to make this batch
    moments: torch.Tensor | None = None  # of the samples from a cache, in their order; None where there is none
    cached: torch.Tensor | None = None  # which samples those are; None = none
    layouts: list[Layout] | None = None  # None where they were not asked for; so are maps
    maps: torch.Tensor | None = None  # numbers of the manifest's map_labels; 255 where unknown
    text_contexts: torch.Tensor | None = None  # (b, M, d) of a frozen text encoder, from a cache that holds them


def collate(samples: Sequence[DecodedSample], bad: list[SkippedSample], settings: DecodeSettings) -> Batch:
    """The batch of these samples, decoded by these settings."""
    pictures = [sample.image for sample in samples if sample.image is not None]
    moments = _stacked([(sample.key, sample.moments) for sample in samples], "latents.*.npy")
    layouts = [sample.layout for sample in samples if sample.layout is not None]
    with_maps, shape = MAP in settings.annotations, settings.shape
    labels = [sample.labels for sample in samples if sample.labels is not None]
    contexts = _stacked([(sample.key, sample.text_context) for sample in samples], CONTEXTS)
    images = np.empty((len(pictures), *shape, 3), dtype=np.uint8)
    for row, picture in enumerate(pictures):
        images[row] = picture
    return Batch(
        images=to_pixels(images),
        captions=[sample.caption for sample in samples],
        classes=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        keys=[sample.key for sample in samples],
        image_numbers=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        bad=bad,
        moments=moments,
        cached=torch.tensor([sample.moments is not None for sample in samples]) if moments is not None else None,
        layouts=layouts if LAYOUT in settings.annotations else None,
        maps=torch.from_numpy(np.array(labels, np.uint8).reshape(-1, *shape)) if with_maps else None,
        # Of a part of the samples they are of no use: the text encoder runs for all of them then.
        text_contexts=contexts if contexts is not None and len(contexts) == len(samples) else None,
    )


def _stacked(arrays: list[tuple[str, NDArray[Any] | None]], name: str) -> torch.Tensor | None:
    """The arrays of the samples (key, array) that have one, as one tensor; None if none has.

    Raises: DataError, naming the key, if one holds NaN or infinity.
    """
    present = [(key, array) for key, array in arrays if array is not None]
    if not present:
        return None
    stacked = np.stack([array for _, array in present])
    if not all_finite(stacked):
        raise not_finite(next(key for key, array in present if not all_finite(np.ascontiguousarray(array))), name)
    return torch.from_numpy(stacked)


def join(parts: Sequence[Batch], pin: bool = False) -> Batch:
    """One batch of the samples of several parts, one after the other; `pin`: in pinned memory."""
    parts = [part for part in parts if part.keys] or list(parts[:1])
    moments = [part for part in parts if part.moments is not None]
    no_part = [torch.zeros(len(part.keys), dtype=torch.bool) for part in parts]
    cached = [none if part.cached is None else part.cached for part, none in zip(parts, no_part, strict=True)]
    pictures = [part for part in parts if len(part.images)] or parts[:1]

    def joined(tensors: list[Tensor]) -> Tensor:
        return _concatenate(tensors, pin)

    def optional(get: Callable[[Batch], Tensor | None]) -> Tensor | None:
        """The parts' tensors where all have one."""
        tensors = [tensor for part in parts if (tensor := get(part)) is not None]
        return joined(tensors) if len(tensors) == len(parts) else None

    return Batch(
        # Rows of pixels are contiguous where channels stand last.
        images=joined([part.images.permute(0, 2, 3, 1) for part in pictures]).permute(0, 3, 1, 2),
        captions=[caption for part in parts for caption in part.captions],
        classes=joined([part.classes for part in parts]),
        keys=[key for part in parts for key in part.keys],
        image_numbers=torch.cat([part.image_numbers for part in parts]),  # read on the CPU
        bad=[record for part in parts for record in part.bad],
        moments=joined([part.moments for part in moments if part.moments is not None]) if moments else None,
        cached=torch.cat(cached) if moments else None,
        layouts=None if parts[0].layouts is None else [layout for part in parts for layout in part.layouts or ()],
        maps=optional(lambda part: part.maps),
        text_contexts=optional(lambda part: part.text_contexts),
    )


def _concatenate(tensors: list[Tensor], pin: bool) -> Tensor:
    """The tensors one after the other, copied once."""
    if len(tensors) == 1 and not pin:
        return tensors[0]
    shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
    out = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=pin)
    return torch.cat(tensors, out=out)
