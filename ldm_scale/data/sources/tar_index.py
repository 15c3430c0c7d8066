"""The index of one tar, local or remote: its sidecar, made once and kept while the tar stays what it was."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_scale.data.indexing import write_whole
from ldm_scale.data.scan import Scan, scan_tar
from ldm_scale.data.sidecar import SUFFIX, Sidecar, open_sidecar
from ldm_scale.data.sources.class_lists import Classes
from ldm_scale.data.storage import Storage
from ldm_scale.data.urls import local_path, public_name, shard_stem
from ldm_scale.data.window import READ_ALL, READ_SOME, Window, open_file
from ldm_scale.errors import DataError

_SHARD, _CLASSES = "shard", "classes"  # entries of a sidecar: what the tar was, and the classes in it


@dataclass(frozen=True)
class Job:
    """A tar to be indexed."""

    name: str  # a path or a URL
    sidecar: Path
    checksums: bool | None  # None: where the tar is a local file


@dataclass(frozen=True)
class Indexed:
    """What a manifest says of a tar, besides where it lies."""

    num_samples: int
    keys: str
    num_bytes: int
    num_bad: int
    sha256: str | None
    classes: tuple[str, ...]
    reused: bool  # nothing was read, because the sidecar is of this tar


def sidecar_name(name: str) -> str:
    """File name of a shard's sidecar."""
    return f"{shard_stem(name)}{SUFFIX}"


def index_one(job: Job) -> Indexed:
    """The tar's index; its sidecar lies there.

    Raises: DataError if the tar cannot be read; never for its content, but if it has classes of two kinds.
    """
    path = local_path(job.name)
    checksums = path is not None if job.checksums is None else job.checksums
    storage = Storage()
    state = _state(job.name, storage)
    with suppress(DataError):
        found = open_sidecar(job.sidecar)
        shard = found.extra.get(_SHARD, {})
        if {key: value for key, value in shard.items() if key != "sha256"} == state and (
            shard.get("sha256") or not checksums
        ):
            return _describe(found, reused=True)
    classes = Classes()

    def visit(sample: str, texts: Mapping[str, bytes]) -> None:
        classes.visit(public_name(job.name), sample, texts)

    if path is None:

        def fetch(start: int, stop: int) -> bytes:
            return storage.read(job.name, start, stop)

        ahead = READ_ALL if checksums else READ_SOME
        scan = scan_tar(Window(public_name(job.name), state["bytes"], fetch, ahead, checksums), visit=visit)
    else:
        with open_file(Path(path), READ_ALL if checksums else READ_SOME, checksums) as window:
            scan = scan_tar(window, visit=visit)
    if _state(job.name, storage) != state:
        raise DataError(f"{public_name(job.name)}: changed while it was read; index it when nothing writes to it")
    sidecar = _sidecar(scan, state, classes.names())
    job.sidecar.parent.mkdir(parents=True, exist_ok=True)
    write_whole(job.sidecar, sidecar.to_bytes())
    return _describe(sidecar, reused=False)


def _sidecar(scan: Scan, state: dict[str, Any], classes: list[str]) -> Sidecar:
    """The sidecar of a tar that was in this state."""
    shard = state if scan.sha256 is None else {**state, "sha256": scan.sha256}
    return Sidecar.of(scan.samples, scan.bad, {_SHARD: shard, _CLASSES: classes})


def _describe(sidecar: Sidecar, reused: bool) -> Indexed:
    shard = sidecar.extra[_SHARD]
    return Indexed(
        len(sidecar),
        sidecar.keys_digest,
        shard["bytes"],
        len(sidecar.bad),
        shard.get("sha256"),
        tuple(sidecar.extra[_CLASSES]),
        reused,
    )


def _state(name: str, storage: Storage) -> dict[str, Any]:
    """What tells this content of a tar from another."""
    path = local_path(name)
    if path is None:
        version = storage.version(name)
        marks = {"etag": version.etag, "modified": version.modified}
        return {"bytes": storage.size(name), **{key: value for key, value in marks.items() if value is not None}}
    try:
        found = Path(path).stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
