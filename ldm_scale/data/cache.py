"""A folder that keeps aligned pieces of remote objects, bounded, for any number of processes at once.

A piece is a file of its own, named by a digest of the object's name and version and of the piece's number: another
version has other files, so nothing needs to be invalidated. It appears by rename, whole, and ends in a CRC-32 of its
name and bytes that every read checks. CRC-32 takes a fifth of the time of BLAKE2b or SHA-256, and what it has to find
is a bad disk or a torn write, not an adversary: the folder is its owner's alone.

Readers take no lock. Writers take `flock` on one file for the moments in which they count bytes and evict, never wait
for it longer than a moment, and leave a piece out instead; the kernel drops the lock of a process that dies. A process
reserves a piece's bytes before it writes it, so that the folder is never larger than `max_bytes`; where a killed one
has reserved too much, the next count of the files puts it right. While nothing can be kept, what is not here comes
from the server as it was asked for, without the rest of its pieces.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from ldm_scale.data.remote import Version
from ldm_scale.data.urls import public_name
from ldm_scale.errors import ConfigError
from ldm_scale.telemetry.log import get_logger, say_once

_FORMAT = "pieces-v1"
_TRAILER = struct.Struct("<8sIQ")  # magic, CRC-32, number of bytes before it
_MAGIC = b"ldmpiece"
_PARTIAL = ".partial-"
_STALE_S = 600.0  # a piece is written in milliseconds; a partial file of that age is a killed process's
_PAUSE_S = 60.0  # without writing, after the folder has refused it
_LOCK_TRIES = 20  # of a hundredth of a second
_LOW_WATER = 0.9  # share of max_bytes that eviction leaves, so that it is not needed for every piece
# Query parameters that carry a signature and not the object's name: another signature is the same object.
_SIGNING = re.compile(
    r"(?i)x-(?:amz|goog)-.*|signature|expires|awsaccesskeyid|googleaccessid|key-pair-id|policy|token"
    r"|sig|s[epvrt]|spr|sk(?:oid|tid|[tesv])"
)

Fetch = Callable[[int, int], Iterator[bytes]]  # bytes of an object from one place to before another


def identity(url: str) -> str:
    """The URL without what changes while the object stays the same: user, fragment, signature."""
    if not url.lower().startswith(("http://", "https://")):
        return public_name(url)
    query = [
        (name, value)
        for name, value in parse_qsl(urlsplit(url).query, keep_blank_values=True)
        if not _SIGNING.fullmatch(name)
    ]
    return urlunsplit(urlsplit(public_name(url))._replace(query=urlencode(query)))


class RangeCache:
    """At most `max_bytes` of pieces of remote objects in `folder`; the least recently used ones go first.

    Raises: ConfigError if it could not hold even sixteen pieces.
    """

    def __init__(self, folder: Path, max_bytes: int, piece_bytes: int = 1 << 18) -> None:
        if piece_bytes < 1 or max_bytes < 16 * (piece_bytes + _TRAILER.size):
            raise ConfigError(
                f"{folder}: a cache of {max_bytes} bytes in pieces of {piece_bytes} is too small; give it room for 16 "
                f"pieces ({16 * (piece_bytes + _TRAILER.size)} bytes) or leave it out"
            )
        self._folder = folder / _FORMAT
        self._max_bytes = max_bytes
        self._piece_bytes = piece_bytes
        self._paused_until = 0.0

    def holds(self, url: str, version: Version) -> bool:
        """Whether an object can be kept: without a tag or a date nobody knows a new version from the old one."""
        if version.etag is not None or version.modified is not None:
            return True
        say_once("cache version", f"{public_name(url)}: not cached, its server gives neither ETag nor Last-Modified")
        return False

    def stream(self, url: str, version: Version, start: int, stop: int, fetch: Fetch) -> Iterator[bytes]:
        """Bytes `start` to before `stop` of an object of known size; pieces that are not here come from `fetch`."""
        assert version.size is not None
        number = start // self._piece_bytes
        while start < stop:
            piece = self._get(self._path(url, version, number), self._length(version.size, number))
            if piece is None and self._is_paused():
                number = self._next_kept(url, version, number + 1, stop)
                until = min(stop, number * self._piece_bytes)
                yield from fetch(start, until)
                start = until
                continue
            pieces = self._missing(url, version, number, stop, fetch) if piece is None else iter([piece])
            for piece in pieces:
                begin = number * self._piece_bytes
                yield piece[start - begin : stop - begin]
                number += 1
                start = number * self._piece_bytes

    def _missing(self, url: str, version: Version, number: int, stop: int, fetch: Fetch) -> Iterator[bytes]:
        """The piece `number` and those after it up to `stop` that are not here either, from one request."""
        assert version.size is not None
        last = self._next_kept(url, version, number + 1, stop)
        buffer = bytearray()
        for chunk in fetch(number * self._piece_bytes, min(last * self._piece_bytes, version.size)):
            buffer += chunk
            while number < last and len(buffer) >= (length := self._length(version.size, number)):
                piece = bytes(buffer[:length])
                del buffer[:length]
                self._put(self._path(url, version, number), piece)
                number += 1
                yield piece

    def _next_kept(self, url: str, version: Version, number: int, stop: int) -> int:
        """The first piece from `number` on that is here or begins at `stop` or beyond."""
        while number * self._piece_bytes < stop and not self._path(url, version, number).exists():
            number += 1
        return number

    def drop(self, url: str, version: Version, start: int, stop: int) -> None:
        """Nothing; the pieces with these bytes are gone."""
        for number in range(start // self._piece_bytes, -(-stop // self._piece_bytes)):
            with suppress(OSError):
                self._path(url, version, number).unlink()

    def _length(self, size: int, number: int) -> int:
        return min(self._piece_bytes, size - number * self._piece_bytes)

    def _path(self, url: str, version: Version, number: int) -> Path:
        parts = (identity(url), version.size, version.etag, version.modified if version.etag is None else None)
        name = blake2b(repr((*parts, self._piece_bytes, number)).encode(), digest_size=20).hexdigest()
        return self._folder / name[:2] / name[2:]

    def _get(self, path: Path, length: int) -> bytes | None:
        """A piece's bytes; None where they are not here, or not what was written."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        piece = content[: -_TRAILER.size]
        if len(piece) != length or content[len(piece) :] != _trailer(path, piece):
            say_once("cache damaged", f"{path}: a cached piece is damaged and comes from its server again")
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)  # least recently used goes by this: many disks are mounted without access times
        return piece

    def _put(self, path: Path, piece: bytes) -> None:
        """Nothing; the piece is here from now on, if the folder takes it."""
        if self._is_paused():
            return
        partial = path.with_name(f"{_PARTIAL}{uuid.uuid4().hex}")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.mkdir(exist_ok=True)
            if path.exists() or not self._reserve(partial, len(piece) + _TRAILER.size):
                return
            with partial.open("r+b") as stream:
                stream.write(piece)
                stream.write(_trailer(path, piece))
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            self._pause(f"cannot be written ({error.strerror})")

    def _is_paused(self) -> bool:
        return time.monotonic() < self._paused_until

    def _pause(self, reason: str) -> None:
        """Nothing; no piece is written for a while."""
        self._paused_until = time.monotonic() + _PAUSE_S
        _warn_once(f"{self._folder.parent}: {reason}; what is read is not kept there")

    def _reserve(self, partial: Path, num_bytes: int) -> bool:
        """Whether there is room for so many bytes, made by eviction if need be.

        `partial` stands there with that length then, so that whoever counts from now on counts it.
        """
        with self._locked() as descriptor:
            if descriptor is None:
                return False
            used = _read_number(descriptor)
            if used is None or used + num_bytes > self._max_bytes:
                used = self._evict(num_bytes)
            is_room = used + num_bytes <= self._max_bytes
            if is_room:
                with partial.open("xb") as stream:
                    stream.truncate(num_bytes)
            else:
                self._pause(f"no room for {num_bytes} bytes within its {self._max_bytes}")
            os.pwrite(descriptor, b"%020d" % (used + num_bytes if is_room else used), 0)
            return is_room

    @contextmanager
    def _locked(self) -> Iterator[int | None]:
        """The descriptor of the file that counts, held by no other process or thread; None where others hold it."""
        descriptor = os.open(self._folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        is_held = False
        try:
            for _ in range(_LOCK_TRIES):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.01)
                else:
                    is_held = True
                    break
            yield descriptor if is_held else None
        finally:
            if is_held:
                # Closing alone would not do: a process forked meanwhile has the same open file.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _evict(self, num_bytes: int) -> int:
        """Bytes used, counted anew, after what is oldest went to make room for `num_bytes`; stale partials go too."""
        files, used, stale = [], 0, time.time() - _STALE_S
        for path in self._folder.glob("??/*"):
            is_partial = path.name.startswith(_PARTIAL)
            try:
                found = path.stat()
                if is_partial and found.st_mtime < stale:
                    path.unlink()
                    continue
            except OSError:
                # A partial that has gone may be a piece since, under a name that was passed already.
                used += self._piece_bytes + _TRAILER.size if is_partial else 0
                continue
            used += found.st_size
            if not is_partial:
                files.append((found.st_mtime_ns, found.st_size, path))
        if used + num_bytes <= self._max_bytes:
            return used
        for _, size, path in sorted(files):
            if used + num_bytes <= self._max_bytes * _LOW_WATER:
                break
            with suppress(OSError):
                path.unlink()
                used -= size
        return used


def _trailer(path: Path, piece: bytes) -> bytes:
    """What a piece's file ends in; with its name, so that a file under another piece's name is damaged too."""
    return _TRAILER.pack(_MAGIC, zlib.crc32(piece, zlib.crc32(path.name.encode())), len(piece))


def _read_number(descriptor: int) -> int | None:
    """The bytes used as the file that counts has them; None where it is new or damaged."""
    text = os.pread(descriptor, 32, 0)
    return int(text) if len(text) == 20 and text.isdigit() else None


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        get_logger().warning(message)
