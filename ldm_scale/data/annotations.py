"""What is known of a picture beside its caption and class: boxes of objects, a label map, the part that is shown.

In a shard, boxes are in the .json, in pixels of the upright picture: {"objects": [{"class": name or number, "box":
[x, y, width, height]}]}; the map is the member seg.png of the picture's size, whose values are numbers in the
manifest's `map_labels`. A map goes through the crop and the mirroring of its picture. Boxes are mirrored with it but
stay where they are in the whole picture, beside the crop; `shown_objects` says where they stand in what is shown.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_scale.data.pictures import DECODE_ERRORS, MAX_IMAGE_PIXELS
from ldm_scale.data.policy import BadSample

Box = tuple[float, float, float, float]  # left, top, right, bottom

LAYOUT, MAP = "layout", "map"  # what `build_loader(annotations=)` may ask for
TEXT = "text"  # it may ask for this too: contexts of the captions, of the samples whose cache holds them

MAP_EXTENSION = "seg.png"
UNKNOWN = 255  # value of a map where the label is not known
MAX_MAP_LABELS = UNKNOWN  # labels are 0 .. 254

# Share of the picture: smaller objects are left out, as in the data set of the paper's layout models
# (`min_object_area` in its configurations).
MIN_OBJECT_AREA = 1e-4


@dataclass(frozen=True)
class SceneObject:
    """One object of a picture, or of the part that is shown of it."""

    label: int  # number in the manifest's `object_classes`
    box: Box  # fractions of the picture or the part, clipped to it


@dataclass(frozen=True)
class Layout:
    """The objects of one image, and which part of the whole picture it shows: both mirrored where the image is.

    Source: arXiv:2112.10752, appendix E.2.1, after arXiv:2105.06458.
    """

    objects: tuple[SceneObject, ...] = ()  # boxes in fractions of the whole picture
    crop: Box = (0.0, 0.0, 1.0, 1.0)  # fractions of the whole picture


@dataclass(frozen=True)
class Vocabulary:
    """The numbers of the names that a manifest lists."""

    classes: Mapping[str, int] | None = field(default_factory=dict)  # None: samples' classes are not read
    objects: Mapping[str, int] = field(default_factory=dict)  # classes of objects
    num_map_labels: int = 0


@dataclass(frozen=True)
class View:
    """The part of a picture that is shown."""

    size: tuple[int, int]  # of the whole upright picture, (width, height) in pixels
    box: Box  # of the part, in pixels of the picture
    mirror: bool


def read_objects(metadata: Mapping[str, Any], numbers: Mapping[str, int]) -> list[tuple[int, Box]]:
    """(class, box in pixels) of every object in a sample's metadata; `numbers` are the manifest's classes of objects.

    Raises: BadSample if there is no list, or one of its entries is malformed.
    """
    if "objects" not in metadata:
        raise BadSample('no "objects" in its .json')
    entries = metadata["objects"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BadSample('"objects" is not a list of objects with "class" and "box"')
    return [(_label(entry.get("class"), numbers), _box(entry.get("box"))) for entry in entries]


def _label(stored: Any, numbers: Mapping[str, int]) -> int:
    """The number of an object's class."""
    if isinstance(stored, str) and stored in numbers:
        return numbers[stored]
    if isinstance(stored, int) and not isinstance(stored, bool) and 0 <= stored < len(numbers):
        return stored
    raise BadSample("an object's class is not in the manifest's object_classes")


def _box(stored: Any) -> Box:
    """(left, top, right, bottom) of [x, y, width, height]."""
    if not isinstance(stored, list) or len(stored) != 4 or not all(map(_is_number, stored)):
        raise BadSample("an object's box is not [x, y, width, height] in finite numbers")
    x, y, width, height = (float(value) for value in stored)
    if width <= 0 or height <= 0:
        raise BadSample("an object's box has no area: width and height must be above 0")
    return x, y, x + width, y + height


def _is_number(value: Any) -> bool:
    """Whether it is a number that a double holds; JSON's whole numbers may have any number of digits."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def layout_of(objects: Sequence[tuple[int, Box]], view: View) -> Layout:
    """The objects of a picture that reach into the part shown, in their order; tiny ones left out."""
    across, down = view.size
    left, top, right, bottom = view.box
    found = [(label, box) for label, box in objects if _overlap(box, view.box)]
    seen = clip_objects(found, (0.0, 0.0, float(across), float(down)))
    crop = (left / across, top / down, right / across, bottom / down)
    if view.mirror:
        return Layout(tuple(SceneObject(item.label, _mirrored(item.box)) for item in seen), _mirrored(crop))
    return Layout(seen, crop)


def shown_objects(layout: Layout) -> tuple[SceneObject, ...]:
    """The objects where they stand in the part that is shown: boxes in its fractions, clipped to it."""
    return clip_objects([(item.label, item.box) for item in layout.objects], layout.crop)


def clip_objects(objects: Sequence[tuple[int, Box]], frame: Box) -> tuple[SceneObject, ...]:
    """The objects in a frame, in their order, in its fractions: boxes clipped, tiny and invisible ones left out.

    Boxes and frame are in one unit, whichever it is.
    """
    left, top, right, bottom = frame
    width, height = right - left, bottom - top
    seen = []
    for label, box in objects:
        # x1 > x2 or y1 > y2 where nothing of it is in the frame
        x1, x2 = max((box[0] - left) / width, 0.0), min((box[2] - left) / width, 1.0)
        y1, y2 = max((box[1] - top) / height, 0.0), min((box[3] - top) / height, 1.0)
        if x1 < x2 and y1 < y2 and (x2 - x1) * (y2 - y1) >= MIN_OBJECT_AREA:
            seen.append(SceneObject(label, (x1, y1, x2, y2)))
    return tuple(seen)


def _overlap(a: Box, b: Box) -> bool:
    """Whether two boxes have an area in common."""
    return max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3])


def _mirrored(box: Box) -> Box:
    """The box, in fractions of a picture, where the mirrored picture has it."""
    left, top, right, bottom = box
    return 1.0 - right, top, 1.0 - left, bottom


def open_map(data: bytes, size: tuple[int, int] | None) -> Image.Image:
    """A label map, 8 bits and one channel, of its picture's size if that is given.

    Raises: BadSample otherwise.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=("PNG",))
        # On the header, before a pixel is decoded. A palette's numbers are labels (VOC and others colour them so).
        if image.mode not in ("L", "P"):
            raise BadSample("label map is not a PNG of 8 bits and one channel")
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise BadSample(f"label map has more than {MAX_IMAGE_PIXELS:,} pixels")
        if size is not None and image.size != size:
            raise BadSample("label map has another size than its picture")
        image.load()
    except DECODE_ERRORS:
        raise BadSample("label map does not decode") from None
    return image


def check_labels(labels: NDArray[np.uint8], num_labels: int) -> None:
    """Nothing.

    Raises: BadSample if a value is neither the number of a label nor UNKNOWN.
    """
    if ((labels >= num_labels) & (labels != UNKNOWN)).any():
        raise BadSample("label map has a value that is neither in the manifest's map_labels nor 255 (unknown)")


def render_map(image: Image.Image, view: View, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """The shown part of a map in `shape` (H, W), by nearest neighbours. Shapes: returns (H, W)."""
    height, width = shape
    shown = image.resize((width, height), Image.Resampling.NEAREST, box=view.box)
    if view.mirror:
        shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(shown, dtype=np.uint8)


def read_map(data: bytes | None, num_labels: int, view: View, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """The labels of the shown part in `shape` (H, W), from the bytes of the member seg.png. Shapes: returns (H, W).

    Raises: BadSample if it is missing, malformed, of another size than the picture or of unknown labels.
    """
    if data is None:
        raise BadSample(f"no label map ({MAP_EXTENSION})")
    labels = render_map(open_map(data, view.size), view, shape)
    check_labels(labels, num_labels)
    return labels
