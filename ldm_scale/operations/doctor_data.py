"""`ldm-scale doctor data`: what a data set would do to a run, found before the run is paid for.

Shards and sidecars are looked at one and all, checksums on request. Pictures are decoded for a sample of each split,
or of each part of a mixture, the same one every time. What is kept of a sample takes some hundred bytes, so that all of
them may be looked at.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ldm_scale.command_line import output_path
from ldm_scale.config.schema import DataConfig
from ldm_scale.data import Dataset, open_manifest
from ldm_scale.data.decode import DecodeSettings, decode_sample
from ldm_scale.data.manifest import Part, manifest_path, read_manifest
from ldm_scale.data.policy import BadSample
from ldm_scale.data.scan import scan_tar
from ldm_scale.data.shard import Shard
from ldm_scale.data.sidecar import IndexedSample
from ldm_scale.data.sources import TRAIN, map_in_processes
from ldm_scale.data.window import READ_ALL, Window, open_file
from ldm_scale.errors import DataError
from ldm_scale.operations.doctor_leakage import Pixels, check_leakage
from ldm_scale.operations.doctor_report import Report
from ldm_scale.operations.doctor_samples import SampleTally, inspect_sample, inspecting

DEFAULT_SAMPLES = 512
SPEED_SAMPLES, SPEED_S = 64, 5.0
STEP_IMAGES = 64  # for the rate of steps that the decoding speed allows
MAX_NAMED = 20  # lines about single samples of one kind


class Checked(NamedTuple):
    """A split whose shards were looked at."""

    whole: Dataset
    usable: list[int]  # image shards that are as the manifest says
    left_out: dict[int, Counter[str]]  # shard -> reason -> what the index left out of it


class Listed(NamedTuple):
    """A manifest with splits."""

    path: Path
    content: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing; the parser knows what `run` reads."""
    parser.add_argument("manifest", type=Path, help="a manifest.json of `ldm-scale prepare`, or its folder")
    parser.add_argument("--split", action="append", metavar="NAME", help="may be repeated (default: every split)")
    parser.add_argument("--resolution", type=int, help="pixels of the training (default: the manifest's, else 256)")
    parser.add_argument(
        "--samples", type=int, default=DEFAULT_SAMPLES, help=f"decoded per split ({DEFAULT_SAMPLES}); 0 = all"
    )
    parser.add_argument(
        "--sheet", type=output_path, metavar="PNG", help="also draw pictures, distributions and look-alikes"
    )
    parser.add_argument("--checksums", action="store_true", help="also read every byte: SHA-256 and index of each tar")


def run(arguments: argparse.Namespace) -> Report:
    """What was found in a data set."""
    path = manifest_path(arguments.manifest)
    report = Report(f"data {path}")
    if arguments.samples < 0 or (arguments.resolution is not None and arguments.resolution < 1):
        report.error("--samples must be at least 0 and --resolution at least 1", fix="correct the command")
        return report
    if arguments.sheet is not None and (arguments.sheet.suffix.lower() != ".png" or arguments.sheet.is_dir()):
        report.error(f"--sheet {arguments.sheet}: the sheet is a PNG", fix="give a name that ends in .png")
        return report
    try:
        listed = _list_manifests(path)
    except DataError as error:
        report.error(str(error))
        return report
    sides = {one.content["resolution"] for one in listed if one.content.get("resolution")}
    resolution = arguments.resolution or max(sides, default=DataConfig().resolution)
    report.facts |= {"manifest": str(path), "resolution": resolution, "splits": {}}
    datasets: dict[str, Dataset] = {}
    pixels: dict[str, Pixels] = {}
    tallies: list[SampleTally] = []
    known = {split for one in listed for split in one.content["splits"]}
    for split in arguments.split or sorted(known, key=lambda name: (name != TRAIN, name)):
        try:
            checked = _check_shards(report, path, split, listed, arguments.checksums)
        except DataError as error:
            report.error(str(error))
            continue
        _tell_buckets(report, checked.whole)
        if checked.usable:
            datasets[split] = checked.whole.of_shards(checked.usable)
            pixels[split] = {}
        for tally, facts in _sections(report, checked, listed, resolution):
            _check_samples(report, tally, arguments.samples, facts)
            pixels[split] = tally.pixels | pixels[split]
            tallies.append(tally)
    check_leakage(report, datasets, pixels, bounded=arguments.samples != 0)
    if arguments.sheet is not None:
        from ldm_scale.operations.doctor_sheet import draw_sheet

        draw_sheet(arguments.sheet, str(path), tallies)
        report.facts["sheet"] = str(arguments.sheet)
        report.ok(f"pictures, distributions and look-alikes are drawn in {arguments.sheet}")
    return report


def _list_manifests(path: Path) -> list[Listed]:
    """The manifests of a mixture; of another manifest itself.

    Raises: DataError if one cannot be read.
    """
    manifest = read_manifest(path)
    if "splits" in manifest:
        return [Listed(path, manifest)]
    paths = [manifest_path(path.parent / str(entry["manifest"])) for entry in manifest["mixture"]]
    return [Listed(own, read_manifest(own)) for own in paths]


def _check_shards(report: Report, path: Path, split: str, listed: list[Listed], checksums: bool) -> Checked:
    """What a split is made of.

    Raises: DataError if the manifest is malformed or has no such split.
    """
    whole = open_manifest(path, split, check_sizes=False)
    entries = [one.content["splits"][split] for one in listed if split in one.content["splits"]]
    rows: list[dict[str, Any]] = [row for e in entries for part in e.get("parts", [e]) for row in part["shards"]]
    usable, healthy, left_out = list[int](), 0, dict[int, Counter[str]]()
    total = sum(shard.num_bytes for shard in whole.shards)
    with tqdm(
        total=total, desc=f"{split} shards", unit="B", unit_scale=True, mininterval=1.0, file=sys.stderr
    ) as progress:
        for number, (shard, row) in enumerate(zip(whole.shards, rows, strict=True)):
            try:
                shard.check_size(whole.storage)
                if bad := shard.load_index().bad:
                    left_out[number] = Counter(record.reason for record in bad)
                if checksums:
                    _check_content(report, whole, shard, row.get("sha256"))
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
    if lost := sum(len(entry.get("quarantined", ())) for entry in entries):
        report.facts["splits"][split]["shards_left_out_by_index"] = lost
        report.warning(
            f"{lost} shards were left out whole by the index", split, "bad_samples.jsonl beside the manifest"
        )
    if healthy == len(whole.shards):
        how = "sizes, sidecars and checksums" if checksums else "sizes and sidecars"
        report.ok(f"{healthy} shards, {whole.num_samples:,} samples: {how} agree", split)
    if len(usable) < healthy:
        report.ok(f"{healthy - len(usable)} shards hold latents, which `ldm-scale doctor latents` looks at", split)
    return Checked(whole, usable, left_out)


def _tell_buckets(report: Report, whole: Dataset) -> None:
    """Nothing; the report says which buckets a split has, if any."""
    sizes = [(part.size, part.num_samples) for part in whole.parts if part.size is not None]
    if sizes:
        report.facts["splits"][whole.split]["buckets"] = [
            {"size": list(size), "num_samples": count, "share": round(count / whole.num_samples, 6)}
            for size, count in sizes
        ]
        shares = ", ".join(f"{h} x {w} {count / whole.num_samples:.0%}" for (h, w), count in sizes)
        report.ok(f"{len(sizes)} buckets (height x width, share of the samples): {shares}", whole.split)


def _sections(
    report: Report, checked: Checked, listed: list[Listed], resolution: int
) -> Iterator[tuple[SampleTally, dict[str, Any]]]:
    """What is looked at by itself, a split or each part of a mixture: an empty tally, and its place in the facts."""
    whole, facts = checked.whole, report.facts["splits"][checked.whole.split]
    names = [str(one.path) for one in listed if whole.split in one.content["splits"]]
    rows = [(len(whole.shards), whole.split, facts)]
    if whole.parts[0].weight is not None:
        facts["parts"] = [{"manifest": name} for name in names]
        rows = [
            (len(part.rows), f"{whole.split} of {name}", own)
            for part, name, own in zip(whole.parts, names, facts["parts"], strict=True)
        ]
        for part, (_, label, own) in zip(whole.parts, rows, strict=True):
            _tell_weight(report, part, whole.num_samples, label, own)
    first = 0
    for count, label, own in rows:
        shards = range(first, first + count)
        first += count
        usable = [number for number in checked.usable if number in shards]
        left_out = sum((checked.left_out[number] for number in checked.left_out if number in shards), Counter[str]())
        if usable:
            yield SampleTally(whole.of_shards(usable), resolution, label, left_out), own


def _tell_weight(report: Report, part: Part, num_samples: int, label: str, facts: dict[str, Any]) -> None:
    """Nothing; the report says how often a mixture of so many samples shows those of a part."""
    assert part.weight is not None, "a part of a mixture"
    passes = part.weight / part.num_samples * num_samples
    facts |= {"weight": round(part.weight, 6), "num_samples": part.num_samples, "passes_an_epoch": round(passes, 3)}
    report.ok(
        f"{part.weight:.1%} of every batch, from {part.num_samples:,} samples: each comes {passes:.2f} times in "
        f"{num_samples:,} images",
        label,
    )


def _check_content(report: Report, whole: Dataset, shard: Shard, checksum: object) -> None:
    """Nothing, if every byte of a shard is what the manifest and the sidecar say.

    Raises: DataError.
    """
    sidecar = shard.load_index()
    with _open(whole, shard) as window:
        found = scan_tar(window, pictures=sidecar.pictures is not None)
    if checksum is None:
        report.warning("the manifest has no checksum of this shard", shard.shown, "index it anew for one")
    elif found.sha256 != checksum:
        raise DataError(
            f"{shard.shown}: SHA-256 {str(found.sha256)[:12]}..., but its manifest says {str(checksum)[:12]}...; the "
            "shard was changed: copy it again or index it anew with `ldm-scale prepare index`"
        )
    there = {sample.name: sample for sample in found.samples}
    for row in range(len(sidecar)):
        listed = sidecar.sample(row)
        if listed.name not in there or _places(listed) != _places(there[listed.name]):
            raise DataError(
                f"{shard.index_path}: {listed.name} does not lie in {shard.stem}.tar as it says; index the shard anew"
            )


@contextmanager
def _open(whole: Dataset, shard: Shard) -> Iterator[Window]:
    """All bytes of a shard. Raises: DataError if it cannot be read."""
    if not shard.is_remote:
        with open_file(shard.path) as window:
            yield window
        return

    def fetch(start: int, stop: int) -> bytes:
        return whole.storage.read(shard.location, start, stop)

    yield Window(shard.shown, shard.num_bytes, fetch, READ_ALL, checksum=True)


def _places(sample: IndexedSample) -> dict[str, tuple[int, int]]:
    """Where the members of a sample lie; their bytes are held against the checksum of the whole tar."""
    return {extension: (member.offset, member.size) for extension, member in sample.members.items()}


def _check_samples(report: Report, tally: SampleTally, samples: int, facts: dict[str, Any]) -> None:
    """Nothing; some samples, the same ones every time, were decoded and judged."""
    dataset, label, resolution = tally.dataset, tally.label, tally.resolution
    numbers = sampled_numbers(dataset.num_samples, samples)
    started = time.perf_counter()
    with inspecting(dataset):
        for seen in map_in_processes(inspect_sample, numbers, f"{label} samples"):
            tally.add(seen)
    spent = time.perf_counter() - started
    tally.judge(report, MAX_NAMED)
    facts |= tally.facts()
    facts["looked_at_images_per_s"] = round(tally.seen / spent, 1)
    speed = _decode_speed(dataset, resolution, numbers)
    if speed is not None:
        facts["decoded_images_per_s_per_core"] = round(speed, 1)
        report.ok(
            f"one core decodes {speed:,.0f} images/s at {resolution} px, {speed / STEP_IMAGES:.1f} steps/s of "
            f"{STEP_IMAGES} images: a rank that trains faster waits, unless data.num_workers is as many times higher",
            label,
        )
    if tally.read_s:
        report.ok(
            f"one process reads {tally.num_read / tally.read_s:,.0f} samples/s one after the other, "
            f"{tally.num_bytes / 2**20 / tally.read_s:,.1f} MiB/s",
            label,
        )


def sampled_numbers(num_samples: int, samples: int) -> list[int]:
    """Numbers of the samples to decode, in the order in which they lie in the shards; 0 asks for all."""
    if samples == 0 or samples >= num_samples:
        return list(range(num_samples))
    return sorted(np.random.default_rng(0).choice(num_samples, samples, replace=False).tolist())


def _decode_speed(dataset: Dataset, resolution: int, numbers: list[int]) -> float | None:
    """Images/s from shard to array by this process alone, bad samples left out; None if none is usable."""
    settings = [DecodeSettings(resolution, size=part.size) for part in dataset.parts]
    ends = np.cumsum([part.num_samples for part in dataset.parts])
    chosen = numbers[:: max(1, len(numbers) // SPEED_SAMPLES)]
    decoded, spent = 0, 0.0
    for number in chosen:
        own = settings[int(np.searchsorted(ends, number, side="right"))]
        started = time.perf_counter()
        try:
            decode_sample(dataset.read(number), own, dataset.vocabulary, number, epoch=0)
        except (BadSample, DataError):
            continue
        spent += time.perf_counter() - started
        decoded += 1
        if spent > SPEED_S:
            break
    return decoded / spent if decoded else None
