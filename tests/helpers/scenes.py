"""Made-up pictures with captions, classes, boxes and maps: a coloured square on grey, in which everything is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ldm_scale.data.sources.tars import index_tars
from tests.helpers.shards import broken_png, png, write_tar

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
NAMES = list(COLOURS)


def make_squares(directory: Path, num_samples: int, side: int, *, annotated: bool = True, bad: int = 0) -> Path:
    """Path of a manifest whose split heldout holds squares, of class number % 3, on grey; `bad` pictures are none."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    samples = []
    for number in range(num_samples):
        name, size = NAMES[number % 3], side // 2
        left, top = (int(value) for value in generator.integers(0, side - size, 2))
        pixels = generator.normal(128, 4, (side, side, 3)).clip(0, 255)
        labels = np.zeros((side, side), np.uint8)
        pixels[top : top + size, left : left + size] = COLOURS[name]
        labels[top : top + size, left : left + size] = 1 + number % 3
        members = {
            "png": png(Image.fromarray(pixels.astype(np.uint8))) if number >= bad else broken_png(),
            "txt": f"a {name} square".encode(),
            "json": json.dumps(
                {"class": number % 3, "objects": [{"class": name, "box": [left, top, size, size]}] if annotated else []}
            ).encode(),
        }
        samples.append((f"{number:05d}", members | ({"seg.png": png(Image.fromarray(labels))} if annotated else {})))
    tar = write_tar(directory / "heldout-000000.tar", samples)
    lists = ({}, {}) if not annotated else (NAMES, ["background", *NAMES])
    index_tars([tar], directory / "manifest.json", "heldout", *(tuple(names) for names in lists))
    return directory / "manifest.json"
