"""Files written whole or not at all, and the index of tars that were just written and must be sound."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from ldm_scale.data.scan import scan_tar
from ldm_scale.data.sidecar import IndexedSample, Sidecar
from ldm_scale.data.window import open_file
from ldm_scale.errors import DataError

_MAX_NAMED = 5


def partial_name(path: Path) -> Path:
    """Where this process writes a file before it renames it to `path`; says whose it is: host and process."""
    return path.with_name(f".{path.name}.partial-{socket.gethostname()}-{os.getpid()}")


def write_whole(path: Path, content: bytes) -> None:
    """Nothing; the file appears complete or not at all."""
    partial = partial_name(path)
    partial.write_bytes(content)
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Nothing; the file appears complete or not at all, with the same bytes for the same content."""
    write_whole(path, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8"))


def index_tar(path: Path, pictures: bool = False) -> list[IndexedSample]:
    """Every sample of a tar, in its order; with the sizes of their `pictures`, which all must have.

    Raises: DataError on anything but a complete, uncompressed tar of plain files with safe, unique names.
    """
    with open_file(path) as window:
        found = scan_tar(window, pictures)
    if found.bad:
        named = "; ".join(f"{key or 'all of it'}: {reason}" for key, reason in found.bad[:_MAX_NAMED])
        raise DataError(f"{path}: {len(found.bad)} parts of this tar cannot be used ({named}); write it again")
    return found.samples


def index_shard(shard: Path, sidecar: Path, base: Path, samples: list[IndexedSample], **extra: Any) -> dict[str, Any]:
    """The manifest's entry for a shard whose sidecar this writes; paths in it are relative to `base`.

    `extra` are more entries of the sidecar.
    """
    content = Sidecar.of(samples, extra=extra)
    sidecar.parent.mkdir(parents=True, exist_ok=True)
    write_whole(sidecar, content.to_bytes())
    with shard.open("rb") as stream:
        checksum = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "file": Path(os.path.relpath(shard, base)).as_posix(),
        "num_samples": len(samples),
        "keys": content.keys_digest,
        "bytes": shard.stat().st_size,
        "sha256": checksum,
        "index": Path(os.path.relpath(sidecar, base)).as_posix(),
    }
