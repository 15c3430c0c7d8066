"""Existing webdataset tars (img2dataset's or any others) as they are: indexed, checksummed, listed; never rewritten.

Images, captions and classes stay what they were; what cannot be used is met in training and handled there. Only the
classes are read here, because the manifest lists them. Sidecars lie beside the manifest, since shards may be on a
file system that is read-only or shared.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm_scale.data.indexing import index_shard, index_tar, write_json
from ldm_scale.data.manifest import FORMAT, VERSION, read_manifest
from ldm_scale.data.metadata import read_class, read_metadata
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import IMAGE_EXTENSIONS, RawSample
from ldm_scale.data.sidecar import SUFFIX, IndexedSample
from ldm_scale.data.sources import Prepared
from ldm_scale.errors import DataError

_MAX_CLASSES = 1_000_000  # a larger number is an identifier, not a class


def index_tars(
    shards: list[Path],
    manifest_path: Path,
    split: str,
    object_classes: Sequence[str] = (),
    map_labels: Sequence[str] = (),
) -> Prepared:
    """The manifest with this split of these shards; a split of other shards in an existing manifest stays.

    `object_classes` and `map_labels` are the names that boxes and label maps in the shards refer to.

    Raises: DataError if a tar is damaged, unsafe or without images, if two shards have one name, or if the manifest
    already has this split from other shards.
    """
    if not shards:
        raise DataError("no shards given; name the tars, such as data/*.tar")
    base = manifest_path.resolve().parent
    shards = sorted(shards)
    request = {"shards": [_relative(shard, base) for shard in shards]}
    existing = read_manifest(manifest_path) if manifest_path.exists() else None
    if existing and existing.get("request", {}).get("source") != "index":
        raise DataError(
            f"{manifest_path}: not made by `ldm-scale prepare index`, so it stays as it is; choose another --out"
        )
    lists = _lists(existing, manifest_path, object_classes=object_classes, map_labels=map_labels)
    known = existing["request"]["splits"] if existing else {}
    others = dict(existing["splits"]) if existing else {}
    if existing and split in others:
        return _reuse(existing, manifest_path, split, request, shards)
    taken = {Path(shard["file"]).stem for entry in others.values() for shard in entry["shards"]}
    for shard in shards:
        if shard.stem in taken:
            raise DataError(f"{shard}: a second shard with the name {shard.stem}; keys would repeat, so rename one")
        taken.add(shard.stem)

    base.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    classes = _Classes(existing["classes"] if existing else [])
    for shard in tqdm(shards, desc="index", unit="shards", mininterval=1.0, file=sys.stderr):
        samples = index_tar(shard)
        if not any(extension in sample.members for sample in samples for extension in IMAGE_EXTENSIONS):
            raise DataError(f"{shard}: no image in it ({', '.join(IMAGE_EXTENSIONS)}); leave this tar out")
        classes.collect(shard, samples)
        folder = base if shard.resolve().parent == base else base / f"{manifest_path.stem}.index"
        entries.append(index_shard(shard.resolve(), folder / f"{shard.stem}{SUFFIX}", base, samples))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "name": existing["name"] if existing else base.name,
        "resolution": None,
        "classes": classes.names(),
        **lists,
        "license": None,
        "attribution": None,
        "request": {"source": "index", "splits": {**known, split: request}},
        "splits": {**others, split: {"num_samples": sum(entry["num_samples"] for entry in entries), "shards": entries}},
    }
    write_json(manifest_path, manifest)
    return Prepared(manifest_path, manifest, reused=False)


def _lists(existing: dict[str, Any] | None, manifest_path: Path, **given: Sequence[str]) -> dict[str, list[str]]:
    """The lists of names for the manifest.

    Raises: DataError if it exists and has others.
    """
    if existing is None:
        return {key: list(names) for key, names in given.items() if names}
    for key, names in given.items():
        if names and list(names) != existing.get(key):
            raise DataError(
                f"{manifest_path}: its {key} are not those of --{key.replace('_', '-')}; give the same list, or remove "
                "the manifest and index all its splits anew"
            )
    return {key: existing[key] for key in given if key in existing}


def _relative(shard: Path, base: Path) -> str:
    """A shard's path relative to the manifest's folder."""
    return Path(os.path.relpath(shard.resolve(), base)).as_posix()


def _reuse(
    existing: dict[str, Any], manifest_path: Path, split: str, request: dict[str, Any], shards: list[Path]
) -> Prepared:
    """The existing manifest if it has this very split of these very tars, by name and size."""
    known = existing["request"]["splits"].get(split)
    sizes = {shard["file"]: shard["bytes"] for shard in existing["splits"][split]["shards"]}
    base = manifest_path.resolve().parent
    if known == request and all(
        shard.is_file() and sizes.get(_relative(shard, base)) == shard.stat().st_size for shard in shards
    ):
        return Prepared(manifest_path, existing, reused=True)
    raise DataError(
        f"{manifest_path}: already has a split {split!r}, of {len(sizes)} shards {', '.join(list(sizes)[:3])}..., and "
        f"now {len(shards)} shards {', '.join(request['shards'][:3])}... are given or have changed; choose another "
        "--split or --out, or remove the manifest"
    )


class _Classes:
    """The classes that occur: numbers, or names in alphabetical order, never both."""

    def __init__(self, known: list[str]) -> None:
        numeric = bool(known) and known == [str(number) for number in range(len(known))]
        self._names = set() if numeric else set(known)
        self._count = len(known) if numeric else 0

    def collect(self, shard: Path, samples: list[IndexedSample]) -> None:
        """Nothing; takes in the classes of a tar.

        Raises: DataError if some are numbers and some are names.
        """
        with shard.open("rb") as stream:
            for sample in samples:
                name, raw_members = sample.name, sample.members
                raw: RawSample = {}
                for extension in ("cls", "json"):
                    if extension in raw_members:
                        stream.seek(raw_members[extension].offset)
                        raw[extension] = stream.read(raw_members[extension].size)
                try:
                    found = read_class(raw, read_metadata(raw) if "cls" not in raw else {})
                except BadSample:
                    continue  # counted and named where it is read for training
                if isinstance(found, str):
                    self._names.add(found)
                elif found is not None:
                    self._count = max(self._count, found + 1)
                if self._count > _MAX_CLASSES:
                    raise DataError(f"{shard}: sample {name} has class {found}; class numbers are below {_MAX_CLASSES}")
                if self._names and self._count:
                    raise DataError(
                        f"{shard}: sample {name} has class {found!r}, others have a {self._other(found)}; use one kind"
                    )

    def _other(self, found: int | str | None) -> str:
        """The kind of class that `found` is not."""
        return "number" if isinstance(found, str) else "name"

    def names(self) -> list[str]:
        """The manifest's list of classes."""
        return sorted(self._names) if self._names else [str(number) for number in range(self._count)]
