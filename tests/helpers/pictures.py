"""Pictures as files, in forms that Pillow does not write."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def save(image: Image.Image, form: str, **options: object) -> bytes:
    """The picture in a format of Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def raw_png(width: int, height: int, depth: int, color_type: int, row: bytes, transparent: bytes = b"") -> bytes:
    """A PNG of equal rows from the format's definition: Pillow writes neither these depths nor these colour keys."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * height)
    key = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + key + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
