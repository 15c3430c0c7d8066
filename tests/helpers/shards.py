"""Tiny webdataset shards for tests, written with the standard library alone so that they do not lean on our writer."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ldm_scale.data.sources.tars import index_tars

COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "bar")


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """The tar of these (name, members by extension), in this order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def png(image: Image.Image) -> bytes:
    """The picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def broken_png() -> bytes:
    """A picture whose header is sound and whose pixels are noise: only decoding finds that."""
    content = bytearray(png(Image.new("RGB", (8, 8))))
    start = content.index(b"IDAT") + 4
    content[start : start + 8] = b"\xff" * 8
    return bytes(content)


def make_sample(number: int, resolution: int, rng: np.random.Generator) -> dict[str, bytes]:
    """A coloured shape at a random place, its caption ("red circle") and its class (the shape)."""
    color, shape = COLORS[number % len(COLORS)], number % len(SHAPES)
    image = Image.new("RGB", (resolution, resolution), "white")
    left, top = (float(x) for x in rng.uniform(0, resolution / 3, size=2))
    box = (left, top, left + resolution * (0.6 if shape != 2 else 0.2), top + resolution * 0.6)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == 0 else draw.rectangle)(box, fill=color)
    return {
        "png": png(image),
        "txt": f"{color} {SHAPES[shape]}".encode(),
        "json": json.dumps({"class": shape}).encode(),
    }


def make_dataset(
    directory: Path,
    num_samples: int = 24,
    samples_per_shard: int = 8,
    resolution: int = 32,
    seed: int = 0,
    splits: tuple[str, ...] = ("train",),
) -> Path:
    """Path of the manifest of new shards in `directory`: `num_samples` in each split."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split in splits:
        samples = [(f"{split}{n:05d}", make_sample(n, resolution, rng)) for n in range(num_samples)]
        shards = [
            write_tar(
                directory / f"{split}-{start // samples_per_shard:06d}.tar", samples[start : start + samples_per_shard]
            )
            for start in range(0, num_samples, samples_per_shard)
        ]
        index_tars(shards, directory / "manifest.json", split)
    return directory / "manifest.json"
