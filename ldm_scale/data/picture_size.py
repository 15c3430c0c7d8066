"""Width and height of a picture from the first bytes of its file; no pixel is decoded.

The size is that of the upright picture, as `pictures.open_rgb` gives it. Only what the file's head says is seen: a PNG
whose EXIF data stand behind its pixels counts as it is stored.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

from PIL import ExifTags, Image

from ldm_scale.data.pictures import DECODE_ERRORS, FORMATS, MAX_IMAGE_PIXELS, TOO_LARGE
from ldm_scale.data.policy import BadSample
from ldm_scale.data.window import Window

BAD_HEADER = "image header cannot be read"
MAX_HEAD = 1 << 24  # bytes of a picture's file in which its size must stand

_BUFFER = 4096  # bytes
_TRANSPOSING = range(5, 9)  # EXIF orientations that exchange width and height
_WEBP_HEAD = 30  # bytes that hold the canvas, or the only frame's size
_HAS_METADATA = 0b1100  # flags of a WebP file with EXIF or XMP
_MAX_CHUNKS = 4096  # of a WebP file that are looked at for them


class _Head(io.RawIOBase):
    """The first MAX_HEAD bytes of a member as a file, fetched as they are read."""

    def __init__(self, window: Window, start: int, stop: int) -> None:
        self._window, self._start, self._size = window, start, min(stop - start, MAX_HEAD)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        content = self._window.read(self._start + self._at, self._start + stop)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def picture_size(window: Window, start: int, stop: int) -> tuple[int, int]:
    """Width and height of the upright picture that lies at these bytes.

    Raises: BadSample if no size can be read, or one of more than MAX_IMAGE_PIXELS.
    """
    try:
        head = window.read(start, min(start + _WEBP_HEAD, stop))
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            width, height, orientation = _read_webp(window, start, stop, head)
        else:
            with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
                picture = Image.open(io.BufferedReader(_Head(window, start, stop), _BUFFER), formats=FORMATS)
            width, height = picture.size
            orientation = _orientation(picture)
    except Image.DecompressionBombError:
        raise BadSample(TOO_LARGE) from None
    except DECODE_ERRORS:
        raise BadSample(BAD_HEADER) from None
    if width * height > MAX_IMAGE_PIXELS:
        raise BadSample(TOO_LARGE)
    if width < 1 or height < 1:
        raise BadSample(BAD_HEADER)
    return (height, width) if orientation in _TRANSPOSING else (width, height)


def _orientation(picture: Image.Image) -> object:
    """The EXIF or XMP orientation; 1 where there is none or it is damaged."""
    try:
        # Of a PNG without it at the head, the class's own method would decode all pixels to look behind them.
        return Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1)
    except (*DECODE_ERRORS, AttributeError):
        return 1


def _read_webp(window: Window, start: int, stop: int, head: bytes) -> tuple[int, int, object]:
    """Width and height as stored, and orientation. Pillow would read the whole file for them.

    Raises: ValueError, struct.error if they cannot be read. Source: RFC 9649, section 2.
    """
    kind = head[12:16]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF, 1
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1
    if kind != b"VP8X" or len(head) < _WEBP_HEAD:
        raise ValueError("no frame")
    width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
    picture = Image.Image()
    offset = start + 12
    for _ in range(_MAX_CHUNKS if head[20] & _HAS_METADATA else 0):
        if offset + 8 > stop:
            break
        name, size = struct.unpack("<4sI", window.read(offset, offset + 8))
        if name in (b"EXIF", b"XMP ") and size <= MAX_HEAD:
            picture.info[name.decode().strip().lower()] = window.read(offset + 8, min(offset + 8 + size, stop))
        offset += 8 + size + size % 2
    return width, height, _orientation(picture)
