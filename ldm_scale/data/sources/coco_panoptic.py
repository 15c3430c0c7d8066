"""COCO's panoptic segmentations as label maps of categories.

A panoptic PNG holds a segment's number in every pixel, red + 256 green + 256^2 blue; the annotations' file says which
category a segment is of. Pixels of number 0 belong to no segment: their label is unknown. Things and stuff alike become
the label of their category; crowds too, for of a region that is all people the category is known.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_scale.data.annotations import MAX_MAP_LABELS, UNKNOWN
from ldm_scale.data.policy import BadSample
from ldm_scale.data.sources.coco_files import load_file, read_categories, refuse, safe_file
from ldm_scale.errors import DataError

_VOID = 0  # number of no segment
_MAX_SEGMENT = 256**3


@dataclass(frozen=True)
class Segments:
    """The segmentation of one image."""

    file: str  # its PNG below the folder of the maps
    labels: dict[int, int]  # of its segments, by their numbers


@dataclass(frozen=True)
class Panoptic:
    """A panoptic file."""

    names: list[str]  # of its categories, by their numbers
    images: dict[int, Segments]  # by the images' numbers


def read_panoptic(path: Path) -> Panoptic:
    """The content of a panoptic file, such as panoptic_train2017.json.

    Raises: DataError if it is malformed, or has more categories than a map has labels.
    """
    content = load_file(path)
    names, labels = read_categories(path, content, "--panoptic takes a panoptic file, such as panoptic_train2017.json")
    if len(names) > MAX_MAP_LABELS:
        raise DataError(f"{path}: {len(names)} categories, and a map of 8 bits tells {MAX_MAP_LABELS} apart")
    images: dict[int, Segments] = {}
    for entry in content["annotations"]:
        try:
            number = int(entry["image_id"])
            if number in images:
                raise ValueError(f"a second one of image {number}")
            images[number] = Segments(safe_file(entry), _segments(entry["segments_info"], labels))
        except (KeyError, TypeError, ValueError) as error:
            refuse(path, "annotations", entry, error)
    return Panoptic(names, images)


def _segments(stored: Any, labels: dict[int, int]) -> dict[int, int]:
    """The label of each segment of an annotation."""
    found = [(int(segment["id"]), int(segment["category_id"])) for segment in stored]
    for number, category in found:
        if category not in labels:
            raise ValueError(f"its segment {number} is of category {category}, which the file does not list")
        if not _VOID < number < _MAX_SEGMENT:
            raise ValueError(f"its segment has the number {number}, not between 1 and {_MAX_SEGMENT - 1}")
    twice = [number for number, count in Counter(number for number, _ in found).items() if count > 1]
    if twice:
        raise ValueError(f"it lists segment {twice[0]} twice")
    return {number: labels[category] for number, category in found}


def draw_panoptic(data: bytes, segments: Segments, size: tuple[int, int]) -> Image.Image:
    """The label map of a panoptic PNG, of its picture's (width, height).

    Raises: BadSample if it is no such PNG, has another size, or shows a segment that is not listed.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(data), formats=("PNG",))
        # On the header, before a pixel is decoded.
        if picture.mode != "RGB":
            raise BadSample("panoptic map is not a PNG of 8 bits and three channels")
        if picture.size != size:
            raise BadSample("panoptic map has another size than its picture")
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise BadSample("panoptic map does not decode") from None
    red, green, blue = np.moveaxis(np.asarray(picture, dtype=np.uint32), -1, 0)
    numbers, where = np.unique(red + 256 * green + 256**2 * blue, return_inverse=True)
    known = {_VOID: UNKNOWN, **segments.labels}
    try:
        labels = np.array([known[number] for number in numbers.tolist()], dtype=np.uint8)
    except KeyError:
        raise BadSample("panoptic map shows a segment that its annotations do not list") from None
    return Image.fromarray(labels[where.reshape(size[::-1])])
