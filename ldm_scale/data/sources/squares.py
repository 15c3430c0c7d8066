"""From a picture with boxes and a label map to the centred square that a shard stores of it.

The square is cut and resized once, here, so that training decodes small files; boxes and map go through the same
transform, and objects that cannot be seen in the square are left out of its list.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_scale.data.annotations import MAP_EXTENSION, Box, View, check_labels, clip_objects, open_map, render_map
from ldm_scale.data.decode import DecodeSettings, crop_box
from ldm_scale.data.pictures import Picture
from ldm_scale.data.policy import BadSample
from ldm_scale.errors import DataError


@dataclass(frozen=True)
class Square:
    """What is stored of a picture; `objects` is None where none were given."""

    members: dict[str, bytes] = field(default_factory=dict)  # the picture, and the map if one was given
    objects: list[dict[str, Any]] | None = None


def make_square(
    data: bytes,
    resolution: int,
    objects: Sequence[tuple[int, Box]] | None = None,
    label_map: bytes | Image.Image | None = None,
    num_labels: int = 0,
    size: tuple[int, int] | None = None,
) -> Square:
    """The centred square of a picture's file, with boxes (pixels of the whole picture) and label map if given.

    Raises: BadSample if the picture or the map cannot be used, or the picture is not of this (width, height).
    """
    picture = Picture(data)
    if size is not None and picture.size != size:
        raise BadSample("picture has another size than its annotations state")
    view = View(picture.size, *crop_box(*picture.size, DecodeSettings(resolution, augment=False), 0, ""))
    members = {"png": png(Image.fromarray(picture.render(view.box, view.mirror, (resolution, resolution))))}
    if label_map is not None:
        whole = open_map(label_map, view.size) if isinstance(label_map, bytes) else label_map
        labels = render_map(whole, view, (resolution, resolution))
        check_labels(labels, num_labels)
        members[MAP_EXTENSION] = png(Image.fromarray(labels))
    if objects is None:
        return Square(members)
    return Square(
        members,
        [{"class": item.label, "box": _pixels(item.box, resolution)} for item in clip_objects(objects, view.box)],
    )


def _pixels(box: Box, resolution: int) -> list[float]:
    """[x, y, width, height] in pixels of the square, to a hundredth."""
    left, top, right, bottom = (value * resolution for value in box)
    return [round(value, 2) for value in (left, top, right - left, bottom - top)]


def png(picture: Image.Image) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def read_names(path: Path, option: str, at_most: int | None = None) -> list[str]:
    """The names in a file, one per line, in the order of their numbers.

    Raises: DataError, naming the option, if it cannot be read, is empty, too long or has a name twice.
    """
    try:
        names = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option} {path}: cannot be read as UTF-8 text ({error}); give one name per line") from None
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if not names or twice is not None:
        fault = "holds no name" if not names else f"has {twice!r} twice"
        raise DataError(f"{option} {path}: {fault}; give each name once, one per line")
    if at_most is not None and len(names) > at_most:
        raise DataError(f"{option} {path}: {len(names)} names, and a map of 8 bits tells {at_most} apart")
    return names
