"""y as pictures and words, to be looked at beside the samples."""

from __future__ import annotations

import colorsys
from collections.abc import Collection, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm_scale.conditioning.base import Conditions
from ldm_scale.conditioning.classes import NO_CLASS
from ldm_scale.conditioning.semantic_map import UNKNOWN
from ldm_scale.data.annotations import Layout, shown_objects
from ldm_scale.data.decode import to_pixels

_FONT_PX = 10
_UNKNOWN_COLOUR, _FIRST_COLOUR = (128, 128, 128), (40, 40, 48)
_PAPER_COLOUR = (242, 242, 242)
_HUE_STEP = (5.0**0.5 - 1.0) / 2.0  # of the circle: neighbouring labels are far apart, however many there are


def panels(y: Conditions, kinds: Collection[str], object_classes: Sequence[str], side_px: int) -> dict[str, Tensor]:
    """What can be drawn of y, by name, one picture per image: boxes, maps in colours, small and masked images.

    Shapes: pixels (B, 3, h, w) in [-1, 1], of the boxes side_px x side_px.
    """
    shown = {}
    if "layout" in kinds and y.layouts is not None:
        pictures = [_draw_boxes(layout, object_classes, side_px) for layout in y.layouts]
        shown["boxes"] = to_pixels(np.stack(pictures))
    if "semantic_map" in kinds and y.maps is not None:
        palette = np.array([label_colour(label) for label in range(UNKNOWN + 1)], np.uint8)
        shown["map"] = to_pixels(palette[y.maps.cpu().numpy()])
    if "low_resolution" in kinds and y.low_resolution is not None:
        shown["small image"] = y.low_resolution
    if "inpainting" in kinds and y.images is not None and y.masks is not None:
        shown["image with hole"] = y.images.masked_fill(y.masks.bool(), 0.0)
    return shown


def captions(y: Conditions, kinds: Collection[str], class_names: Sequence[str], num_images: int) -> list[str]:
    """What can be said of y, one text per image; "" where it says nothing."""
    words: list[list[str]] = [[] for _ in range(num_images)]
    if y.classes is not None and "classes" in kinds:
        for row, number in zip(words, y.classes.tolist(), strict=True):
            row += [] if number == NO_CLASS else [class_names[number]]
    if y.captions is not None and ("text" in kinds or "frozen_text" in kinds):
        for row, caption in zip(words, y.captions, strict=True):
            row += [caption] if caption else []
    return [", ".join(row) for row in words]


def label_colour(label: int) -> tuple[int, int, int]:
    """RGB of a label, the same in every picture; grey where it is unknown, dark for the first, often the background."""
    if label in (0, UNKNOWN):
        return _UNKNOWN_COLOUR if label else _FIRST_COLOUR
    red, green, blue = colorsys.hsv_to_rgb(label * _HUE_STEP % 1.0, 0.75, 0.9 - 0.25 * (label % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


def _draw_boxes(layout: Layout, names: Sequence[str], side_px: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Shapes: returns (side_px, side_px, 3)."""
    canvas = Image.new("RGB", (side_px, side_px), _PAPER_COLOUR)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(_FONT_PX)
    for item in shown_objects(layout):
        left, top, right, bottom = (round(fraction * (side_px - 1)) for fraction in item.box)
        colour = label_colour(item.label)
        draw.rectangle((left, top, right, bottom), outline=colour, width=2)
        draw.text((left + 4, top + 2), names[item.label], fill=colour, font=font)
    return np.asarray(canvas)


def grid_side(resolution: int) -> int:
    """Pixels along a side of an image in a picture: a whole multiple, large enough for words below it."""
    return resolution * max(1, -(-96 // resolution))


def first_rows(parts: Sequence[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    """The first images of several batches' panels."""
    return {name: torch.cat([part[name] for part in parts])[:count] for name in parts[0]}
