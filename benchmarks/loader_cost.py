"""What order, index and checks cost of the time of a picture."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measured import spread
from ldm_scale.data.shards import open_manifest
from ldm_scale.data.stream import build_stream

BATCH = 64
LOCATED = 4096  # positions at a time, as data/pipeline.py does
REPEATS = 20
CHECKS = ("order", "index", "checksum")  # what plain webdataset does not do


def cost(folder: Path, images_per_s: float) -> dict[str, Any]:
    """Seconds of each part of reading an image, and their shares of the image's whole time."""
    dataset = open_manifest(folder / "pictures" / "manifest.json", "train")
    stream = build_stream(dataset, 0, BATCH)
    positions = np.arange(LOCATED)
    numbers = stream.locate(positions).samples.tolist()
    places = [_places(dataset, number) for number in numbers]
    contents = [dataset._pread(shard, start, size) for shard, start, size in places]

    def index() -> None:
        for number in numbers:
            shard, row = dataset.locate(number)
            dataset.sidecar(shard).sample(row)

    def read() -> None:
        for shard, start, size in places:
            dataset._pread(shard, start, size)

    def checksum() -> None:
        for content in contents:
            zlib.crc32(content)

    def whole() -> None:
        for number in numbers:
            dataset.read(number)

    parts: dict[str, Callable[[], Any]] = {
        "order": lambda: stream.locate(positions),
        "index": index,
        "checksum": checksum,
        "read": read,
        "order, index, checksum, read": lambda: (stream.locate(positions), whole()),
    }
    seconds = {name: spread([_timed(part) / LOCATED for _ in range(REPEATS)]) for name, part in parts.items()}
    shares = {name: times["median"] * images_per_s for name, times in seconds.items()}
    shares["order + index + checksum"] = sum(shares[name] for name in CHECKS)
    return {"image_s": seconds, "share_of_image": shares}


def _places(dataset: Any, number: int) -> tuple[int, int, int]:
    """(shard, first byte, number of bytes) of a sample."""
    shard, row = dataset.locate(number)
    members = dataset.sidecar(shard).sample(row).members.values()
    start = min(member.offset for member in members)
    return shard, start, max(member.offset + member.size for member in members) - start


def _timed(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
