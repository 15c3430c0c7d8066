"""Data sets in which `doctor data` finds what a test has put there, and what it said."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ldm_scale.data.sources.tars import index_tars
from ldm_scale.operations import doctor_data
from ldm_scale.operations.doctor_report import Report
from tests.helpers.shards import png, write_tar

Members = dict[str, bytes]

SIZES = [(64, 32), (32, 64), (48, 48), (100, 20)]


def examine(manifest: Path, *options: str) -> Report:
    """What `doctor data` says of a manifest."""
    parser = argparse.ArgumentParser()
    doctor_data.add_arguments(parser)
    return doctor_data.run(parser.parse_args([str(manifest), *options]))


def lines_of(report: Report, level: str) -> list[str]:
    """Its findings of a level, as lines."""
    return [f"{f.where}: {f.what}" for f in report.findings if f.level == level]


def noise_samples(count: int, seed: int = 0, prefix: str = "s") -> list[tuple[str, Members]]:
    """Samples of which no two have the same picture or caption."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        members = {"txt": f"{prefix} number {number}".encode(), "json": json.dumps({"class": number % 3}).encode()}
        samples.append((f"{prefix}{number:03d}", {"png": png(noise), **members}))
    return samples


def write_splits(folder: Path, **splits: list[tuple[str, Members]]) -> Path:
    """The manifest of new shards in a folder, one for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, samples in splits.items():
        index_tars([write_tar(folder / f"{split}-000000.tar", samples)], folder / "manifest.json", split)
    return folder / "manifest.json"


def samples_in_sizes(count: int, prefix: str = "s") -> list[tuple[str, Members]]:
    """Different pictures in four sizes in turn, with captions of one to four words."""
    rng = np.random.default_rng(len(prefix))
    return [
        (
            f"{prefix}{n:03d}",
            {
                "png": png(Image.fromarray(rng.integers(0, 256, (*SIZES[n % 4][::-1], 3), dtype=np.uint8))),
                "txt": " ".join(["word"] * (n % 4 + 1)).encode(),
            },
        )
        for n in range(count)
    ]
