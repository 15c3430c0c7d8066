"""Existing webdataset tars (img2dataset's or any others) as they are: indexed, checksummed, listed; never rewritten.

What a tar holds that cannot be used is left out of the index and listed in `bad_samples.jsonl`; a tar with too much of
it is left out whole. Sidecars lie beside the manifest, since shards may be remote, read-only or shared. Each is written
when its tar was read, so that a run that was killed goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_scale.data.indexing import partial_name, write_json
from ldm_scale.data.manifest import FORMAT, VERSION, read_manifest
from ldm_scale.data.sidecar import open_sidecar
from ldm_scale.data.sources import Prepared
from ldm_scale.data.sources.class_lists import Classes
from ldm_scale.data.sources.tar_index import Indexed, Job, index_one, sidecar_name
from ldm_scale.data.sources.workers import map_shards
from ldm_scale.data.storage import expand
from ldm_scale.data.urls import local_path, public_name, shard_stem
from ldm_scale.errors import DataError

BAD_SAMPLES_NAME = "bad_samples.jsonl"

_MAX_NAMED = 10
_QUARANTINED = "quarantined"  # entry of a split: tars that were left out whole


@dataclass(frozen=True)
class IndexOptions:
    """How tars are indexed."""

    workers: int | None = None  # processes; None = one per core
    checksums: bool | None = None  # read every byte; None = of local files
    max_bad: float = 0.5  # share of a shard's samples that may be unusable; beyond it the shard is left out
    max_bad_total: float = 0.1  # share of all samples that may be left out


def index_tars(
    shards: Sequence[Path | str],
    manifest_path: Path,
    split: str,
    object_classes: Sequence[str] = (),
    map_labels: Sequence[str] = (),
    options: IndexOptions | None = None,
) -> Prepared:
    """The manifest with this split of these shards; a split of other shards in an existing manifest stays.

    `shards` are paths, URLs and patterns. `object_classes` and `map_labels` are the names that boxes and label maps in
    the shards refer to.

    Raises: DataError if a shard cannot be read, two have one name, too much is unusable, or the manifest already has
    this split from other shards.
    """
    options = options or IndexOptions()
    base = manifest_path.resolve().parent
    names = sorted(expand([str(shard) for shard in shards]))
    # Without signatures: who signs the URLs again asks for the same.
    request = {"shards": [public_name(_place(name, base)) for name in names]}
    existing = read_manifest(manifest_path) if manifest_path.exists() else None
    if existing and existing.get("request", {}).get("source") != "index":
        raise DataError(
            f"{manifest_path}: not made by `ldm-scale prepare index`, so it stays as it is; choose another --out"
        )
    lists = _lists(existing, manifest_path, object_classes=object_classes, map_labels=map_labels)
    others = {key: value for key, value in existing["splits"].items() if key != split} if existing else {}
    known = existing["request"]["splits"] if existing else {}
    if known.get(split, request) != request:
        raise DataError(
            f"{manifest_path}: already has a split {split!r}, of {len(known[split]['shards'])} shards "
            f"{', '.join(known[split]['shards'][:3])}..., and now {len(names)} shards "
            f"{', '.join(request['shards'][:3])}... are given; choose another --split or --out, or remove the manifest"
        )
    _check_names(names, others)
    base.mkdir(parents=True, exist_ok=True)
    classes = Classes(existing["classes"] if existing else [])
    entry, reused = _index(names, manifest_path, options, classes)
    splits = {**others, split: entry}
    left_out = _write_bad_samples(splits, base)
    _check_bad(entry, base, options)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "name": existing["name"] if existing else base.name,
        "resolution": None,
        "classes": classes.names(),
        **lists,
        "license": None,
        "attribution": None,
        "left_out": left_out,
        "request": {"source": "index", "splits": {**known, split: request}},
        "splits": splits,
    }
    if reused and manifest == existing:
        return Prepared(manifest_path, manifest, reused=True)
    write_json(manifest_path, manifest)
    return Prepared(manifest_path, manifest, reused=False)


def _index(
    names: list[str], manifest_path: Path, options: IndexOptions, classes: Classes
) -> tuple[dict[str, Any], bool]:
    """The manifest's entry of a split, and whether all sidecars were there; `classes` takes in those that occur."""
    base = manifest_path.resolve().parent
    jobs = [Job(name, _sidecar(name, manifest_path), options.checksums) for name in names]
    rows: list[dict[str, Any]] = []
    quarantined: list[dict[str, Any]] = []
    reused = True
    results = map_shards(index_one, jobs, len(jobs), options.workers, "index", lambda found: found.num_bytes)
    for job, found in zip(jobs, results, strict=True):
        reused &= found.reused
        row = _row(job, found, base)
        if found.num_samples == 0 or found.num_bad > options.max_bad * (found.num_samples + found.num_bad):
            quarantined.append(row)
            continue
        classes.merge(public_name(job.name), found.classes)
        rows.append(row)
    entry: dict[str, Any] = {"num_samples": sum(row["num_samples"] for row in rows), "shards": rows}
    return entry | ({_QUARANTINED: quarantined} if quarantined else {}), reused


def _row(job: Job, found: Indexed, base: Path) -> dict[str, Any]:
    """A shard as the manifest lists it."""
    row = {
        "file": _place(job.name, base),
        "num_samples": found.num_samples,
        "keys": found.keys,
        "bytes": found.num_bytes,
        "sha256": found.sha256,
        "index": Path(os.path.relpath(job.sidecar, base)).as_posix(),
        "bad": found.num_bad,
    }
    return {key: value for key, value in row.items() if value is not None and (key, value) != ("bad", 0)}


def _sidecar(name: str, manifest_path: Path) -> Path:
    """Where the sidecar of a shard lies: beside it if the manifest does too."""
    base, path = manifest_path.resolve().parent, local_path(name)
    is_beside = path is not None and Path(path).resolve().parent == base
    return (base if is_beside else base / f"{manifest_path.stem}.index") / sidecar_name(name)


def _place(name: str, base: Path) -> str:
    """A shard as the manifest names it: a path relative to the manifest's folder, or a URL."""
    path = local_path(name)
    return name if path is None else Path(os.path.relpath(Path(path).resolve(), base)).as_posix()


def _check_names(names: list[str], others: dict[str, Any]) -> None:
    """Returns if keys are unique among these shards and those of other splits."""
    taken = {
        shard_stem(shard["file"])
        for entry in others.values()
        for shard in [*entry["shards"], *entry.get(_QUARANTINED, [])]
    }
    for name in names:
        stem = shard_stem(name)
        if stem in taken:
            raise DataError(
                f"{public_name(name)}: a second shard with the name {stem}; keys would repeat, so rename one"
            )
        taken.add(stem)


def _write_bad_samples(splits: dict[str, Any], base: Path) -> dict[str, int]:
    """How many were left out for each reason; all of them are listed in a file beside the manifest.

    That file goes on listing what manifests of other shards in this folder left out.
    """
    counts: Counter[str] = Counter()
    rows = [row for entry in splits.values() for row in [*entry["shards"], *entry.get(_QUARANTINED, [])]]
    ours = {public_name(row["file"]) for row in rows}
    path = base / BAD_SAMPLES_NAME
    partial = partial_name(path)
    with partial.open("w", encoding="utf-8") as stream:
        for row in rows:
            for key, reason in open_sidecar(base / row["index"]).bad if row.get("bad") else ():
                counts[reason] += 1
                record = {"shard": public_name(row["file"]), "key": key, "reason": reason}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        if path.exists():
            with path.open(encoding="utf-8", errors="replace") as lines:
                stream.writelines(line for line in lines if not _is_of(line, ours))
        written = stream.tell()
    if written or path.exists():
        os.replace(partial, path)
    else:
        partial.unlink()
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _is_of(line: str, shards: set[str]) -> bool:
    """Whether a line of the list is about one of these shards, or about nothing."""
    try:
        return json.loads(line)["shard"] in shards
    except (ValueError, TypeError, KeyError):
        return True


def _check_bad(entry: dict[str, Any], base: Path, options: IndexOptions) -> None:
    """Returns if little enough is left out of a split.

    Raises: DataError with the shards that lost most.
    """
    rows, quarantined = entry["shards"], entry.get(_QUARANTINED, [])
    bad = sum(row.get("bad", 0) for row in [*rows, *quarantined]) + sum(row["num_samples"] for row in quarantined)
    total = bad + entry["num_samples"]
    if rows and bad <= options.max_bad_total * total:
        return
    losses = sorted([*quarantined, *(row for row in rows if row.get("bad"))], key=lambda row: -row.get("bad", 0))
    named = []
    for row in losses[:_MAX_NAMED]:
        reasons = Counter(record.reason for record in open_sidecar(base / row["index"]).bad).most_common(3)
        counted = ", ".join(f"{number} x {reason}" for reason, number in reasons) or "none of its members is a sample"
        named.append(f"{public_name(row['file'])} ({counted})")
    what = f"{bad} of {total} samples" if rows else "all shards"
    fix = (
        f"repair or remove the shards, or raise --max-bad-total (now {options.max_bad_total:g})"
        if rows
        else ("name webdataset tars with images, or raise --max-bad")
    )
    raise DataError(f"{what} cannot be used: {'; '.join(named)}; {fix}; all are listed in {base / BAD_SAMPLES_NAME}")


def _lists(existing: dict[str, Any] | None, manifest_path: Path, **given: Sequence[str]) -> dict[str, list[str]]:
    """The lists of names for the manifest.

    Raises: DataError if it exists and has others.
    """
    if existing is None:
        return {key: list(names) for key, names in given.items() if names}
    for key, names in given.items():
        if names and list(names) != existing.get(key):
            raise DataError(
                f"{manifest_path}: its {key} are not those of --{key.replace('_', '-')}; give the same list, or remove "
                "the manifest and index all its splits anew"
            )
    return {key: existing[key] for key in given if key in existing}
