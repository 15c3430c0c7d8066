"""From the bytes of a sample to pixels, caption, class, boxes and label map.

Augmentation is a pure function of (seed, epoch, key): a picture looks
the same in an epoch whatever reads it, and wherever in the epoch it stands. Pictures stay 8-bit until a whole batch is
there, because one conversion per batch is cheaper than one per picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldm_scale.data.annotations import (
    LAYOUT,
    MAP,
    MAP_EXTENSION,
    TEXT,
    Box,
    Layout,
    View,
    Vocabulary,
    layout_of,
    read_map,
    read_objects,
)
from ldm_scale.data.latents import RECORD, LatentCache, read_context, read_record, read_view, refused, view_moments
from ldm_scale.data.metadata import choose_caption, may_name, member_bytes, read_captions, read_label, read_metadata
from ldm_scale.data.permutation import uniforms
from ldm_scale.data.pictures import Picture, reduction_of
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import IMAGE_EXTENSIONS, RawSample


@dataclass(frozen=True)
class DecodeSettings:
    """What the configuration says about pictures."""

    resolution: int  # pixels along each side
    crop_scale_min: float = 1.0  # smallest side of the random crop as a share of the largest that the picture holds
    horizontal_flip: bool = False
    augment: bool = True  # False: the largest centred crop, never flipped
    seed: int = 0
    annotations: frozenset[str] = frozenset()  # LAYOUT, MAP: what samples must have besides; TEXT: if the cache has
    size: tuple[int, int] | None = None  # (height, width) in pixels of an aspect-ratio bucket; None = a square

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of what is shown, in pixels."""
        return self.size or (self.resolution, self.resolution)


@dataclass(frozen=True)
class DecodedSample:
    """One usable sample: a picture, or moments of its latents from a cache, and the annotations that were asked for.

    Shapes: image (H, W, 3), 8-bit RGB; moments (C, h, w) in the cache's type; labels (H, W).
    """

    image: NDArray[np.uint8] | None
    caption: str
    label: int
    key: str
    position: int  # in the stream of all epochs
    moments: NDArray[Any] | None = None
    layout: Layout | None = None
    labels: NDArray[np.uint8] | None = None  # of the map
    text_context: NDArray[np.float16] | None = None  # (M, d) of the caption, from a cache


def crop_box(width: int, height: int, settings: DecodeSettings, epoch: int, key: str) -> tuple[Box, bool]:
    """(left, top, right, bottom) of what to show, in pixels of the picture, and whether to mirror it.

    Of the target's aspect ratio to a pixel: the largest box that the picture holds, or a random part of it. Corners are
    multiples of the box's reduction, whatever the picture's format.
    """
    target_height, target_width = settings.shape
    scale, across, down, mirror = uniforms(4, "augment", settings.seed, epoch, key)
    share = 1.0
    if not settings.augment or settings.crop_scale_min >= 1.0:
        across = down = 0.5
    else:
        share = settings.crop_scale_min + (1.0 - settings.crop_scale_min) * scale
    box_width = max(1, round(share * min(float(width), height * target_width / target_height)))
    box_height = max(1, round(share * min(float(height), width * target_height / target_width)))
    grain = reduction_of(box_width, box_height, settings.shape)
    box_width, box_height = box_width // grain * grain, box_height // grain * grain
    left, top = (
        int(place * ((whole - part) // grain + 1)) * grain
        for place, whole, part in ((across, width, box_width), (down, height, box_height))
    )
    box = (left, top, left + box_width, top + box_height)
    return box, settings.augment and settings.horizontal_flip and mirror < 0.5


def decode_image(data: bytes, settings: DecodeSettings, epoch: int, key: str) -> NDArray[np.uint8]:
    """The picture cropped, resized and perhaps mirrored.

    Shapes: returns (H, W, 3) as the settings say.
    Raises: BadSample if it does not decode.
    """
    picture = Picture(data)
    return picture.render(*crop_box(*picture.size, settings, epoch, key), settings.shape)


def to_pixels(images: NDArray[np.uint8]) -> torch.Tensor:
    """Pixels in [-1, 1] as fp32, in channels_last memory (the layout that convolutions run in here).

    Shapes: images (B, H, W, 3); returns (B, 3, H, W).
    """
    return torch.from_numpy(images).to(torch.float32).mul_(1.0 / 127.5).sub_(1.0).permute(0, 3, 1, 2)


def decode_sample(
    sample: RawSample,
    settings: DecodeSettings,
    vocabulary: Vocabulary,
    position: int,
    epoch: int,
    latents: LatentCache | None = None,
) -> DecodedSample:
    """A usable sample from a raw one; `latents` describes the manifest's latent shards, if it has any.

    Raises: BadSample with the reason; DataError if a cached sample is not what its manifest says.
    """
    if latents is not None and RECORD in sample:
        return _decode_cached(sample, settings, vocabulary, position, epoch, latents)
    key = str(sample["__key__"])
    extension = image_extension(sample)
    if extension is None:
        raise BadSample(f"no image ({', '.join(IMAGE_EXTENSIONS)})")
    metadata = read_metadata(sample)
    captions = read_captions(sample, metadata)
    caption = choose_caption(captions, settings.augment, settings.seed, epoch, key)
    label = read_label(sample, metadata, vocabulary.classes)
    picture = Picture(member_bytes(sample, extension))
    view = View(picture.size, *crop_box(*picture.size, settings, epoch, key))
    image = picture.render(view.box, view.mirror, settings.shape)
    layout, labels = _annotations(sample, metadata, settings, vocabulary, view)
    return DecodedSample(image, caption, label, key, position, layout=layout, labels=labels)


def _decode_cached(
    sample: RawSample,
    settings: DecodeSettings,
    vocabulary: Vocabulary,
    position: int,
    epoch: int,
    latents: LatentCache,
) -> DecodedSample:
    """A usable sample from a latent cache; whether its numbers are finite, the batch is asked.

    What is not needed is not parsed: the metadata of these samples was read when they were encoded, and of those that
    did not pass then the record says so.

    Raises: as `decode_sample`.
    """
    reason = refused(sample)
    if reason is not None:
        raise BadSample(reason)
    key, wanted = str(sample["__key__"]), settings.annotations
    needed = ("captions", "class") if "txt" in sample else ("captions", "class", "caption")
    metadata = read_metadata(sample) if wanted or may_name(sample, *needed) else {}
    captions = read_captions(sample, metadata)
    caption = choose_caption(captions, settings.augment, settings.seed, epoch, key)
    label = read_label(sample, metadata, vocabulary.classes)
    variant = latents.variant(settings, epoch, key)
    moments = view_moments(sample, variant, latents)
    if not wanted:
        return DecodedSample(None, caption, label, key, position, moments)
    context: NDArray[np.float16] | None = None
    if TEXT in wanted and latents.text is not None:
        context = read_context(sample, captions.index(caption), latents.text)
    view = read_view(read_record(sample), variant, key)
    layout, labels = _annotations(sample, metadata, settings, vocabulary, view)
    return DecodedSample(None, caption, label, key, position, moments, layout, labels, context)


def _annotations(
    sample: RawSample, metadata: dict[str, Any], settings: DecodeSettings, vocabulary: Vocabulary, view: View
) -> tuple[Layout | None, NDArray[np.uint8] | None]:
    """The objects and the map of what is shown, None for what was not asked for.

    Raises: BadSample if what was asked for is missing or malformed.
    """
    layout, labels = None, None
    if LAYOUT in settings.annotations:
        layout = layout_of(read_objects(metadata, vocabulary.objects), view)
    if MAP in settings.annotations:
        content = member_bytes(sample, MAP_EXTENSION) if MAP_EXTENSION in sample else None
        labels = read_map(content, vocabulary.num_map_labels, view, settings.shape)
    return layout, labels


def image_extension(sample: RawSample) -> str | None:
    """Extension of the member that is the sample's picture, None if it has none."""
    return next((extension for extension in IMAGE_EXTENSIONS if extension in sample), None)
