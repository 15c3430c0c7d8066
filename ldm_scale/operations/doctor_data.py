"""`ldm-scale doctor data`: what a data set would do to a run, found before the run is paid for.

Shards and sidecars are looked at one and all, checksums on request. Pictures are decoded for a sample of each split,
the same one every time. Leakage between splits is looked for among all samples, not in the sample: two files of equal
bytes have equal sizes, which the sidecars hold, so that only files of one size are read.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm_scale.config.schema import DataConfig
from ldm_scale.data import Dataset, open_manifest
from ldm_scale.data.decode import DecodeSettings, decode_sample
from ldm_scale.data.manifest import manifest_path, read_manifest
from ldm_scale.data.policy import BadSample
from ldm_scale.data.scan import scan_tar
from ldm_scale.data.shard import Shard
from ldm_scale.data.shards import IMAGE_EXTENSIONS
from ldm_scale.data.sidecar import IndexedSample
from ldm_scale.data.sources import TRAIN, map_in_processes
from ldm_scale.data.window import open_file
from ldm_scale.errors import DataError
from ldm_scale.operations.doctor_report import Report
from ldm_scale.operations.doctor_samples import SampleTally, inspect_sample, inspecting

DEFAULT_SAMPLES = 512
MAX_BYTE_COMPARISONS = 20_000  # files read to look for leakage unless all samples are asked for
SPEED_SAMPLES, SPEED_S = 64, 5.0
STEP_IMAGES = 64  # for the rate of steps that the decoding speed allows
MAX_NAMED = 20  # lines about single samples of one kind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing; the parser knows what `run` reads."""
    parser.add_argument("manifest", type=Path, help="a manifest.json of `ldm-scale prepare`, or its folder")
    parser.add_argument("--split", action="append", metavar="NAME", help="may be repeated (default: every split)")
    parser.add_argument("--resolution", type=int, help="pixels of the training (default: the manifest's, else 256)")
    parser.add_argument(
        "--samples", type=int, default=DEFAULT_SAMPLES, help=f"decoded per split ({DEFAULT_SAMPLES}); 0 = all"
    )
    parser.add_argument("--checksums", action="store_true", help="also read every byte: SHA-256 and index of each tar")


def run(arguments: argparse.Namespace) -> Report:
    """What was found in a data set."""
    path = manifest_path(arguments.manifest)
    report = Report(f"data {path}")
    if arguments.samples < 0 or (arguments.resolution is not None and arguments.resolution < 1):
        report.error("--samples must be at least 0 and --resolution at least 1", fix="correct the command")
        return report
    try:
        manifest = read_manifest(path)
    except DataError as error:
        report.error(str(error))
        return report
    if "splits" not in manifest:
        report.error("a mixture", str(path), "check the manifests of its data sets, one by one")
        return report
    resolution = arguments.resolution or manifest.get("resolution") or DataConfig().resolution
    report.facts |= {"manifest": str(path), "resolution": resolution, "splits": {}}
    datasets: dict[str, Dataset] = {}
    pixels: dict[str, dict[bytes, str]] = {}  # split -> digest of decoded pixels -> key, over the samples
    for split in arguments.split or sorted(manifest["splits"], key=lambda name: (name != TRAIN, name)):
        try:
            dataset = _check_shards(report, path, split, arguments.checksums)
        except DataError as error:
            report.error(str(error))
            continue
        if dataset is not None:
            datasets[split] = dataset
            pixels[split] = _check_samples(report, dataset, resolution, arguments.samples)
    _check_leakage(report, datasets, pixels, bounded=arguments.samples != 0)
    return report


def _check_shards(report: Report, path: Path, split: str, checksums: bool) -> Dataset | None:
    """The samples of those shards that are as the manifest says; None if there are none.

    Raises: DataError if the manifest is malformed or has no such split.
    """
    whole = open_manifest(path, split, check_sizes=False)
    entry = read_manifest(path)["splits"][split]
    entries: list[dict[str, Any]] = [row for part in entry.get("parts", [entry]) for row in part["shards"]]
    usable, healthy = list[int](), 0
    total = sum(shard.num_bytes for shard in whole.shards)
    with tqdm(
        total=total, desc=f"{split} shards", unit="B", unit_scale=True, mininterval=1.0, file=sys.stderr
    ) as progress:
        for number, (shard, entry) in enumerate(zip(whole.shards, entries, strict=True)):
            try:
                shard.check_size(whole.storage)
                shard.load_index()
                if checksums:
                    _check_content(report, shard, entry.get("sha256"))
                healthy += 1
                if not shard.holds_latents:
                    usable.append(number)
            except DataError as error:
                report.error(str(error))
            progress.update(shard.num_bytes)
    report.facts["splits"][split] = {
        "shards": len(whole.shards),
        "usable_shards": healthy,
        "num_samples": whole.num_samples,
        "bytes": total,
    }
    if healthy == len(whole.shards):
        how = "sizes, sidecars and checksums" if checksums else "sizes and sidecars"
        report.ok(f"{healthy} shards, {whole.num_samples:,} samples: {how} agree", split)
    if len(usable) < healthy:
        report.ok(f"{healthy - len(usable)} shards hold latents, which `ldm-scale doctor latents` looks at", split)
    if not usable:
        return None
    return whole.of_shards(usable)


def _check_content(report: Report, shard: Shard, checksum: object) -> None:
    """Nothing, if every byte of a shard is what the manifest and the sidecar say.

    Raises: DataError.
    """
    sidecar = shard.load_index()
    with open_file(shard.path) as window:
        found = scan_tar(window, pictures=sidecar.pictures is not None)
    if checksum is None:
        report.warning("the manifest has no checksum of this shard", str(shard.path), "index it anew for one")
    elif found.sha256 != checksum:
        raise DataError(
            f"{shard.path}: SHA-256 {str(found.sha256)[:12]}..., but its manifest says {str(checksum)[:12]}...; the "
            "shard was changed: copy it again or index it anew with `ldm-scale prepare index`"
        )
    there = {sample.name: sample for sample in found.samples}
    for row in range(len(sidecar)):
        listed = sidecar.sample(row)
        if listed.name not in there or _places(listed) != _places(there[listed.name]):
            raise DataError(
                f"{shard.index_path}: {listed.name} does not lie in {shard.path.name} as it says; index the shard anew"
            )


def _places(sample: IndexedSample) -> dict[str, tuple[int, int]]:
    """Where the members of a sample lie; their bytes are held against the checksum of the whole tar."""
    return {extension: (member.offset, member.size) for extension, member in sample.members.items()}


def _check_samples(report: Report, dataset: Dataset, resolution: int, samples: int) -> dict[bytes, str]:
    """Decodes a sample of a split, the same one every time, and judges it; returns digest of pixels -> key."""
    tally = SampleTally(dataset, resolution)
    numbers = sampled_numbers(dataset.num_samples, samples)
    with inspecting(dataset):
        for seen in map_in_processes(inspect_sample, numbers, f"{dataset.split} samples"):
            tally.add(seen)
    tally.judge(report, MAX_NAMED)
    facts = report.facts["splits"][dataset.split] | tally.facts()
    report.facts["splits"][dataset.split] = facts
    speed = _decode_speed(dataset, resolution, numbers)
    if speed is not None:
        facts["decoded_images_per_s_per_core"] = round(speed, 1)
        report.ok(
            f"one core decodes {speed:,.0f} images/s at {resolution} px, {speed / STEP_IMAGES:.1f} steps/s of "
            f"{STEP_IMAGES} images: a rank that trains faster waits, unless data.num_workers is as many times higher",
            dataset.split,
        )
    return tally.pixels


def sampled_numbers(num_samples: int, samples: int) -> list[int]:
    """Numbers of the samples to decode, in the order in which they lie in the shards; 0 asks for all."""
    if samples == 0 or samples >= num_samples:
        return list(range(num_samples))
    return sorted(np.random.default_rng(0).choice(num_samples, samples, replace=False).tolist())


def _decode_speed(dataset: Dataset, resolution: int, numbers: list[int]) -> float | None:
    """Images/s from shard to array by this process alone, bad samples left out; None if none is usable."""
    settings = DecodeSettings(resolution)
    chosen = numbers[:: max(1, len(numbers) // SPEED_SAMPLES)]
    decoded, spent = 0, 0.0
    for number in chosen:
        started = time.perf_counter()
        try:
            decode_sample(dataset.read(number), settings, dataset.vocabulary, number, epoch=0)
        except (BadSample, DataError):
            continue
        spent += time.perf_counter() - started
        decoded += 1
        if spent > SPEED_S:
            break
    return decoded / spent if decoded else None


def _check_leakage(
    report: Report, datasets: dict[str, Dataset], pixels: dict[str, dict[bytes, str]], bounded: bool
) -> None:
    """Looks for pictures of the training split in the others: equal files among all samples, equal pixels in those
    that were decoded.
    """
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
