"""Whether a latent cache is what its manifest says: looked at as a whole, and a sample of it decoded.

Every cached sample is scanned: shape, NaN, range, members against those of its source, moments that occur twice. A
sample of them is encoded again from its source and both are decoded (operations/latent_comparison.py).
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ldm_scale.data.latent_shards import sha256_of
from ldm_scale.data.latents import CENTER, PREFIX, LatentCache, read_moments, read_record
from ldm_scale.data.manifest import manifest_path, plain_splits, read_manifest
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import IMAGE_EXTENSIONS, open_manifest
from ldm_scale.data.sidecar import open_sidecar
from ldm_scale.errors import DataError
from ldm_scale.interchange.load import LoadedAutoencoder, load_autoencoder
from ldm_scale.models.autoencoder import LOGVAR_RANGE
from ldm_scale.operations.doctor_report import Report
from ldm_scale.operations.latent_comparison import MAX_SHOWN, Pair, Shown, compare, keys_that_differ
from ldm_scale.telemetry.log import shows_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing; adds the options of `ldm-scale doctor latents`."""
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="manifest.json of the latent cache")
    parser.add_argument("--artifact", type=Path, required=True, help="the autoencoder artifact that it belongs to")
    parser.add_argument("--source", type=Path, help="manifest of the images (default: the one it was encoded from)")
    parser.add_argument("--samples", type=_whole, default=64, help="samples of each split to decode and compare (64)")
    parser.add_argument("--min-psnr", type=float, metavar="DB", help="also refuse decoded samples below this")


def _whole(text: str) -> int:
    """An argument that is a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def run(arguments: argparse.Namespace) -> Report:
    """What was found.

    Raises: DataError or CheckpointError if the cache, its source or the artifact cannot be opened.
    """
    path = manifest_path(arguments.manifest)
    manifest = read_manifest(path)
    each = "look at the cache of each data set by itself"
    cached = {split: open_manifest(path, split) for split in plain_splits(path, manifest, each)}
    cached = {split: dataset for split, dataset in cached.items() if dataset.latents is not None}
    if not cached:
        raise DataError(f"{path}: holds no latent shards; give the manifest that `ldm-scale encode` wrote")
    report = Report(f"latents {path}")
    autoencoder = load_autoencoder(arguments.artifact)
    cache = next(iter(cached.values())).latents
    assert cache is not None, "kept above for having latents"
    if cache.artifact_sha256 != autoencoder.content_hash:
        report.error(
            f"holds latents of the autoencoder {cache.artifact_sha256[:12]}, {arguments.artifact} is "
            f"{autoencoder.content_hash[:12]}",
            str(path),
            "give the artifact that it was encoded with",
        )
        return report
    source_path = _source_path(arguments.source, path, manifest)
    source = read_manifest(source_path)
    plain_splits(source_path, source, "give the images that the cache was encoded from (--source)")
    report.facts |= {"manifest": str(path), "source": str(source_path), "artifact_sha256": cache.artifact_sha256}
    shown = Shown(report)
    for split, dataset in cached.items():
        pair = Pair(dataset, open_manifest(source_path, split), cache)
        same = _same_source(pair, manifest, source, split, report)
        _check_sums(pair, manifest["splits"][split]["shards"], autoencoder if same else None, report)
        if not same:
            continue
        usable = _scan(pair, shown, report)
        compare(pair, autoencoder, _spread(usable, arguments.samples), arguments.min_psnr, shown, report)
    shown.close()
    return report


def _source_path(given: Path | None, path: Path, manifest: dict[str, Any]) -> Path:
    """The manifest of the images."""
    if given is not None:
        return manifest_path(given)
    found = Path(os.path.normpath(path.parent.resolve() / str(manifest.get("request", {}).get("manifest", ""))))
    if not found.is_file():
        raise DataError(f"{path}: the images that it was encoded from are not at {found}; give --source MANIFEST")
    return found


def _same_source(pair: Pair, manifest: dict[str, Any], source: dict[str, Any], split: str, report: Report) -> bool:
    """Whether the cache was made from these very image shards; says so in the report."""
    theirs = {Path(entry["file"]).name: entry for entry in source["splits"][split]["shards"]}
    latent = [entry for entry in manifest["splits"][split]["shards"] if "source" in entry]
    for entry in latent:
        now = theirs.get(entry["source"]["file"], {})
        for name in ("num_samples", "bytes", "sha256"):
            if name in now and now[name] != entry["source"][name]:
                report.error(
                    f"encoded from a {entry['source']['file']} with {name} {entry['source'][name]}, now {now[name]}",
                    str(pair.cached.manifest_path.parent / entry["file"]),
                    "give the images it was encoded from, or encode anew",
                )
                return False
    if pair.cached.digest != pair.source.digest:
        report.error(
            f"its split {split!r} has other shards or samples than {pair.source.manifest_path}",
            str(pair.cached.manifest_path),
            "give the images it was encoded from, or encode anew",
        )
        return False
    report.ok(f"{split}: {len(latent)} of {len(pair.cached.shards)} shards hold latents, made from these image shards")
    return True


def _check_sums(
    pair: Pair, entries: list[dict[str, Any]], autoencoder: LoadedAutoencoder | None, report: Report
) -> None:
    """Notes latent shards whose bytes are not those that were written, and the samples that it concerns.

    Without an autoencoder (the source is not at hand) no sample is named.
    """
    split, first, checked, changed = pair.cached.split, 0, 0, 0
    latent = list(zip(pair.cached.shards, entries, strict=True))
    bar = tqdm(latent, desc=f"checksums {split}", unit="shards", mininterval=1.0, disable=not shows_progress())
    for shard, entry in bar:
        numbers = range(first, first + shard.num_samples)
        first += shard.num_samples
        if not shard.holds_latents:
            continue
        found = sha256_of(shard.path)
        stated = {"manifest": entry.get("sha256"), "index": _stated_in(shard.index_path)}
        wrong = [f"its {name} says {str(sum_)[:12]}" for name, sum_ in stated.items() if sum_ != found]
        checked += 1
        if not wrong:
            continue
        changed += 1
        which = "" if autoencoder is None else f": {_concerned(pair, autoencoder, numbers)}"
        report.error(
            f"its sha256 is {found[:12]}, {' and '.join(wrong)}; it was changed after it was encoded{which}",
            str(shard.path),
            "copy it again, or remove it and its index and run the same `ldm-scale encode` again",
        )
    if not changed:
        report.ok(f"{split}: {checked} latent shards have the sha256 that their manifest and index state")


def _stated_in(sidecar: Path) -> str | None:
    """The checksum of its tar that a sidecar states, None if it states none."""
    try:
        return str(open_sidecar(sidecar).extra["latents"]["file"]["sha256"])
    except (KeyError, TypeError):
        return None


def _concerned(pair: Pair, autoencoder: LoadedAutoencoder, numbers: range) -> str:
    """Which samples of a changed shard have other moments than their sources give now, for a message."""
    keys = keys_that_differ(pair, autoencoder, numbers)
    if not keys:
        return "all moments are what their sources give now, within rounding"
    more = f" and {len(keys) - MAX_SHOWN} more" if len(keys) > MAX_SHOWN else ""
    return f"not the moments that their sources give now: {', '.join(keys[:MAX_SHOWN])}{more}"


def _scan(pair: Pair, shown: Shown, report: Report) -> list[int]:
    """The samples whose moments can be used, after all were looked at."""
    extremes: dict[str, list[float]] = {"mean": [], "logvar": []}
    seen: dict[bytes, list[int]] = defaultdict(list)
    usable, unusable = [], 0
    split, before = pair.cached.split, shown.counts.total()
    numbers = list(pair.numbers())
    bar = tqdm(numbers, desc=f"scan {split}", unit="images", mininterval=1.0, disable=not shows_progress())
    for number in bar:
        where = pair.where(number)
        try:
            raw = pair.cached.read(number)
            record = read_record(raw)
            source = pair.source.read(number, leave_out=IMAGE_EXTENSIONS)
            _check_pairing(raw, source, where, shown)
            if "unusable" in record:
                unusable += 1
                continue
            for variant in pair.cache.variants:
                moments = read_moments(raw, variant, pair.cache)
                _check_range(moments, pair.cache, f"{where} ({variant})", extremes, shown)
                if variant == CENTER:
                    seen[blake2b(moments.tobytes(), digest_size=8).digest()].append(number)
        except DataError as error:
            shown.error("unreadable moments", str(error), where)
            continue
        usable.append(number)
    duplicates = _check_duplicates(pair, seen, shown)
    report.facts[split] = {
        "scanned": len(numbers),
        "unusable": unusable,
        "duplicates_of_equal_images": duplicates,
        **{f"{name}_{end}": function(values) for name, values in extremes.items() if values for end, function in _ENDS},
    }
    if shown.counts.total() == before:
        report.ok(
            f"{split}: {len(numbers)} samples scanned: shapes, NaN, range, captions, duplicates ({unusable} unusable "
            f"in the source too, {duplicates} duplicates of equal images)"
        )
    return usable


_ENDS: tuple[tuple[str, Callable[[list[float]], float]], ...] = (("min", min), ("max", max))


def _check_pairing(raw: dict[str, Any], source: dict[str, Any], where: str, shown: Shown) -> None:
    """Notes a caption, class or other member that is not the source's."""
    if raw["__key__"] != source["__key__"]:
        shown.error("pairing", f"stands where its source has {source['__key__']}", where, "encode the shard anew")
    for name in sorted({*raw, *source} - {"__key__"}):
        if name.startswith(PREFIX):
            continue
        ours, theirs = raw.get(name), source.get(name)
        if ours != theirs:
            what = "caption" if name == "txt" else f"member {name}"
            shown.error("pairing", f"its {what} is {_text(ours)}, its source's is {_text(theirs)}", where)


def _text(content: object) -> str:
    """A member for a message."""
    return (
        repr(bytes(content).decode("utf-8", "replace")[:40]) if isinstance(content, bytes | memoryview) else "missing"
    )


def _check_range(moments: Any, cache: LatentCache, where: str, extremes: dict[str, list[float]], shown: Shown) -> None:
    """Notes log-variances that no encoder gives; keeps the extremes."""
    parts = np.split(moments, 2) if cache.kind == "kl" else [moments]
    for name, values in zip(("mean", "logvar"), parts, strict=False):
        low, high = float(values.min()), float(values.max())
        extremes[name] = [min([low, *extremes[name]]), max([high, *extremes[name]])]
        if name == "logvar" and not (LOGVAR_RANGE[0] <= low and high <= LOGVAR_RANGE[1]):
            shown.error("range", f"log-variances from {low:g} to {high:g}, outside {LOGVAR_RANGE}", where)


def _check_duplicates(pair: Pair, seen: dict[bytes, list[int]], shown: Shown) -> int:
    """How many samples repeat another's moments because their pictures are equal; notes the others."""
    equal = 0
    for numbers in seen.values():
        for number in numbers[1:]:
            try:
                same = torch.equal(pair.picture(numbers[0], CENTER)[0], pair.picture(number, CENTER)[0])
            except BadSample:
                same = False
            equal += same
            if not same:
                other = pair.cached.key(numbers[0])
                shown.error("duplicates", f"has the moments of {other}, whose picture is another", pair.where(number))
    return equal


def _spread(numbers: list[int], count: int) -> list[int]:
    """At most `count` of the numbers, evenly spread."""
    chosen = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    return [numbers[index] for index in dict.fromkeys(chosen.tolist())]
