"""Pictures of two rectangles with boxes and a label map, and what must hold between boxes and map."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ldm_scale.data import Layout
from ldm_scale.data.annotations import shown_objects
from tests.helpers.shards import png

NUMBERS = {"cat": 0, "dog": 1}
PALETTE = ((255, 255, 255), (230, 20, 20), (20, 20, 230))


def scene(rng: np.random.Generator) -> dict[str, bytes]:
    """Two rectangles that do not overlap, their boxes and their map."""
    picture, labels = Image.new("RGB", (48, 40), "white"), Image.new("L", (48, 40))
    objects = []
    for label, left in ((0, 2), (1, 26)):
        x, y = left + int(rng.integers(0, 8)), int(rng.integers(0, 20))
        width, height = (int(n) for n in rng.integers(6, 14, 2))
        for image, colour in ((picture, PALETTE[label + 1]), (labels, label + 1)):
            ImageDraw.Draw(image).rectangle((x, y, x + width - 1, y + height - 1), fill=colour)  # type: ignore[arg-type]
        objects.append({"class": ("cat", "dog")[label], "box": [x, y, width, height]})
    return {"png": png(picture), "seg.png": png(labels), "json": json.dumps({"objects": objects}).encode()}


def extent(mask: NDArray[np.bool_]) -> NDArray[np.float64] | None:
    """(left, top, right, bottom) of the pixels as fractions, None if there are none."""
    if not mask.any():
        return None
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / np.tile(mask.shape[::-1], 2)


def check_boxes(labels: NDArray[np.uint8], layout: Layout) -> int:
    """Number of boxes, each of which surrounds its label's pixels in the map."""
    found = {item.label: item.box for item in shown_objects(layout)}
    for label in range(2):
        seen = extent(labels == label + 1)
        assert seen is None or np.abs(seen - found[label]).max() <= 1 / min(labels.shape)
        if seen is None and label in found:
            left, top, right, bottom = found[label]
            assert min(right - left, bottom - top) < 1 / min(labels.shape)  # a sliver between two pixel centres
    return len(found)
