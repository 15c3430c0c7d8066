"""How a shard gets into a folder: written under another name, on the disk, checked, and only then renamed.

So a process killed at any moment leaves nothing that would pass for whole. The other name says whose file it is (host
and process), and the file is locked as long as it is written: what nobody holds any more can be removed.
"""

from __future__ import annotations

import fcntl
import glob
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import webdataset as wds

from ldm_scale.data.indexing import index_tar, partial_name
from ldm_scale.data.sidecar import IndexedSample
from ldm_scale.errors import DataError

_PARTIAL = re.compile(r"\..+\.(?:tar|json|safetensors)\.partial-(?P<host>.+)-(?P<process>\d+)")
_ABANDONED_AFTER_S = 86400.0  # unchanged for so long, the file of another host is nobody's


@contextmanager
def new_shard(tar: Path, samples: Iterable[dict[str, Any]], pictures: bool = False) -> Iterator[list[IndexedSample]]:
    """What `index_tar` says of a tar of these samples (members and "__key__"), which lies there whole after the block.

    Leaves nothing if `samples` or the block raises.
    """
    partial = partial_name(tar)
    with _locked(partial) as stream:
        _check_alone(tar, partial)
        with wds.TarWriter(stream, encoder=False, mtime=0.0, user="", group="") as writer:
            for sample in samples:
                writer.write(sample)
        stream.flush()
        os.fsync(stream.fileno())
        yield index_tar(partial, pictures)
        os.replace(partial, tar)


def sync(path: Path) -> None:
    """Nothing; a file's content, or a folder's list of names, is on the disk and outlives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_abandoned(folder: Path, alone: bool = False) -> None:
    """Nothing; files that killed processes left half-written are gone, those of living ones stay.

    `alone`: no other process of this host writes here, so that a number which a new process has got keeps nothing.
    """
    for path in folder.glob(".*.partial-*"):
        match = _PARTIAL.fullmatch(path.name)
        ours = alone and match is not None and match["host"] == socket.gethostname()
        if ours or _is_abandoned(path, match):
            with suppress(OSError):
                path.unlink()


def _is_abandoned(path: Path, match: re.Match[str] | None) -> bool:
    """Whether no living process writes this partial file.

    Locks tell for certain on one host only, so the files of other hosts are left alone until they are old.
    """
    try:
        if match is None or _is_held(path):
            return False
        if match["host"] == socket.gethostname() and not _is_alive(int(match["process"])):
            return True
        return time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S
    except OSError:
        return False


def _is_held(path: Path) -> bool:
    """Whether a process of this host, or where the file system shares locks of any, has the file locked.

    Raises: OSError if it cannot be opened: gone by now, mostly.
    """
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _is_alive(process: int) -> bool:
    """Whether this host has such a process."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _check_alone(tar: Path, partial: Path) -> None:
    """Returns if nobody else writes the tar: two runs of a command must not do one shard at a time."""
    for other in tar.parent.glob(f".{glob.escape(tar.name)}.partial-*"):
        with suppress(FileNotFoundError):
            if other != partial and _is_held(other):
                raise DataError(f"{other}: another process is writing this shard; wait for it, or end it")


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file, empty and locked for as long as the block takes; gone if it fails."""
    with path.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            raise DataError(f"{path}: cannot be locked ({error.strerror}); choose another --out") from None
        assert os.path.samestat(os.fstat(stream.fileno()), path.stat()), f"{path}: renamed by another process"
        stream.truncate(0)
        try:
            yield stream
        except BaseException:
            path.unlink(missing_ok=True)
            raise
