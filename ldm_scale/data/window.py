"""Bytes of a shard from front to back with little memory, whether it is a file or answers ranged requests.

A pass over a tar reads headers, skips what it does not need, and now and then steps back. One buffer serves that:
what lies in it costs nothing, anything else is fetched together with some bytes behind it, because the next header is
most often there. Where a checksum is asked for, every byte is fetched once in order and steps back are read again.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm_scale.errors import DataError

READ_ALL = 1 << 20  # bytes at a time where all are read
READ_SOME = 1 << 16  # where most should be skipped: so many that small members do not cost a request each
Fetch = Callable[[int, int], bytes]  # (start, stop) -> these bytes


class Window:
    """A shard's bytes through one buffer. `ahead`: bytes that one fetch gets at least, where there are as many."""

    def __init__(self, name: str, num_bytes: int, fetch: Fetch, ahead: int, checksum: bool) -> None:
        self.name = name  # for messages
        self.num_bytes = num_bytes
        self._fetch = fetch
        self._ahead = ahead
        self._start, self._buffer = 0, b""
        self._sha256 = hashlib.sha256() if checksum else None
        self._hashed = 0  # bytes from the front that the checksum covers

    @property
    def reads_all(self) -> bool:
        """Whether every byte is read anyway, so that checksums of parts cost no reading."""
        return self._sha256 is not None

    def read(self, start: int, stop: int) -> bytes:
        """These bytes, fewer at the end of the shard. They are in memory at once, so the caller bounds them."""
        stop = min(stop, self.num_bytes)
        if stop <= start:
            return b""
        if start < self._start or stop > self._start + len(self._buffer):
            self._fill(start, stop)
        return self._buffer[start - self._start : stop - self._start]

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """These bytes in parts of at most a buffer's length."""
        while start < stop:
            held = self._start + len(self._buffer) - start
            if start < self._start or held <= 0:
                held = self._ahead
            piece = self.read(start, min(stop, start + held))
            if not piece:
                return
            yield piece
            start += len(piece)

    def crc32(self, start: int, stop: int) -> int:
        """CRC-32 of these bytes."""
        checksum = 0
        for piece in self.pieces(start, stop):
            checksum = zlib.crc32(piece, checksum)
        return checksum

    def first_not_zero(self, start: int) -> int:
        """Offset of the first byte from `start` that is not 0; the shard's size if there is none."""
        for piece in self.pieces(start, self.num_bytes):
            rest = len(piece.lstrip(b"\0"))
            if rest:
                return start + len(piece) - rest
            start += len(piece)
        return self.num_bytes

    def sha256(self) -> str | None:
        """Checksum of the whole shard; None if none was asked for."""
        if self._sha256 is None:
            return None
        self._hash_until(self.num_bytes)
        return self._sha256.hexdigest()

    def _fill(self, start: int, stop: int) -> None:
        self._hash_until(start)
        self._start, self._buffer = start, self._get(start, max(stop, start + self._ahead))

    def _hash_until(self, end: int) -> None:
        """Nothing; the checksum covers what was skipped."""
        while self._sha256 is not None and self._hashed < end:
            self._get(self._hashed, min(end, self._hashed + self._ahead))

    def _get(self, start: int, stop: int) -> bytes:
        """Bytes from the shard itself, and into the checksum what continues it.

        Raises: DataError if there are fewer.
        """
        stop = min(stop, self.num_bytes)
        content = self._fetch(start, stop)
        if len(content) != stop - start:
            raise DataError(f"{self.name}: changed while it was read; index it again when nothing writes to it")
        if self._sha256 is not None and start <= self._hashed < stop:
            self._sha256.update(memoryview(content)[self._hashed - start :])
            self._hashed = stop
        return content


@contextmanager
def open_file(path: Path, ahead: int = READ_ALL, checksum: bool = True) -> Iterator[Window]:
    """A file as a window.

    Raises: DataError if it cannot be read.
    """
    try:
        # Not to wait for a writer, where the name is a pipe's.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None

    def fetch(start: int, stop: int) -> bytes:
        content = b""
        while len(content) < stop - start:
            more = os.pread(descriptor, stop - start - len(content), start + len(content))
            if not more:
                break
            content = content + more if content else more
        return content

    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}: not a file; shards are plain files")
        yield Window(str(path), found.st_size, fetch, ahead, checksum)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)
