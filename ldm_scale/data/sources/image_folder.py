"""A folder of images as captioned, classified samples, with boxes and label maps where they are asked for.

Class: the image's first sub-folder (images directly in the folder have the folder's own name). Caption: the text file
of the same name beside the image, else the words of the sub-folder's name. Images are cut to the largest centred
square and resized once, here, so that training decodes small files. What does not decode is left out, counted and
named, as in training.

Boxes are in NAME.json beside NAME.png, {"objects": [{"class": name or number, "box": [x, y, width, height]}]} in pixels
of the picture; a label map is NAME.seg.png. Either is read when the list of its names is given, and then no image may
lack it: an image of unknown content is not one without objects.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ldm_scale.data.annotations import MAP_EXTENSION, Box, read_objects
from ldm_scale.data.permutation import digest
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import IMAGE_EXTENSIONS
from ldm_scale.data.sources import Layout, LeftOut, Prepared, Sample, Source, find_prepared, license_request
from ldm_scale.data.sources.squares import make_square
from ldm_scale.data.sources.writing import write_dataset
from ldm_scale.errors import DataError
from ldm_scale.telemetry.log import get_logger

PICTURE_EXTENSIONS = (*IMAGE_EXTENSIONS, "gif", "bmp")  # of files that are looked at
_OTHER_PICTURES = ("tif", "tiff", "heic", "heif", "avif", "jxl", "jp2", "ppm", "tga", "psd", "exr")


@dataclass(frozen=True)
class FolderRequest:
    """How the images of a folder become samples."""

    folder: Path
    resolution: int
    object_classes: tuple[str, ...] = ()  # of NAME.json; empty: boxes are not looked at
    map_labels: tuple[str, ...] = ()  # of NAME.seg.png; empty: maps are not looked at

    @property
    def lists(self) -> dict[str, list[str]]:
        """The manifest's entries with names, of what is looked at."""
        lists = {"object_classes": self.object_classes, "map_labels": self.map_labels}
        return {key: list(names) for key, names in lists.items() if names}


def list_images(folder: Path) -> list[str]:
    """Paths of the images below a folder, relative to it, sorted; hidden files and label maps are not looked at.

    Links to folders are followed, but no folder is entered twice: not through a link to one above it, which would have
    no end, nor through several. A folder's own place comes before links to it. The log names links that were not
    followed, and tells of pictures of other kinds.
    """
    found: list[str] = []
    linked: list[Path] = []
    entered: set[tuple[int, int]] = set()
    _walk(folder, folder, found, linked, entered)
    for link in linked:  # grows: linked folders may hold links
        if not _walk(link, folder, found, linked, entered):
            get_logger().warning(f"{link}: a link to a folder whose images are read already; not followed")
    chosen = sorted(name for name in found if _extension(name) in PICTURE_EXTENSIONS)
    others = sorted(set(found) - set(chosen))
    if others:
        get_logger().warning(
            f"{folder}: {len(others)} pictures of other kinds, such as {others[0]}, are not looked at; save them as PNG"
        )
    return chosen


def _walk(top: Path, folder: Path, found: list[str], linked: list[Path], entered: set[tuple[int, int]]) -> bool:
    """Whether `top` was new: then images below it are found and links noted, but for folders that were entered."""
    if _identity(top) in entered:
        return False
    for directory, subfolders, names in os.walk(top):
        entered.add(_identity(directory))
        seen = sorted(name for name in subfolders if not name.startswith("."))
        linked += [path for name in seen if (path := Path(directory, name)).is_symlink()]
        subfolders[:] = [name for name in seen if _identity(Path(directory, name)) not in entered]
        for name in names:
            if name.startswith(".") or name.lower().endswith(f".{MAP_EXTENSION}"):
                continue
            if _extension(name) in (*PICTURE_EXTENSIONS, *_OTHER_PICTURES):
                found.append(Path(directory, name).relative_to(folder).as_posix())
    return True


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _identity(directory: str | Path) -> tuple[int, int]:
    """What a folder is the same by, whatever its path."""
    status = os.stat(directory)
    return status.st_dev, status.st_ino


def class_of(relative: str, root_name: str) -> str:
    """The class of an image: its first sub-folder, else the name of the folder itself."""
    parts = relative.split("/")
    return parts[0] if len(parts) > 1 else root_name


def sample_name(relative: str) -> str:
    """A name that tars and webdataset take (no dots, slashes or spaces), unique and stable by a digest of the path."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", relative.rpartition(".")[0]).strip("-")[:64]
    return f"{words}-{digest('image', relative, size=5).hex()}"


def file_caption(folder: Path, relative: str) -> str:
    """The caption of an image: NAME.txt beside NAME.png, or else the name of its class in words.

    Raises: BadSample if its text file is not UTF-8.
    """
    text = (folder / relative).with_suffix(".txt")
    if not text.is_file():
        class_name = class_of(relative, folder.name)
        return " ".join(re.split(r"[\s_-]+", class_name)).strip()
    try:
        return text.read_text("utf-8").strip()
    except UnicodeDecodeError:
        raise BadSample("caption is not UTF-8") from None


def _objects(file: Path, object_classes: tuple[str, ...]) -> list[tuple[int, Box]]:
    """The objects of an image by its NAME.json.

    Raises: BadSample if it is no JSON object with them.
    """
    try:
        metadata = json.loads(file.read_bytes()) if file.is_file() else {}
    except (ValueError, RecursionError):
        raise BadSample("metadata is not JSON") from None
    if not isinstance(metadata, dict):
        raise BadSample("metadata is not a JSON object")
    return read_objects(metadata, {name: number for number, name in enumerate(object_classes)})


def _make_sample(relative: str, request: FolderRequest, class_numbers: dict[str, int]) -> Sample | LeftOut:
    """The sample of one image file, or why there is none."""
    class_name, path = class_of(relative, request.folder.name), request.folder / relative
    try:
        caption = file_caption(request.folder, relative)
        objects = _objects(path.with_suffix(".json"), request.object_classes) if request.object_classes else None
        label_map = None
        if request.map_labels:
            map_file = path.with_suffix(f".{MAP_EXTENSION}")
            if not map_file.is_file():
                raise BadSample(f"no label map ({MAP_EXTENSION})")
            label_map = map_file.read_bytes()
        square = make_square(path.read_bytes(), request.resolution, objects, label_map, len(request.map_labels))
    except BadSample as error:
        return LeftOut(relative, str(error))
    except OSError as error:
        return LeftOut(relative, f"file cannot be read ({error.strerror})")
    metadata: dict[str, Any] = {"class": class_numbers[class_name], "file": relative, "group": class_name}
    if square.objects is not None:
        metadata["objects"] = square.objects
    members = {
        **square.members,
        "txt": caption.encode("utf-8"),
        "json": json.dumps(metadata, ensure_ascii=False).encode("utf-8", "replace"),
    }
    return Sample(sample_name(relative), members)


def _listing(images: list[str], request: FolderRequest) -> str:
    """A digest of what is there by names and sizes: reading it all again would cost as much as preparing it."""
    endings = [".json"] * bool(request.object_classes) + [f".{MAP_EXTENSION}"] * bool(request.map_labels)
    entries = []
    for image in images:
        path = request.folder / image
        sizes = [path.stat().st_size]
        for annotation in (path.with_suffix(ending) for ending in endings):
            sizes.append(annotation.stat().st_size if annotation.is_file() else -1)
        entries.append(":".join(map(str, (image, *sizes))))
    return digest(*entries).hex()


def _require_images(folder: Path) -> list[str]:
    """What `list_images` finds, at least one.

    Raises: DataError otherwise.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder that holds the images")
    images = list_images(folder)
    if not images:
        raise DataError(f"{folder}: no images below it; looked for {', '.join(PICTURE_EXTENSIONS)}")
    return images


def prepare_image_folder(
    folder: Path,
    out: Path,
    resolution: int,
    heldout_percent: float,
    samples_per_shard: int,
    object_classes: tuple[str, ...] = (),
    map_labels: tuple[str, ...] = (),
    license_text: str | None = None,
    num_workers: int | None = None,
) -> Prepared:
    """The data set at `out`, made now or found there.

    Raises: DataError if the folder has no images, none decodes, or something else lies at `out`.
    """
    folder = folder.resolve()
    images = _require_images(folder)
    how = FolderRequest(folder, resolution, object_classes, map_labels)
    request: dict[str, Any] = {
        "source": "image-folder",
        "folder": folder.name,
        "listing": _listing(images, how),
        "resolution": resolution,
        "heldout_percent": heldout_percent,
        "samples_per_shard": samples_per_shard,
        **how.lists,
        **license_request(license_text),
    }
    if found := find_prepared(out, request):
        return found
    classes = sorted({class_of(image, folder.name) for image in images})
    describe = {
        "name": folder.name,
        "resolution": resolution,
        "classes": classes,
        **how.lists,
        "license": license_text,
        "attribution": None,
        "left_out": {},
        "left_out_names": [],
        "request": request,
    }
    make = partial(_make_sample, request=how, class_numbers={name: number for number, name in enumerate(classes)})
    source = Source(str(folder), images, len(images), make, family=str)
    return write_dataset(
        out, request, describe, source, Layout(samples_per_shard, heldout_percent, num_workers=num_workers)
    )
