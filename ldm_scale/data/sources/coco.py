"""Images with COCO's annotations: boxes, all captions, and label maps.

Maps come from the instances' outlines, from COCO-Stuff's pictures or from panoptic segmentations.

One call makes one split in a folder of its own; the manifest above them lists every split that is there. Classes of
the objects are the file's categories in the order of their numbers. Crowds are no objects (their box is around many),
and in a map drawn from instances they are unknown. The caption that training shows of a picture is a function of its
place in the stream, as a crop is; everything else takes the first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_scale.data.indexing import write_json
from ldm_scale.data.manifest import FORMAT, STATE_NAME, VERSION, read_manifest
from ldm_scale.data.policy import BadSample
from ldm_scale.data.sources import (
    MANIFEST_NAME,
    Layout,
    LeftOut,
    Prepared,
    Sample,
    Source,
    file_digest,
    find_prepared,
    license_request,
)
from ldm_scale.data.sources.coco_files import CocoImage, draw_map, read_captions_file, read_instances
from ldm_scale.data.sources.coco_panoptic import Segments, draw_panoptic, read_panoptic
from ldm_scale.data.sources.image_folder import sample_name
from ldm_scale.data.sources.squares import make_square
from ldm_scale.data.sources.writing import write_dataset
from ldm_scale.errors import DataError

NO_INSTANCE = "background"  # label 0 of maps that are drawn from instances


@dataclass(frozen=True)
class CocoRequest:
    """What to make a split from."""

    images: Path  # folder with the pictures
    instances: Path
    captions: Path | None
    stuff: Path | None  # folder with COCO-Stuff's label maps, NAME.png for NAME.jpg
    map_labels: tuple[str, ...]  # names of their values
    instance_maps: bool  # maps drawn from the instances' outlines instead
    resolution: int
    min_objects: int  # images with fewer that can be seen are left out
    samples_per_shard: int
    panoptic: Path | None = None  # file of panoptic segmentations, which become the maps
    panoptic_maps: Path | None = None  # folder of its PNGs
    license_text: str | None = None
    num_workers: int | None = None


def prepare_coco(out: Path, split: str, request: CocoRequest) -> Prepared:
    """The data set at `out` with this split, made now or found there; other splits of the same lists stay.

    Raises: DataError if a file is not COCO's or lies elsewhere, no image can be used, or something else lies at `out`.
    """
    for option, folder in (
        ("--images", request.images),
        ("--stuff", request.stuff),
        ("--panoptic-maps", request.panoptic_maps),
    ):
        if folder is not None and not folder.is_dir():
            raise DataError(f"{option} {folder}: no such folder")
    parts = [*out.glob(f"*/{MANIFEST_NAME}"), *out.glob(f"*/{STATE_NAME}")]
    if out.is_dir() and any(out.iterdir()) and not parts:
        raise DataError(f"{out}: exists and is not a data set of `ldm-scale prepare coco`; choose another --out")
    described: dict[str, Any] = {"source": "coco", "split": split, **_identity(request)}
    part = find_prepared(out / split, described)
    if part is None:
        part = _write(out / split, split, request, described)
    return Prepared(out / MANIFEST_NAME, _publish(out), part.reused)


def _identity(request: CocoRequest) -> dict[str, Any]:
    """What decides the samples, as plain values. Pictures by their list in the instances' file alone."""
    files = {"instances": request.instances, "captions": request.captions}
    return {
        **{name: None if path is None else file_digest(path) for name, path in files.items()},
        "stuff": None if request.stuff is None else request.stuff.name,
        "map_labels": list(request.map_labels),
        "instance_maps": request.instance_maps,
        "resolution": request.resolution,
        "min_objects": request.min_objects,
        "samples_per_shard": request.samples_per_shard,
        **({} if request.panoptic is None else {"panoptic": file_digest(request.panoptic)}),
        **license_request(request.license_text),
    }


def _write(folder: Path, split: str, request: CocoRequest, described: dict[str, Any]) -> Prepared:
    """The part of one split, made now."""
    instances = read_instances(request.instances, with_outlines=request.instance_maps)
    images = instances.images
    if request.captions is not None:
        captions = read_captions_file(request.captions)
        images = [replace(image, captions=captions.get(image.number, ())) for image in images]
    panoptic = None if request.panoptic is None else read_panoptic(request.panoptic)
    if panoptic is not None:
        labels = panoptic.names
    else:
        labels = [NO_INSTANCE, *instances.names] if request.instance_maps else list(request.map_labels)
    licenses = Counter(image.license for image in images if image.license is not None)
    describe = {
        "name": "coco",
        "resolution": request.resolution,
        "classes": [],
        "object_classes": instances.names,
        **({"map_labels": labels} if labels else {}),
        "license": request.license_text,
        **({"image_licenses": dict(sorted(licenses.items()))} if licenses else {}),
        "attribution": None,
        "left_out": {reason: count for reason, count in instances.dropped.items() if count},
        "left_out_names": [],
        "request": described,
    }
    _check_lists(folder, describe)
    make = partial(_make_sample, request=request, num_labels=len(labels))
    segments = {} if panoptic is None else panoptic.images
    items = ((image, segments.get(image.number)) for image in images)
    source = Source(str(request.instances), items, len(images), make, family=lambda item: item[0].file)
    layout = Layout(request.samples_per_shard, split=split, num_workers=request.num_workers)
    return write_dataset(folder, described, describe, source, layout)


def _make_sample(item: tuple[CocoImage, Segments | None], request: CocoRequest, num_labels: int) -> Sample | LeftOut:
    """The sample of one image, or why there is none."""
    image, segments = item
    try:
        label_map = _label_map(image, segments, request)
        content = (request.images / image.file).read_bytes()
        square = make_square(content, request.resolution, image.boxes, label_map, num_labels, image.size)
    except BadSample as error:
        return LeftOut(image.file, str(error))
    except OSError as error:
        return LeftOut(image.file, f"file cannot be read ({error.strerror})")
    assert square.objects is not None, "boxes were given"
    if len(square.objects) < request.min_objects:
        return LeftOut(image.file, f"fewer objects than --min-objects {request.min_objects}")
    metadata = {"id": image.number, "file": image.file, "captions": list(image.captions), "objects": square.objects}
    if image.license is not None:
        metadata["license"] = image.license
    members = {**square.members, "json": json.dumps(metadata, ensure_ascii=False).encode("utf-8")}
    return Sample(sample_name(image.file), members)


def _label_map(image: CocoImage, segments: Segments | None, request: CocoRequest) -> bytes | Image.Image | None:
    """The label map of an image, None if none was asked for.

    Raises: BadSample if it cannot be made.
    """
    if request.instance_maps:
        return draw_map(image)
    if request.panoptic_maps is not None:
        if segments is None:
            raise BadSample("no panoptic annotation")
        return draw_panoptic(_read_map(request.panoptic_maps / segments.file), segments, image.size)
    return None if request.stuff is None else _read_map((request.stuff / image.file).with_suffix(".png"))


def _read_map(path: Path) -> bytes:
    """A map's file.

    Raises: BadSample if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSample(f"its label map {path} cannot be read ({error.strerror})") from None


def _parts(out: Path) -> dict[str, dict[str, Any]]:
    """The manifest of each split that is there."""
    return {path.parent.name: read_manifest(path) for path in sorted(out.glob(f"*/{MANIFEST_NAME}"))}


def _check_lists(folder: Path, described: dict[str, Any]) -> None:
    """Nothing, if the splits beside `folder` have the names that it is going to have.

    Raises: DataError otherwise: one manifest has one list for all.
    """
    for name, part in _parts(folder.parent).items():
        for key in ("object_classes", "map_labels", "resolution", "license"):
            if part.get(key) != described.get(key):
                raise DataError(
                    f"{folder.parent}: its split {name} and {folder.name} differ in {key}; choose another --out"
                )


def _publish(out: Path) -> dict[str, Any]:
    """The manifest at `out`, written anew from those of its splits; once more if another was finished meanwhile."""
    written: dict[str, Any] | None = None
    while (manifest := _combine(_parts(out))) != written:
        write_json(out / MANIFEST_NAME, manifest)
        written = manifest
    return manifest


def _combine(parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The manifest of these splits."""
    first = next(iter(parts.values()))
    counts: dict[str, Counter[str]] = {"image_licenses": Counter(), "left_out": Counter()}
    splits: dict[str, Any] = {}
    for name, part in parts.items():
        for key, counter in counts.items():
            counter.update(part.get(key, {}))
        (entry,) = part["splits"].values()
        shards = [{**shard, **{key: f"{name}/{shard[key]}" for key in ("file", "index")}} for shard in entry["shards"]]
        splits[name] = {**entry, "shards": shards}
    return {
        **{key: value for key, value in first.items() if key not in ("request", "left_out_names", *counts)},
        "format": FORMAT,
        "version": VERSION,
        **({"image_licenses": dict(counts["image_licenses"])} if counts["image_licenses"] else {}),
        "left_out": dict(counts["left_out"]),
        "left_out_names": [line for part in parts.values() for line in part["left_out_names"]],
        "request": {"source": "coco", "splits": {name: part["request"] for name, part in parts.items()}},
        "splits": splits,
    }
