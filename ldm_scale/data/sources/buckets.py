"""`prepare buckets`: pictures of about one aspect ratio together, so that batches of any shape lose little to cropping.

A bucket is a size whose area is at most that of the square of the resolution; sides are multiples of a step, and none
can grow by one without breaking that. A sample belongs to the bucket of the nearest aspect ratio, in logarithms, so
that twice as wide is as far as twice as high. The smallest bucket with less than the least share is dropped, its
samples counted to the neighbour nearer to it, and so on; then all samples are assigned among those that are left.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_scale.data.policy import BadSample
from ldm_scale.data.sidecar import Sidecar
from ldm_scale.data.sources import Prepared
from ldm_scale.data.sources.selection import (
    ShardPart,
    Source,
    check_out,
    chosen_row,
    find_chosen,
    identity,
    new_sidecar,
    size_of,
    write_chosen,
)
from ldm_scale.data.sources.workers import map_shards
from ldm_scale.errors import DataError

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class BucketOptions:
    """Which buckets there are."""

    resolution: int  # side of the square that no bucket's area exceeds
    step: int = 64  # sides are multiples of it
    max_aspect: float = 2.0  # of buckets; longer pictures are cropped
    min_share: float = 0.001  # of the samples of a split


def bucket_sizes(options: BucketOptions) -> list[Size]:
    """All buckets, from the widest to the highest.

    Raises: DataError if there is none.
    """
    area, step = options.resolution**2, options.step
    sizes = []
    for height in range(step, area // step + 1, step):
        width = area // height // step * step
        grows = (height + step) * width <= area
        if width and not grows and max(height, width) <= options.max_aspect * min(height, width):
            sizes.append((height, width))
    if not sizes:
        raise DataError(
            f"--resolution {options.resolution} --step {step} --max-aspect {options.max_aspect:g}: no bucket fits; "
            "give a resolution of at least the step, and an aspect of at least 1"
        )
    return sizes


def nearest(pictures: NDArray[np.int64], sizes: Sequence[Size]) -> NDArray[np.int64]:
    """Number of the bucket of each picture; of two at the same distance the first.

    Shapes: pictures (n, 2) widths and heights; returns (n,).
    """
    targets = np.log([width / height for height, width in sizes])
    aspects = np.log(pictures[:, 0] / pictures[:, 1])
    buckets: NDArray[np.int64] = np.abs(aspects[:, None] - targets).argmin(1)
    return buckets


def kept_buckets(counts: NDArray[np.int64], sizes: Sequence[Size], min_share: float) -> list[Size]:
    """The buckets that are left when those with too few samples were merged into their neighbours."""
    left = [(math.log(size[1] / size[0]), int(count), size) for count, size in zip(counts, sizes, strict=True)]
    total = int(counts.sum())
    while len(left) > 1:
        smallest = min(range(len(left)), key=lambda number: left[number][1])
        aspect, count, _ = left[smallest]
        if count and count >= min_share * total:
            break
        del left[smallest]
        target = min(range(len(left)), key=lambda number: abs(left[number][0] - aspect))
        left[target] = (left[target][0], left[target][1] + count, left[target][2])
    return [size for _, _, size in left]


@dataclass(frozen=True)
class _Job:
    shard: ShardPart
    sizes: tuple[Size, ...]
    sidecar: Path | None  # None: samples are only counted
    out: Path


@dataclass(frozen=True)
class _Found:
    counts: NDArray[np.int64]  # samples per bucket
    cropped: NDArray[np.float64]  # sums over them of the share of the area that is cropped away
    left_out: Counter[str]
    rows: tuple[dict[str, Any] | None, ...] = ()  # of the new manifest, per bucket


def bucket_manifest(path: Path, out: Path, options: BucketOptions, workers: int | None = None) -> Prepared:
    """The manifest at `out` whose splits have a part per bucket; each part says its share and what cropping costs.

    Raises: DataError if the manifest or a shard cannot be read, or it has buckets already.
    """
    source = Source.open(path)
    if any("parts" in entry for entry in source.content["splits"].values()):
        raise DataError(f"{source.path}: has buckets already; give the manifest that they were made from")
    request = {
        "source": "buckets",
        "manifest": Path(os.path.relpath(source.path.resolve(), out.resolve().parent)).as_posix(),
        "resolution": options.resolution,
        "step": options.step,
        "max_aspect": options.max_aspect,
        "min_share": options.min_share,
    }
    check_out(source, out, request)
    everything = tuple(bucket_sizes(options))
    left_out: Counter[str] = Counter()
    splits = {}
    for split in source.splits(None):
        ((_, shards),) = source.parts(split)
        counts = np.zeros(len(everything), np.int64)
        jobs = [_Job(shard, everything, None, out) for shard in shards]
        for found in map_shards(_bucket_one, jobs, len(jobs), workers, f"{split} sizes", lambda found: 0):
            counts += found.counts
            left_out += found.left_out
        if not counts.sum():
            raise DataError(f"{source.path}: no picture of split {split!r} has a known size; index its shards anew")
        sizes = tuple(kept_buckets(counts, everything, options.min_share))
        splits[split] = _write_split(shards, sizes, split, out, workers)
    return source.publish(out, request, splits, resolution=options.resolution, left_out=dict(sorted(left_out.items())))


def _write_split(
    shards: list[ShardPart], sizes: tuple[Size, ...], split: str, out: Path, workers: int | None
) -> dict[str, Any]:
    """The manifest's entry of a split; its sidecars lie there."""
    jobs = [_Job(shard, sizes, new_sidecar(out, shard, split), out) for shard in shards]
    counts, cropped = np.zeros(len(sizes), np.int64), np.zeros(len(sizes))
    rows: list[list[dict[str, Any]]] = [[] for _ in sizes]
    for found in map_shards(_bucket_one, jobs, len(jobs), workers, f"{split} buckets", lambda found: 0):
        counts += found.counts
        cropped += found.cropped
        for listed, row in zip(rows, found.rows, strict=True):
            if row is not None:
                listed.append(row)
    parts = [
        {
            "size": list(size),
            "num_samples": int(count),
            "share": round(float(count / counts.sum()), 6),
            "cropped": round(float(lost / count), 6),
            "shards": listed,
        }
        for size, count, lost, listed in zip(sizes, counts, cropped, rows, strict=True)
        if count
    ]
    return {"num_samples": int(counts.sum()), "parts": parts}


def _bucket_one(job: _Job) -> _Found:
    """The samples of a shard per bucket, in sidecars of their own where the job says so."""
    sidecar, left_out = job.shard.sidecar, Counter[str]()
    shape = (len(sidecar), 2)
    shapes = np.zeros(shape, np.int64) if sidecar.pictures is None else sidecar.pictures.astype(np.int64)
    for row in np.flatnonzero((shapes == 0).any(1)).tolist():
        try:
            shapes[row] = size_of(sidecar.sample(row), job.shard)
        except BadSample as fault:
            left_out[str(fault)] += 1
    known = np.flatnonzero((shapes > 0).all(1))
    buckets = nearest(shapes[known], job.sizes)
    targets = np.array([width / height for height, width in job.sizes])
    ratio = shapes[known, 0] / shapes[known, 1] / targets[buckets]
    cropped = np.zeros(len(job.sizes))
    np.add.at(cropped, buckets, 1.0 - np.minimum(ratio, 1.0 / ratio))
    rows = () if job.sidecar is None else _write_rows(job, job.sidecar, sidecar, known, buckets)
    return _Found(np.bincount(buckets, minlength=len(job.sizes)), cropped, left_out, rows)


def _write_rows(
    job: _Job, path: Path, sidecar: Sidecar, known: NDArray[np.int64], buckets: NDArray[np.int64]
) -> tuple[dict[str, Any] | None, ...]:
    """The new manifest's entry of a shard for each bucket, None where it has no sample of it."""
    rows: list[dict[str, Any] | None] = []
    for number, (height, width) in enumerate(job.sizes):
        chosen = known[buckets == number]
        if not len(chosen):
            rows.append(None)
            continue
        place = path.parent / f"{height}x{width}" / path.name
        choice = {"bucket": [height, width], "among": job.sizes, "of": identity(job.shard)}
        found = find_chosen(place, choice) or write_chosen(place, sidecar, chosen, choice)
        rows.append(chosen_row(job.shard, place, found, job.out))
    return tuple(rows)
