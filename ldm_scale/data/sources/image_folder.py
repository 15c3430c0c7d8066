"""A folder of images as captioned, classified samples.

Class: the image's first sub-folder (images directly in the folder have the folder's own name). Caption: the text file
of the same name beside the image, else the words of the sub-folder's name. Images are cut to the largest centred
square and resized once, here, so that training decodes small files. What does not decode is left out, counted and
named, as in training.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_scale.data.decode import DecodeSettings, decode_image
from ldm_scale.data.order import digest
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import IMAGE_EXTENSIONS
from ldm_scale.data.sources import (
    MANIFEST_NAME,
    Prepared,
    Sample,
    find_prepared,
    map_in_processes,
    new_folder,
    write_dataset,
)
from ldm_scale.errors import DataError

_MAX_NAMED = 100


@dataclass(frozen=True)
class _LeftOut:
    """An image that cannot be used."""

    file: str
    reason: str


def list_images(folder: Path) -> list[str]:
    """Paths of the images below a folder, relative to it, sorted; hidden files and folders are not looked at."""
    found = []
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
                found.append(Path(directory, name).relative_to(folder).as_posix())
    return sorted(found)


def class_of(relative: str, root_name: str) -> str:
    """The class of an image: its first sub-folder, else the name of the folder itself."""
    parts = relative.split("/")
    return parts[0] if len(parts) > 1 else root_name


def sample_name(relative: str) -> str:
    """A name that tars and webdataset take (no dots, slashes or spaces), unique and stable by a digest of the path."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", relative.rpartition(".")[0]).strip("-")[:64]
    return f"{words}-{digest('image', relative, size=5).hex()}"


def _caption(folder: Path, relative: str, class_name: str) -> str:
    """The caption of an image.

    Raises: BadSample if its text file is not UTF-8.
    """
    text = (folder / relative).with_suffix(".txt")
    if not text.is_file():
        return " ".join(re.split(r"[\s_-]+", class_name)).strip()
    try:
        return text.read_text("utf-8").strip()
    except UnicodeDecodeError:
        raise BadSample("caption is not UTF-8") from None


def _make_sample(relative: str, folder: Path, resolution: int, class_numbers: dict[str, int]) -> Sample | _LeftOut:
    """The sample of one image file, or why there is none."""
    class_name = class_of(relative, folder.name)
    settings = DecodeSettings(resolution=resolution, augment=False)
    try:
        caption = _caption(folder, relative, class_name)
        pixels = decode_image((folder / relative).read_bytes(), settings, 0, relative)
    except BadSample as error:
        return _LeftOut(relative, str(error))
    except OSError as error:
        return _LeftOut(relative, f"file cannot be read ({error.strerror})")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    metadata = {"class": class_numbers[class_name], "file": relative, "group": class_name}
    members = {
        "png": buffer.getvalue(),
        "txt": caption.encode("utf-8"),
        "json": json.dumps(metadata, ensure_ascii=False).encode("utf-8", "replace"),
    }
    return Sample(sample_name(relative), relative, members)


def _make_all(
    images: list[str], folder: Path, resolution: int, class_numbers: dict[str, int], left_out: list[_LeftOut]
) -> Iterator[Sample]:
    """The usable samples in order, made by one process per core; the others go to `left_out`."""
    work = partial(_make_sample, folder=folder, resolution=resolution, class_numbers=class_numbers)
    for result in map_in_processes(work, images, "resize"):
        if isinstance(result, _LeftOut):
            left_out.append(result)
        else:
            yield result


def prepare_image_folder(
    folder: Path, out: Path, resolution: int, heldout_percent: float, samples_per_shard: int
) -> Prepared:
    """The data set at `out`, made now or found there.

    Raises: DataError if the folder has no images, none decodes, or something else lies at `out`.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder that holds the images")
    images = list_images(folder)
    if not images:
        raise DataError(f"{folder}: no images below it; looked for {', '.join(IMAGE_EXTENSIONS)}")
    request: dict[str, Any] = {
        "source": "image-folder",
        "folder": folder.name,
        # Names and sizes, not contents: reading every image again would cost as much as preparing it.
        "listing": digest(*(f"{image}:{(folder / image).stat().st_size}" for image in images)).hex(),
        "resolution": resolution,
        "heldout_percent": heldout_percent,
        "samples_per_shard": samples_per_shard,
    }
    if found := find_prepared(out, request):
        return found
    classes = sorted({class_of(image, folder.name) for image in images})
    class_numbers = {name: number for number, name in enumerate(classes)}
    left_out: list[_LeftOut] = []
    # Filled while the samples are written, so that the manifest tells what became of every image.
    counts: Counter[str] = Counter()
    names: list[str] = []

    def samples() -> Iterator[Sample]:
        yield from _make_all(images, folder, resolution, class_numbers, left_out)
        if len(left_out) == len(images):
            first = left_out[0]
            raise DataError(f"{folder}: none of {len(images)} images can be used; {first.file}: {first.reason}")
        counts.update(item.reason for item in left_out)
        names.extend(f"{item.file}: {item.reason}" for item in left_out[:_MAX_NAMED])

    describe = {
        "name": folder.name,
        "resolution": resolution,
        "classes": classes,
        "license": None,
        "attribution": None,
        "left_out": counts,
        "left_out_names": names,
        "request": request,
    }
    with new_folder(out) as temporary:
        manifest = write_dataset(
            temporary,
            samples(),
            heldout_percent=heldout_percent,
            samples_per_shard=samples_per_shard,
            describe=describe,
        )
    return Prepared(out / MANIFEST_NAME, manifest, reused=False)
