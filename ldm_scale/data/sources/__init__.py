"""What all sources share: a stable held-out split, and data sets that are found again by their request.

A source says what its items are and how one becomes a sample; writing.py makes shards of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ldm_scale.data.manifest import MANIFEST_NAME, STATE_NAME, read_manifest
from ldm_scale.data.permutation import uniforms
from ldm_scale.data.shards import open_manifest
from ldm_scale.data.sources.unfinished import read_begun, remove_state
from ldm_scale.data.sources.workers import map_in_processes
from ldm_scale.errors import DataError

__all__ = [
    "HELDOUT",
    "MANIFEST_NAME",
    "TRAIN",
    "Layout",
    "LeftOut",
    "Prepared",
    "Sample",
    "Source",
    "file_digest",
    "find_prepared",
    "is_heldout",
    "license_request",
    "map_in_processes",
]

TRAIN, HELDOUT = "train", "heldout"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """One sample to be written."""

    name: str
    members: dict[str, bytes]  # by extension


@dataclass(frozen=True)
class LeftOut:
    """An item that cannot be used."""

    file: str
    reason: str  # worded the same for every item with that fault


@dataclass(frozen=True)
class Source(Generic[Item]):
    """What the samples of a data set are made of. Items are read once, in order, as they are needed."""

    name: str  # for messages
    items: Iterable[Item]
    num_items: int
    make: Callable[[Item], Sample | LeftOut]  # called in a worker process
    family: Callable[[Item], str]  # decides the split: items of one family are never on both sides


@dataclass(frozen=True)
class Layout:
    """How samples are spread over splits and shards, and by how many processes they are made."""

    samples_per_shard: int
    heldout_percent: float = 0.0
    split: str = TRAIN  # of what is not held out
    num_workers: int | None = None  # None: one per processor

    @property
    def splits(self) -> list[str]:
        """The splits in their order."""
        return [self.split, HELDOUT] if self.heldout_percent > 0 else [self.split]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote or found."""

    manifest_path: Path
    manifest: dict[str, Any]
    reused: bool


def is_heldout(family: str, percent: float) -> bool:
    """Whether a family belongs to the held-out split; the same on every machine and for any other set of families."""
    return uniforms(1, "heldout", family)[0] * 100.0 < percent


def find_prepared(out: Path, request: dict[str, Any]) -> Prepared | None:
    """The complete data set that lies at `out` and answers this request; None if nothing lies there, or a part of it.

    Raises: DataError if something else lies there, or the data set is damaged.
    """
    path = out / MANIFEST_NAME
    if path.is_file():
        manifest = read_manifest(path)
        _check_request(out, "a data set prepared", manifest.get("request"), request)
        for split in manifest["splits"]:
            open_manifest(path, split)
        remove_state(out)  # left by a process that was killed just before its end
        return Prepared(path, manifest, reused=True)
    begun = read_begun(out)
    if begun is not None:
        _check_request(out, "an unfinished data set begun", begun["request"], request)
    elif out.exists() and (not out.is_dir() or any(entry.name != STATE_NAME for entry in out.iterdir())):
        raise DataError(
            f"{out}: exists and is not a prepared data set (it has no {MANIFEST_NAME}); choose another --out"
        )
    return None


def _check_request(out: Path, what: str, found: Any, request: dict[str, Any]) -> None:
    """Nothing; raises DataError unless both requests are the same."""
    if found != request:
        raise DataError(
            f"{out}: holds {what} by another request: {_show(found)}; asked for now: {_show(request)}; "
            "choose another --out or remove the folder"
        )


def _show(request: Any) -> str:
    """A request in one line."""
    return ", ".join(f"{key}={value}" for key, value in request.items()) if isinstance(request, dict) else repr(request)


def file_digest(path: Path) -> str:
    """Name and digest of a file's content. Raises: DataError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return f"{path.name}@{hashlib.file_digest(stream, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def license_request(license_text: str | None) -> dict[str, str]:
    """The part of a request that is a licence; nothing where none is given, as in requests before there were any."""
    return {} if license_text is None else {"license": license_text}
