"""Pictures as files, in forms that Pillow does not write."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from ldm_scale.data.sources.openmoji import list_emoji, render_transparent


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


def emoji_scene(side: int, seed: int = 0) -> Image.Image:
    """Six emoji on a fade, (side, side): the same scene at any resolution."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0.0, 1.0, side)
    fade = 60 + 160 * ramp[:, None, None] * np.array([1.0, 0.8, 0.6]) + 30 * ramp[None, :, None]
    scene = Image.fromarray(fade.clip(0, 255).astype(np.uint8))
    keys = [emoji.key for emoji in list_emoji()[0]]
    for _ in range(6):
        key, share, across, down = keys[int(rng.integers(len(keys)))], rng.uniform(0.2, 0.5), rng.random(), rng.random()
        drawn = render_transparent(key, int(side * share))
        scene.paste(drawn, (int(across * (side - drawn.width)), int(down * (side - drawn.height))), drawn)
    return scene
