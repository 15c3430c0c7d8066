"""COCO's annotation files as records of one image each.

They are read whole (instances_train2017.json takes about 3 GiB of memory for a while): the format is one JSON object,
and its annotations are in no order. What is malformed ends the command, with the entry's number: a file that is wrong
in one place was made wrong.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ldm_scale.data.annotations import MAX_MAP_LABELS, UNKNOWN, Box
from ldm_scale.data.policy import BadSample
from ldm_scale.errors import DataError

# Outlines are drawn with so many times the pixels along each side, of which the middle ones stay: Pillow paints every
# pixel that a rim touches, which makes small objects a tenth too large.
_FINE = 4

Outline = list[NDArray[np.float32]] | dict[str, Any]  # polygons (x0, y0, x1, y1, ...), or run lengths


@dataclass(frozen=True)
class Instance:
    """One annotation. `outline` is None where it was not asked for."""

    label: int  # number in the list of names
    box: Box  # pixels
    is_crowd: bool
    outline: Outline | None


@dataclass(frozen=True)
class CocoImage:
    """One image of a file."""

    number: int  # its "id"
    file: str
    size: tuple[int, int]  # (width, height) as the file states it
    instances: tuple[Instance, ...]
    captions: tuple[str, ...] = ()
    license: str | None = None  # name of its licence, where the file says it

    @property
    def boxes(self) -> list[tuple[int, Box]]:
        """(class, box) of its objects: all instances but crowds."""
        return [(item.label, item.box) for item in self.instances if not item.is_crowd]


@dataclass(frozen=True)
class Instances:
    """An instances file."""

    names: list[str]  # of its categories, by their numbers
    images: list[CocoImage]  # by their numbers
    dropped: dict[str, int]  # annotations that are no objects, by reason


def load_file(path: Path) -> dict[str, Any]:
    """The object in a file with lists of images and annotations.

    Raises: DataError if it is something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); download it again") from None
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f'{path}: not a COCO file: it must be a JSON object with a list "{key}"')
    return content  # type: ignore[no-any-return]


def refuse(path: Path, key: str, entry: Any, error: Exception) -> NoReturn:
    """Raises DataError about one entry of a list."""
    identity = entry.get("id") if isinstance(entry, dict) else entry
    why = f"no {error}" if isinstance(error, KeyError) else str(error)
    raise DataError(
        f"{path}: {key} entry {str(identity)[:60]} is malformed ({why}); correct it or download the file again"
    )


def read_instances(path: Path, with_outlines: bool) -> Instances:
    """The content of an instances file.

    Raises: DataError if it is malformed, or an annotation is of an image or a category that it does not list.
    """
    content = load_file(path)
    names, labels = read_categories(
        path, content, "--instances takes an instances file, such as instances_train2017.json"
    )
    if with_outlines and len(names) >= MAX_MAP_LABELS:
        raise DataError(f"{path}: {len(names)} categories, and a map of 8 bits tells {MAX_MAP_LABELS - 1} apart")
    licenses = dict(_numbered(path, content, "licenses")) if isinstance(content.get("licenses"), list) else {}
    found: dict[int, list[Instance]] = defaultdict(list)
    files: dict[int, tuple[str, tuple[int, int], str | None]] = {}
    for entry in content["images"]:
        try:
            files[int(entry["id"])] = (*_image(entry), licenses.get(entry.get("license")))
        except (KeyError, TypeError, ValueError) as error:
            refuse(path, "images", entry, error)
    dropped = {"crowds among the annotations": 0, "annotations whose box has no area": 0}
    for entry in content["annotations"]:
        try:
            number, instance = int(entry["image_id"]), _instance(entry, labels, with_outlines)
            if number not in files:
                raise ValueError(f"of image {number}, which the file does not list")
        except (KeyError, TypeError, ValueError) as error:
            refuse(path, "annotations", entry, error)
        if instance is None:
            dropped["annotations whose box has no area"] += 1
            continue
        dropped["crowds among the annotations"] += instance.is_crowd
        found[number].append(instance)
    if not files:
        raise DataError(f'{path}: its list "images" is empty')
    images = []
    for number in sorted(files):
        file, size, license_name = files[number]
        images.append(CocoImage(number, file, size, tuple(found[number]), license=license_name))
    return Instances(names, images, dropped)


def _numbered(path: Path, content: dict[str, Any], key: str) -> list[tuple[int, str]]:
    """(id, name) of every entry of a list.

    Raises: DataError if one has none.
    """
    found = []
    for entry in content[key]:
        try:
            found.append((int(entry["id"]), str(entry["name"])))
        except (KeyError, TypeError, ValueError) as error:
            refuse(path, key, entry, error)
    return found


def read_categories(path: Path, content: dict[str, Any], what: str) -> tuple[list[str], dict[int, int]]:
    """(names of a file's categories by their numbers, place in that list by number).

    Raises: DataError if there is none, or two have one name; `what` says which file is wanted.
    """
    if not isinstance(content.get("categories"), list):
        raise DataError(f'{path}: no list "categories"; {what}')
    categories = dict(_numbered(path, content, "categories"))
    names = [categories[number] for number in sorted(categories)]
    if not names or len(set(names)) < len(names):
        raise DataError(f"{path}: {len(names)} categories, {len(set(names))} names; each needs its own, at least one")
    return names, {number: label for label, number in enumerate(sorted(categories))}


def safe_file(entry: Any) -> str:
    """The "file_name" of an entry; raises ValueError if it leads out of its folder."""
    file = str(entry["file_name"])
    if file.startswith("/") or ".." in file.split("/"):
        raise ValueError(f"its file_name {file!r} points outside the folder of the images")
    return file


def _image(entry: Any) -> tuple[str, tuple[int, int]]:
    """(file name, (width, height)) of an entry of "images"."""
    return safe_file(entry), (int(entry["width"]), int(entry["height"]))


def _instance(entry: Any, labels: dict[int, int], with_outline: bool) -> Instance | None:
    """One annotation, None if its box has no area (a handful of COCO's have none)."""
    x, y, width, height = (float(value) for value in entry["bbox"])
    if not all(map(math.isfinite, (x, y, width, height))):
        raise ValueError("bbox is not finite")
    category = int(entry["category_id"])
    if category not in labels:
        raise ValueError(f"of category {category}, which the file does not list")
    if width <= 0 or height <= 0:
        return None
    outline: Outline | None = None
    if with_outline:
        stored = entry["segmentation"]
        if isinstance(stored, list):
            outline = [np.asarray(polygon, dtype=np.float32).reshape(-1) for polygon in stored]
        elif isinstance(stored, dict):
            outline = {"size": stored["size"], "counts": stored["counts"]}
        else:
            raise ValueError("segmentation is neither polygons nor run lengths")
    return Instance(labels[category], (x, y, x + width, y + height), bool(entry.get("iscrowd", 0)), outline)


def read_captions_file(path: Path) -> dict[int, tuple[str, ...]]:
    """All captions of each image of a captions file, by its "id", in the order of theirs.

    Raises: DataError if it is malformed.
    """
    found: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for entry in load_file(path)["annotations"]:
        try:
            found[int(entry["image_id"])].append((int(entry["id"]), str(entry["caption"]).strip()))
        except (KeyError, TypeError, ValueError) as error:
            refuse(path, "annotations", entry, error)
    return {number: tuple(text for _, text in sorted(captions) if text) for number, captions in found.items()}


def draw_map(image: CocoImage) -> Image.Image:
    """The label map of an image's outlines: 0, or 1 + class; smaller boxes on top of larger ones, crowds unknown.

    Raises: BadSample if an outline cannot be drawn.
    """
    width, height = image.size
    canvas = Image.new("L", (width * _FINE, height * _FINE))
    for instance in sorted(image.instances, key=_order):
        value = UNKNOWN if instance.is_crowd else instance.label + 1
        assert instance.outline is not None, "read with outlines"
        if isinstance(instance.outline, dict):
            canvas.paste(
                value, mask=_decode_runs(instance.outline, image.size).resize(canvas.size, Image.Resampling.NEAREST)
            )
            continue
        draw = ImageDraw.Draw(canvas)
        for polygon in instance.outline:
            if len(polygon) < 6 or len(polygon) % 2 or not np.isfinite(polygon).all():
                raise BadSample("an outline is no polygon of at least 3 points")
            draw.polygon((polygon * _FINE).tolist(), fill=value)
    return canvas.resize(image.size, Image.Resampling.NEAREST)


def _order(instance: Instance) -> tuple[bool, float]:
    """Crowds first, then from the largest box to the smallest."""
    left, top, right, bottom = instance.box
    return not instance.is_crowd, -(right - left) * (bottom - top)


def _decode_runs(outline: dict[str, Any], size: tuple[int, int]) -> Image.Image:
    """The mask of uncompressed run lengths: columns from top to bottom, zeros first.

    Raises: BadSample if they are compressed, or not as many as the image's pixels.
    """
    counts: Sequence[int] = outline["counts"]
    if not isinstance(counts, list) or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise BadSample("run lengths of an outline are compressed or malformed; decode them with pycocotools first")
    width, height = size
    if list(outline["size"]) != [height, width] or sum(counts) != width * height:
        raise BadSample("run lengths of an outline are not those of its image")
    bits = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return Image.fromarray(np.ascontiguousarray(bits.reshape(width, height).T))
