"""Headers of a tar, one block at a time, of files that nobody vouches for.

The standard library parses the block; what precedes a header to extend it (GNU long names, pax records) is read here,
because `tarfile` reads such a block whole, whatever its size, and stops at the first fault.
"""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass, field

from ldm_scale.data.sidecar import BLOCK
from ldm_scale.data.window import Window

MAX_EXTENSION = 1 << 16  # bytes of one extension; a longer one is skipped, and its member cannot be used

_MAGIC, _MAGIC_AT = b"ustar", 257
_CHECKSUM = slice(148, 156)
_SEARCH = 1 << 12, 1 << 20  # bytes that are looked through at a time: at first, and at most
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=\n]+)=")


def parse_header(block: bytes) -> tarfile.TarInfo | None:
    """The header that this block is; None if its checksum or a number in it is wrong."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None  # as well for a block that is too short
    return header if header.size >= 0 else None


def padded(size: int) -> int:
    """Bytes that a member of this size takes in the tar."""
    return -(-size // BLOCK) * BLOCK


def payload_size(header: tarfile.TarInfo, size: int) -> int:
    """Bytes between this header and the next; links, devices and folders have none, whatever size they state."""
    has_payload = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
    return padded(size) if has_payload or header.type in _EXTENSIONS else 0


def find_header(window: Window, start: int) -> int | None:
    """Offset of the first block from `start`, aligned or not, that is a header with a checksum; None if none follows.

    Only headers with the magic of 1988 and later count, so that nothing in a picture passes for one.
    """
    length, longest = _SEARCH
    while start + BLOCK <= window.num_bytes:
        chunk = window.read(start, start + length)
        at = chunk.find(_MAGIC, _MAGIC_AT)
        while at >= 0:
            block = window.read(start + at - _MAGIC_AT, start + at - _MAGIC_AT + BLOCK)
            if _may_be_header(block) and parse_header(block) is not None:
                return start + at - _MAGIC_AT
            at = chunk.find(_MAGIC, at + 1)
        start += len(chunk) - _MAGIC_AT - len(_MAGIC) + 1
        length = min(2 * length, longest)
    return None


def _may_be_header(block: bytes) -> bool:
    """Whether there is a name and the right checksum; far cheaper than parsing, for bytes that are mostly no header.

    Without a name, the checksum of a header that lost some zeros of it would be right a few bytes too early.
    """
    if len(block) < BLOCK or not block[0]:
        return False
    stated = block[_CHECKSUM].strip(b" \0")
    return stated.lstrip(b"0") == b"%o" % (sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" "))


@dataclass
class Extensions:
    """What extension headers say of the members behind them."""

    name: str | None = None  # of the next member
    too_large: bool = False
    _records: dict[bytes, bytes] = field(default_factory=dict)  # of the next member
    _global: dict[bytes, bytes] = field(default_factory=dict)  # of all members from here on

    def take(self, window: Window, header: tarfile.TarInfo, start: int) -> bool:
        """Whether this header is an extension; its payload, which begins at `start`, is taken in."""
        if header.type not in _EXTENSIONS:
            return False
        if header.type == tarfile.GNUTYPE_LONGLINK:
            return True
        if header.size > MAX_EXTENSION:
            self.too_large = True
            return True
        payload = window.read(start, start + header.size)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            self.name = payload.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            return True
        target = self._global if header.type == tarfile.XGLTYPE else self._records
        target |= {key: value for key, value in _pax_records(payload) if _matters(key)}
        return True

    def member(self, header: tarfile.TarInfo) -> tuple[str, int | None, bool]:
        """Name and size of the member whose header this is, and whether it is sparse; None for no number as size."""
        records = {**self._global, **self._records}
        name = records[b"path"].decode("utf-8", "surrogateescape") if b"path" in records else self.name
        size = records.get(b"size", b"%d" % header.size)
        sparse = header.issparse() or header.type == tarfile.GNUTYPE_SPARSE or any(map(_is_sparse, records))
        return header.name if name is None else name, int(size) if re.fullmatch(rb"\d{1,18}", size) else None, sparse

    def clear(self) -> None:
        """Nothing; what was said of one member does not count for the next."""
        self.name, self.too_large = None, False
        self._records.clear()


def _pax_records(payload: bytes) -> list[tuple[bytes, bytes]]:
    """Keywords and values, as far as they are well-formed."""
    records, at = [], 0
    while match := _PAX_RECORD.match(payload, at):
        length = int(match[1])
        if at + length <= match.end():
            break
        records.append((match[2], payload[match.end() : at + length - 1]))
        at += length
    return records


def _is_sparse(keyword: bytes) -> bool:
    return keyword.startswith(b"GNU.sparse.")


def _matters(keyword: bytes) -> bool:
    return keyword in (b"path", b"size", b"GNU.sparse.major", b"GNU.sparse.map", b"GNU.sparse.size")
