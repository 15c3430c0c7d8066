"""Manifests: which shards make a split. Read into columns, so that a million shards cost neither seconds nor gigabytes.

    {"format": "ldm-scale-shards", "version": 2, "classes": [...], ..., "splits": {NAME: SPLIT}}
    SPLIT  {"num_samples": N, "shards": [ROW, ...]}, or, where pictures of different shapes train together,
           {"num_samples": N, "parts": [{"size": [height, width], "num_samples": n, "shards": [ROW, ...]}, ...]}
    ROW    {"file", "index", "num_samples", "bytes", "keys", ...}; paths are relative to the manifest, or URLs

A mixture has {"format", "version", "mixture": [{"manifest": path, "weight": w}, ...]} instead: parts that are drawn in
fixed shares.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_scale.data.annotations import MAX_MAP_LABELS
from ldm_scale.data.latents import IMAGES, LATENTS, LatentCache
from ldm_scale.data.urls import names_shards, public_name
from ldm_scale.errors import ConfigError, DataError

FORMAT = "ldm-scale-shards"
VERSION = 2
MANIFEST_NAME = "manifest.json"
STATE_NAME = ".prepare"  # in the folder of a data set while it is made
ANEW = "write it anew with `ldm-scale prepare`"


def read_json(path: Path, what: str) -> Any:
    """The parsed JSON file.

    Raises: DataError if it is missing or not JSON.
    """
    return _parse_json(path, what)


def _parse_json(path: Path, what: str, **options: Any) -> Any:
    try:
        return json.loads(path.read_bytes(), **options)
    except FileNotFoundError:
        raise DataError(f"{path}: no {what} here; write one with `ldm-scale prepare`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: this {what} cannot be read ({error}); {ANEW}") from None


@contextmanager
def _without_collection() -> Iterator[None]:
    """Nothing; the cyclic garbage collector waits, which otherwise looks at all rows again whenever there are more.

    It takes most of the time of reading a million.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def manifest_path(path: str | Path) -> Path:
    """The manifest that a path names: a file, or the one in a folder.

    Raises: ConfigError if it names shards.
    """
    if names_shards(str(path)):
        raise needs_manifest(str(path), "this")
    path = Path(path)
    return path / MANIFEST_NAME if path.is_dir() else path


def needs_manifest(shards: str, what: str) -> ConfigError:
    """The error that something cannot work on shards without a manifest."""
    name = public_name(shards)
    return ConfigError(
        f"{name} names shards without a manifest, and {what} needs one: write it with `ldm-scale prepare index "
        f"'{name}' --out MANIFEST`, and give that (data.manifest)"
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of a manifest, of our format and version, with its splits.

    Raises: DataError otherwise.
    """
    return _checked(path, _read(path))


def _read(path: Path, **options: Any) -> Any:
    if not path.exists():
        # Of COCO each split is made in a folder of its own.
        if (path.parent / STATE_NAME).is_dir() or any(path.parent.glob(f"*/{STATE_NAME}")):
            raise DataError(
                f"{path}: no manifest here yet, the data set is not finished; run the same `ldm-scale prepare` again, "
                "and it goes on where it was"
            )
        tars = sorted(path.parent.glob("*.tar")) if path.parent.is_dir() else []
        hint = (
            f"{len(tars)} tars lie in its folder: `ldm-scale prepare index {path.parent}/*.tar --out {path}` writes one"
            if tars
            else f"no shards lie in {path.parent} either; see `ldm-scale prepare --help`, then set data.manifest"
        )
        raise DataError(f"{path}: no manifest here; {hint}")
    return _parse_json(path, "manifest", **options)


def _checked(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f'{path}: not a manifest of `ldm-scale prepare` (its "format" must be {FORMAT!r})')
    if content.get("version") != VERSION:
        raise DataError(
            f"{path}: manifest version {content.get('version')}, this program reads {VERSION}; remove it with its "
            "shards' indices and write it anew (`ldm-scale prepare index` leaves the tars as they are)"
        )
    if not isinstance(content.get("splits"), dict) and not isinstance(content.get("mixture"), list):
        raise DataError(f'{path}: not a manifest of `ldm-scale prepare` (it has neither "splits" nor a "mixture")')
    return content


def plain_splits(path: Path, manifest: dict[str, Any], instead: str) -> dict[str, Any]:
    """The splits of a manifest, each of which lists shards.

    Raises: DataError, which says what to do `instead`, of a mixture and of aspect-ratio buckets.
    """
    if "splits" not in manifest:
        raise DataError(f"{path}: a mixture; {instead}")
    splits: dict[str, Any] = manifest["splits"]
    if any("parts" in split for split in splits.values()):
        raise DataError(f"{path}: has aspect-ratio buckets, and a latent cache has one size of pictures; {instead}")
    return splits


@dataclass(frozen=True)
class Rows:
    """Some shards, a column per property. Shapes: n shards."""

    base: Path  # that the files are relative to
    files: Sequence[str]
    indices: Sequence[str]
    keys: Sequence[str]  # digests of their samples' names; "" where the manifest has none
    num_samples: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    source_bytes: NDArray[np.int64]  # of the image shard that a latent shard stands for; -1 = an image shard

    def __len__(self) -> int:
        return len(self.files)

    def select(self, rows: Sequence[int]) -> Rows:
        """Some of the shards."""
        files, indices, keys = ([column[row] for row in rows] for column in (self.files, self.indices, self.keys))
        chosen = list(rows)
        columns = self.num_samples[chosen], self.num_bytes[chosen], self.source_bytes[chosen]
        return Rows(self.base, files, indices, keys, *columns)


@dataclass(frozen=True)
class Part:
    """Shards that are drawn from together."""

    rows: Rows
    size: tuple[int, int] | None = None  # height and width of its bucket; None = the training's resolution
    weight: float | None = None  # its share of a mixture; None = by its number of samples

    @property
    def num_samples(self) -> int:
        """Samples in it."""
        return int(self.rows.num_samples.sum())


@dataclass(frozen=True)
class Split:
    """One split of a manifest."""

    path: Path
    name: str
    parts: tuple[Part, ...]
    class_names: tuple[str, ...] = ()
    object_classes: tuple[str, ...] = ()
    map_labels: tuple[str, ...] = ()
    latents: LatentCache | None = None


class _Row(tuple[str, str, str, int, int, int]):
    """(file, index, keys, samples, bytes, source bytes): a fifth of the memory of the dictionary that it is made of."""


def _compact(item: dict[str, Any]) -> Any:
    """A JSON object as it is, or, of a shard, what a training needs of it."""
    if "file" not in item or "index" not in item:
        return item
    kind = item.get("kind", IMAGES)
    if kind not in (IMAGES, LATENTS):
        raise ValueError(f"a shard of kind {kind!r}")
    source = int(item["source"]["bytes"]) if kind == LATENTS else -1
    numbers = int(item["num_samples"]), int(item["bytes"]), source
    return _Row((str(item["file"]), str(item["index"]), str(item.get("keys", "")), *numbers))


def _rows(items: list[Any], base: Path) -> Rows:
    """The columns of a list of shards."""
    if not all(type(item) is _Row for item in items):
        raise ValueError("a shard without its file or index")
    files, indices, keys, *numbers = zip(*items, strict=True) if items else ((), (), (), (), (), ())
    columns = [np.array(column, dtype=np.int64) for column in numbers]
    if any((column < 0).any() for column in columns[:2]):
        raise ValueError("a shard with a negative size")
    return Rows(base, files, indices, keys, *columns)


@_without_collection()
def read_split(path: Path, name: str, _depth: int = 0) -> Split:
    """A split of the manifest at `path`.

    Raises: DataError if there is no manifest, no such split, or it is malformed or empty.
    """
    try:
        content = _checked(path, _read(path, object_hook=_compact))
        if "mixture" in content:
            return read_mixture(path, name, content["mixture"], _depth)
        if name not in content["splits"]:
            known = ", ".join(sorted(content["splits"])) or "none"
            raise DataError(f"{path}: no split {name!r}; it has: {known} (data.split, data.validation_split)")
        entry = content["splits"][name]
        stated = int(entry["num_samples"])
        listed = entry.get("parts", [entry])
        parts = tuple(
            Part(_rows(part["shards"], path.parent), _size(part["size"]) if "size" in part else None) for part in listed
        )
        classes, objects, labels = (
            tuple(map(str, content.get(key, ()))) for key in ("classes", "object_classes", "map_labels")
        )
        if len(labels) > MAX_MAP_LABELS:
            raise ValueError(f"{len(labels)} map_labels, and a map tells {MAX_MAP_LABELS} apart")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: malformed manifest ({error!r}); {ANEW}") from None
    counted = sum(part.num_samples for part in parts)
    if counted == 0 or any(part.num_samples == 0 for part in parts):
        raise DataError(f"{path}: split {name!r} has no shards or no samples; {ANEW}")
    if counted != stated:
        raise DataError(
            f"{path}: split {name!r} is said to have {stated} samples but its shards have {counted}; {ANEW}"
        )
    latents = None
    if any((part.rows.source_bytes >= 0).any() for part in parts):
        latents = LatentCache.from_dict(content.get("latents"), str(path))
    return Split(path, name, parts, classes, objects, labels, latents)


def _size(size: Any) -> tuple[int, int]:
    height, width = (int(side) for side in size)
    if height < 1 or width < 1:
        raise ValueError(f"a bucket of {height} x {width} pixels")
    return height, width


def read_mixture(path: Path, name: str, entries: list[Any], depth: int = 0) -> Split:
    """The parts of a mixture that have this split, with their weights.

    Raises: DataError if none has it, or they do not go together.
    """
    if depth:
        raise DataError(f"{path}: a mixture of a mixture; list its data sets themselves")
    found: list[Split] = []
    weights: list[float] = []
    for entry in entries:
        weight = float(entry["weight"])
        if not 0.0 < weight < float("inf"):
            raise DataError(f"{path}: {entry['manifest']} has weight {weight:g}; weights must be positive")
        own = manifest_path(path.parent / str(entry["manifest"]))
        if name not in read_manifest(own).get("splits", {name: None}):
            continue
        found.append(read_split(own, name, depth + 1))
        weights.append(weight)
    if not found:
        raise DataError(f"{path}: none of its {len(entries)} data sets has a split {name!r}")
    first = found[0]
    for split in found[1:]:
        for what in ("class_names", "object_classes", "map_labels", "latents"):
            if getattr(split, what) != getattr(first, what):
                raise DataError(
                    f"{path}: {what.replace('_', ' ')} of {split.path} and {first.path} differ; numbers would mean two "
                    "things: prepare both with the same lists"
                )
        if len(split.parts) > 1 or len(first.parts) > 1:
            raise DataError(
                f"{path}: {split.path} or {first.path} has aspect-ratio buckets, which cannot be mixed; mix the "
                "manifests that they were made from"
            )
    total = sum(weights)
    parts = tuple(Part(split.parts[0].rows, None, weight / total) for split, weight in zip(found, weights, strict=True))
    return Split(path, name, parts, first.class_names, first.object_classes, first.map_labels, first.latents)
