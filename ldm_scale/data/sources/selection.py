"""Manifests made from a manifest: the same tars, fewer or regrouped rows of them, in sidecars of their own.

The order of a training is a function of its manifest, so a choice that is made here costs nothing while training, and
nothing of it depends on ranks or workers. The tars are not touched; they are read only for what the index does not
tell. A sidecar is written when its shard is done, and kept if the same is asked for again.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_scale.data.indexing import write_json, write_whole
from ldm_scale.data.latents import LATENTS
from ldm_scale.data.manifest import manifest_path, read_manifest
from ldm_scale.data.picture_size import picture_size
from ldm_scale.data.policy import BadSample
from ldm_scale.data.scan import NO_IMAGE
from ldm_scale.data.shards import IMAGE_EXTENSIONS
from ldm_scale.data.sidecar import IndexedSample, Sidecar, open_sidecar
from ldm_scale.data.sources import Prepared
from ldm_scale.data.sources.tar_index import sidecar_name
from ldm_scale.data.storage import Storage
from ldm_scale.data.urls import local_path, public_name, shard_stem
from ldm_scale.data.window import READ_SOME, Window
from ldm_scale.errors import DataError

_CHOICE = "choice"  # entry of a sidecar: by what its rows were chosen


@dataclass(frozen=True)
class ShardPart:
    """A shard of a part of a split of the manifest that rows are chosen from."""

    base: Path  # of the manifest
    row: dict[str, Any]

    @property
    def sidecar(self) -> Sidecar:
        """Its index.

        Raises: DataError
        """
        return open_sidecar(self.base / self.row["index"], self.row["num_samples"], self.row["bytes"])

    @property
    def name(self) -> str:
        """Path or URL of the tar."""
        return _place(self.row["file"], self.base)

    @cached_property
    def window(self) -> Window:
        """The tar's bytes.

        Raises: DataError if it cannot be read or has another size than the manifest says.
        """
        storage, name = Storage(), self.name
        found = storage.size(name)
        if found != self.row["bytes"]:
            raise DataError(
                f"{public_name(self.row['file'])}: {found} bytes, but its manifest says {self.row['bytes']}; index it "
                "anew"
            )
        return Window(
            public_name(name), found, lambda start, stop: storage.read(name, start, stop), READ_SOME, checksum=False
        )


@dataclass(frozen=True)
class Source:
    """A manifest to choose from."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Source:
        """The manifest at a path.

        Raises: DataError if there is none, or one of a mixture or of latents.
        """
        path = manifest_path(path)
        content = read_manifest(path)
        if "splits" not in content:
            raise DataError(
                f"{path}: a mixture, from which nothing is chosen; filter its data sets themselves, then mix them "
                "(buckets cannot be mixed)"
            )
        rows = (row for entry in content["splits"].values() for part in _parts(entry) for row in part["shards"])
        if any(row.get("kind") == LATENTS for row in rows):
            raise DataError(f"{path}: holds latents; choose from the manifest of the images, then encode what is left")
        return cls(path, content)

    def splits(self, asked: list[str] | None) -> list[str]:
        """The splits that are asked for, all if none is named.

        Raises: DataError if one is missing.
        """
        known = list(self.content["splits"])
        for split in asked or ():
            if split not in known:
                raise DataError(
                    f"{self.path}: no split {split!r}; it has: {', '.join(sorted(known)) or 'none'} (--split)"
                )
        return [split for split in known if asked is None or split in asked]

    def parts(self, split: str) -> list[tuple[dict[str, Any], list[ShardPart]]]:
        """What is said of each part of a split, and its shards."""
        base = self.path.parent
        return [
            (
                {key: value for key, value in part.items() if key not in ("shards", "num_samples")},
                [ShardPart(base, row) for row in part["shards"]],
            )
            for part in _parts(self.content["splits"][split])
        ]

    def publish(self, out: Path, request: dict[str, Any], splits: dict[str, Any], **more: Any) -> Prepared:
        """The manifest at `out`: what this one says, of these splits.

        Raises: DataError if another one lies there.
        """
        kept = {key: value for key, value in self.content.items() if key not in ("request", "splits", "left_out")}
        manifest = {**kept, **more, "request": request, "splits": splits}
        existing = read_manifest(out) if out.exists() else None
        if existing == manifest:
            return Prepared(out, manifest, reused=True)
        write_json(out, manifest)
        return Prepared(out, manifest, reused=False)


def _parts(entry: dict[str, Any]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = entry.get("parts", [entry])
    return parts


def check_out(source: Source, out: Path, request: dict[str, Any]) -> None:
    """Returns if a manifest may be written at `out`: nothing lies there, or the answer to this request.

    Raises: DataError otherwise.
    """
    if out.is_dir():
        raise DataError(f"--out {out}: a folder; name the manifest, such as {out / 'manifest.json'}")
    if out.resolve() == source.path.resolve():
        raise DataError(f"--out {out}: the manifest to choose from; choose another place")
    if out.exists() and read_manifest(out).get("request") != request:
        raise DataError(f"{out}: made by another request, so it stays as it is; choose another --out or remove it")


def new_sidecar(out: Path, shard: ShardPart, *folders: str) -> Path:
    """Where the sidecar of chosen rows lies."""
    return out.resolve().parent.joinpath(f"{out.stem}.index", *folders, sidecar_name(shard.row["file"]))


def find_chosen(path: Path, choice: dict[str, Any]) -> Sidecar | None:
    """The sidecar of rows that were chosen by this very choice before; None if there is none."""
    try:
        found = open_sidecar(path)
    except DataError:
        return None
    return found if found.extra.get(_CHOICE) == json.loads(json.dumps(choice)) else None


def write_chosen(path: Path, sidecar: Sidecar, rows: NDArray[np.int64], choice: dict[str, Any], **more: Any) -> Sidecar:
    """The sidecar of some rows of another, with more entries; it lies at `path`."""
    chosen = replace(sidecar.select(rows), extra={**sidecar.extra, **more, _CHOICE: choice})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, chosen.to_bytes())
    return chosen


def chosen_row(shard: ShardPart, path: Path, chosen: Sidecar, out: Path) -> dict[str, Any]:
    """The shard as the new manifest lists it."""
    base = out.resolve().parent
    place = shard.row["file"]
    if local_path(place) is not None:
        place = Path(os.path.relpath((shard.base / place).resolve(), base)).as_posix()
    kept = {key: value for key, value in shard.row.items() if key != "bad"}
    return {
        **kept,
        "file": place,
        "num_samples": len(chosen),
        "keys": chosen.keys_digest,
        "index": Path(os.path.relpath(path, base)).as_posix(),
    }


def size_of(sample: IndexedSample, shard: ShardPart) -> tuple[int, int]:
    """Width and height of a sample's picture: from the index, else from the picture's first bytes.

    Raises: BadSample if it has none, or one whose size cannot be read; DataError if the tar cannot be read.
    """
    if sample.picture != (0, 0):
        return sample.picture
    member = next((sample.members[kind] for kind in IMAGE_EXTENSIONS if kind in sample.members), None)
    if member is None:
        raise BadSample(NO_IMAGE)
    return picture_size(shard.window, member.offset, member.offset + member.size)


def identity(shard: ShardPart) -> dict[str, Any]:
    """What tells a shard's rows from others, for the choice that its new sidecar names."""
    return {"shard": shard_stem(shard.row["file"]), **{key: shard.row.get(key) for key in ("keys", "bytes", "sha256")}}


def _place(file: str, base: Path) -> str:
    """Path or URL of a shard of a manifest in the folder `base`."""
    return file if local_path(file) is None else str(base / file)
