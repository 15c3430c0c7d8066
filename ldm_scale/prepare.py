"""`ldm-scale prepare`: from OpenMoji, COCO, a folder, a table or existing tars to webdataset shards and a manifest.

From a manifest, others: filtered, in aspect-ratio buckets, mixed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ldm_scale.data.annotations import MAX_MAP_LABELS
from ldm_scale.data.sources import Prepared
from ldm_scale.data.sources.buckets import BucketOptions, bucket_manifest
from ldm_scale.data.sources.coco import CocoRequest, prepare_coco
from ldm_scale.data.sources.filtering import Rules, filter_manifest
from ldm_scale.data.sources.image_folder import prepare_image_folder
from ldm_scale.data.sources.mixing import mix_manifests
from ldm_scale.data.sources.openmoji import WITHOUT_SKIN_TONES, prepare_openmoji
from ldm_scale.data.sources.openmoji_scenes import prepare_openmoji_scenes
from ldm_scale.data.sources.squares import read_names
from ldm_scale.data.sources.table import TableRequest, prepare_table
from ldm_scale.data.sources.table_files import Columns
from ldm_scale.data.sources.tars import IndexOptions, index_tars
from ldm_scale.data.urls import public_name
from ldm_scale.errors import DataError
from ldm_scale.operations.prepare_arguments import build_parser


def _names(path: Path | None, option: str, at_most: int | None = None) -> tuple[str, ...]:
    """The names in a file; none if there is no file."""
    return () if path is None else tuple(read_names(path, option, at_most))


def _prepare_coco(arguments: argparse.Namespace) -> Prepared:
    """A split of COCO.

    Raises: DataError if label maps come without names, or the reverse.
    """
    if (arguments.stuff is None) != (arguments.map_labels is None):
        raise DataError("--stuff and --map-labels go together: the names say what the values of the maps mean")
    if (arguments.panoptic is None) != (arguments.panoptic_maps is None):
        raise DataError("--panoptic and --panoptic-maps go together: the file says what the numbers in the PNGs mean")
    request = CocoRequest(
        images=arguments.images,
        instances=arguments.instances,
        captions=arguments.captions,
        stuff=arguments.stuff,
        map_labels=_names(arguments.map_labels, "--map-labels", MAX_MAP_LABELS),
        instance_maps=arguments.instance_maps,
        resolution=arguments.resolution,
        min_objects=arguments.min_objects,
        samples_per_shard=arguments.samples_per_shard,
        panoptic=arguments.panoptic,
        panoptic_maps=arguments.panoptic_maps,
        license_text=arguments.license,
        num_workers=arguments.workers,
    )
    return prepare_coco(arguments.out, arguments.split, request)


def _prepare_table(arguments: argparse.Namespace) -> Prepared:
    """The data set of a table."""
    keep = tuple(name.strip() for name in arguments.keep.split(",") if name.strip())
    columns = Columns(arguments.image_column, arguments.caption_column, arguments.class_column, keep)
    request = TableRequest(arguments.table, columns, arguments.resolution, arguments.base, arguments.license)
    percent = 5.0 if arguments.heldout_percent is None else arguments.heldout_percent
    return prepare_table(arguments.out, request, percent, arguments.samples_per_shard, arguments.workers)


def _choose(arguments: argparse.Namespace) -> Prepared:
    """The manifest that is made from others."""
    if arguments.source == "mix":
        return mix_manifests([(Path(name), weight) for name, weight in arguments.manifests], arguments.out)
    if arguments.source == "buckets":
        options = BucketOptions(arguments.resolution, arguments.step, arguments.max_aspect, arguments.min_share)
        return bucket_manifest(arguments.manifest, arguments.out, options, arguments.workers)
    rules = Rules(
        arguments.min_side,
        arguments.max_side,
        arguments.min_pixels,
        arguments.max_aspect,
        arguments.min_caption_length,
        tuple(arguments.min_score),
        tuple(arguments.max_score),
    )
    return filter_manifest(arguments.manifest, arguments.out, rules, arguments.split, arguments.workers)


def _prepare(arguments: argparse.Namespace) -> Prepared:
    """What the arguments ask for."""
    if arguments.source == "coco":
        return _prepare_coco(arguments)
    if arguments.source == "table":
        return _prepare_table(arguments)
    if arguments.source in ("filter", "buckets", "mix"):
        return _choose(arguments)
    if arguments.source in ("index", "image-folder"):
        object_classes = _names(arguments.object_classes, "--object-classes")
        map_labels = _names(arguments.map_labels, "--map-labels", MAX_MAP_LABELS)
    if arguments.source == "index":
        options = IndexOptions(arguments.workers, arguments.checksums, arguments.max_bad, arguments.max_bad_total)
        return index_tars(arguments.shards, arguments.out, arguments.split, object_classes, map_labels, options)
    percent: float | None = arguments.heldout_percent
    if arguments.source == "image-folder":
        return prepare_image_folder(
            arguments.folder,
            arguments.out,
            arguments.resolution,
            5.0 if percent is None else percent,
            arguments.samples_per_shard,
            object_classes,
            map_labels,
            arguments.license,
            arguments.workers,
        )
    if arguments.source == "openmoji-scenes":
        return prepare_openmoji_scenes(
            arguments.out,
            arguments.resolution,
            arguments.num_samples,
            arguments.seed,
            arguments.subset,
            arguments.max_objects,
            5.0 if percent is None else percent,
            arguments.samples_per_shard,
            arguments.backgrounds,
            arguments.workers,
        )
    if percent is None:
        percent = 5.0 if arguments.subset in (None, WITHOUT_SKIN_TONES) else 0.0
    return prepare_openmoji(
        arguments.out, arguments.resolution, arguments.subset, percent, arguments.samples_per_shard, arguments.workers
    )


def _tables(manifest: dict[str, Any]) -> list[str]:
    """Shares of a mixture, buckets and quarantined shards, for people."""
    lines = [f"  {entry['weight']:7.2%}  {entry['manifest']}" for entry in manifest.get("mixture", [])]
    for name, split in manifest.get("splits", {}).items():
        sized = [part for part in split.get("parts", []) if "size" in part]
        if sized and "cropped" in sized[0]:
            lines.append(f"{name}: height x width, samples, share, area that is cropped away")
        for part in sized:
            height, width = part["size"]
            lines.append(
                f"  {height:5} x {width:<5} {part['num_samples']:12,}"
                + "".join(f"  {part[key]:7.2%}" for key in ("share", "cropped") if key in part)
            )
        for shard in split.get("quarantined", []):
            lines.append(f"{name}: left out whole: {public_name(shard['file'])} ({shard['bad']} unusable parts)")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Exit status 0.

    Raises: DataError if the source or the destination cannot be used.
    """
    arguments = build_parser().parse_args(argv)
    started = time.monotonic()
    prepared = _prepare(arguments)
    manifest = prepared.manifest
    splits = {name: split["num_samples"] for name, split in manifest.get("splits", {}).items()}
    if arguments.json:
        result = {
            "manifest": str(prepared.manifest_path),
            "status": "reused" if prepared.reused else "written",
            "splits": splits,
            "left_out": manifest.get("left_out", {}),
            "seconds": round(time.monotonic() - started, 3),
        }
        print(json.dumps(result, ensure_ascii=False))
        return 0
    counts = ", ".join(f"{name} {count}" for name, count in splits.items())
    counted = f" ({counts} samples)" if splits else ""
    print(f"{'reused' if prepared.reused else 'written'}: {prepared.manifest_path}{counted}")
    for line in _tables(manifest):
        print(line)
    for reason, count in manifest.get("left_out", {}).items():
        print(f"left out: {count} ({reason})")
    for name in manifest.get("left_out_names", []):
        print(f"  {name}")
    if manifest.get("attribution"):
        print(manifest["attribution"])
    return 0
