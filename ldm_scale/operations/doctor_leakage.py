"""Pictures of the training split in the others.

Files of equal bytes are looked for among all samples: they have equal sizes, which the sidecars hold, so that only
files of one size are read. Equal pixels are looked for among the samples that were decoded.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm_scale.data import Dataset
from ldm_scale.data.shards import IMAGE_EXTENSIONS
from ldm_scale.data.sources import TRAIN
from ldm_scale.errors import DataError
from ldm_scale.operations.doctor_report import Report

MAX_BYTE_COMPARISONS = 20_000  # files that are read unless all samples are asked for
MAX_NAMED = 20  # of each split

Pixels = dict[bytes, str]  # digest of decoded pixels -> key


def check_leakage(report: Report, datasets: dict[str, Dataset], pixels: dict[str, Pixels], bounded: bool) -> None:
    """Nothing; the report says what was found, or that it was not looked for."""
    if TRAIN not in datasets or len(datasets) == 1:
        report.ok(f"leakage was not looked for: it takes the split {TRAIN!r} and another")
        return
    train = datasets[TRAIN]
    report.facts["leakage"] = {}
    for split, other in datasets.items():
        if split == TRAIN:
            continue
        found, left_out = _equal_files(train, other, bounded)
        same_pixels = pixels[split].keys() & pixels[TRAIN].keys()
        found |= {pixels[split][digest]: pixels[TRAIN][digest] for digest in same_pixels}
        report.facts["leakage"][split] = len(found)
        for key, twin in sorted(found.items())[:MAX_NAMED]:
            report.error(
                f"the same picture as {twin} of {TRAIN}: it is measured on what was trained on",
                f"{split} {key}",
                "remove one of them",
            )
        if found:
            share = len(found) / other.num_samples
            report.error(f"{len(found)} pictures ({share:.1%}) are in {TRAIN} too", split, "prepare the splits anew")
        else:
            report.ok(f"no picture is in {TRAIN} too: files of all samples, pixels of those decoded", split)
        if left_out:
            report.warning(
                f"{left_out:,} files whose sizes occur on both sides were not compared", split, "--samples 0 does"
            )


def _equal_files(train: Dataset, other: Dataset, bounded: bool) -> tuple[dict[str, str], int]:
    """Key in the other split -> key in the training split of equal files; how many candidates were left out."""
    sizes = _image_sizes(train), _image_sizes(other)
    shared = np.setdiff1d(np.intersect1d(*sizes), [0])
    suspects = [np.flatnonzero(np.isin(side, shared)) for side in sizes]
    compared = [rows[: MAX_BYTE_COMPARISONS // 2] if bounded else rows for rows in suspects]
    known = {digest: number for number, digest in _digests(train, compared[0])}
    found = {
        other.key(number): train.key(known[digest])
        for number, digest in _digests(other, compared[1])
        if digest in known
    }
    return found, sum(map(len, suspects)) - sum(map(len, compared))


def _image_sizes(dataset: Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Bytes of each sample's picture; 0, and so never compared, where it has none."""
    sizes = []
    for shard in dataset.shards:
        index = shard.load_index()
        found = np.zeros(shard.num_samples, dtype=np.int64)
        for extension in reversed(IMAGE_EXTENSIONS):
            if extension in index.extensions:
                column = index.extensions.index(extension)
                found = np.where(index.offsets[:, column] >= 0, index.sizes[:, column], found)
        sizes.append(found)
    return np.concatenate(sizes)


def _digests(dataset: Dataset, numbers: np.ndarray[Any, Any]) -> Iterator[tuple[int, bytes]]:
    """(number, digest of the picture's bytes) of samples; those that cannot be read were reported before."""
    label = f"{dataset.split} files"
    for number in tqdm(numbers.tolist(), desc=label, unit="images", mininterval=1.0, file=sys.stderr):
        try:
            sample = dataset.read(number)
        except DataError:
            continue
        data = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), b"")
        assert not isinstance(data, str)
        if data:
            yield number, hashlib.blake2b(data, digest_size=16).digest()
