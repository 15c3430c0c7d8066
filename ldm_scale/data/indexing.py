"""From a tar to its sidecar: one pass over the headers, and everything unsafe or damaged refused.

A tar from elsewhere is a stranger's input: links and devices, names that leave the folder, pickles, two members of one
name and a missing end are errors here, once, so that reading needs no second look.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import tarfile
import zlib
from pathlib import Path
from typing import Any

from ldm_scale.data.sidecar import BLOCK, IndexedSample, Member, Sidecar
from ldm_scale.errors import DataError

# Members that only unpickling can read: code from strangers, refused before anything opens them.
PICKLE_EXTENSIONS = frozenset({"pickle", "pkl", "pyd", "pth", "pt"})

_META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset skips these
_BASE_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's rule: the first dot of the file name


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


def index_tar(path: Path) -> list[IndexedSample]:
    """Every sample of a tar, in its order.

    Raises: DataError on anything but a complete, uncompressed tar of plain files with safe, unique names.
    """
    samples: list[IndexedSample] = []
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:", errorlevel=2) as archive:
            for member in archive:
                split = _member_name(path, member)
                if split is None:
                    continue
                name, extension = split
                if not samples or samples[-1].name != name:
                    if name in seen:
                        raise DataError(f"{path}: sample {name!r} occurs twice; give every sample its own name")
                    seen.add(name)
                    samples.append(IndexedSample(name, {}))
                members = samples[-1].members
                if extension in members:
                    raise DataError(f"{path}: member {member.name!r} occurs twice; keep one of them")
                content = archive.extractfile(member)
                assert content is not None, "a plain file, or refused above"
                members[extension] = Member(member.offset_data, member.size, zlib.crc32(content.read()))
            end = archive.offset
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path}: not a complete, uncompressed tar ({error}); write it again without compression"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    with path.open("rb") as stream:
        stream.seek(end)
        # tarfile ends silently at a damaged header; a tar that its writer finished ends in blocks of zeros.
        if stream.read(BLOCK) != bytes(BLOCK):
            raise DataError(f"{path}: damaged or cut short after byte {end}; write or copy this shard again")
    return samples


def _member_name(path: Path, member: tarfile.TarInfo) -> tuple[str, str] | None:
    """(sample name, lower-case extension) of a tar member, None where webdataset would skip it too."""
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        raise DataError(
            f"{path}: member {member.name!r} is a link, a device or a sparse file; only plain files are read"
        )
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise DataError(f"{path}: member {member.name!r} points outside the tar; names must be relative, without '..'")
    if not member.name.isprintable():
        # Includes the surrogates that stand for bytes which are not UTF-8.
        raise DataError(f"{path}: member {member.name!r} has a name that is not printable UTF-8; rename it")
    match = _BASE_AND_EXTENSION.match(member.name)
    if match is None or _META_MEMBER.match(member.name):
        return None
    extension = match[2].lower()
    if extension.rpartition(".")[2] in PICKLE_EXTENSIONS:
        raise DataError(
            f"{path}: member {member.name!r} is a pickle, which runs code when read; store json or npy instead"
        )
    return match[1], extension


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
