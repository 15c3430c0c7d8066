"""`prepare filter`: samples left out by rules on picture, scores and caption; the tars stay as they are."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_scale.data.metadata import read_captions, read_metadata
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import RawSample
from ldm_scale.data.sidecar import IndexedSample
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

_TEXTS = ("json", "txt")
_MAX_TEXT = 1 << 24  # bytes of a .json or .txt that is looked at


@dataclass(frozen=True)
class Rules:
    """What a sample must meet; None where anything does."""

    min_side: int | None = None  # pixels of the shorter side
    max_side: int | None = None  # pixels of the longer side
    min_pixels: int | None = None
    max_aspect: float | None = None  # longer side by shorter
    min_caption_length: int | None = None  # characters of its shortest caption, since any may be drawn
    min_score: tuple[tuple[str, float], ...] = ()  # name in the sample's json, least value
    max_score: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Raises: DataError if nothing is asked for."""
        if all(value in (None, ()) for value in asdict(self).values()):
            raise DataError("no rule is given, so nothing would be left out; see `ldm-scale prepare filter --help`")

    def broken(self, sample: IndexedSample, shard: ShardPart) -> str | None:
        """The first rule that a sample breaks, None if it may stay.

        Raises: DataError if the tar cannot be read.
        """
        try:
            return self._broken_size(sample, shard) or self._broken_text(sample, shard)
        except BadSample as fault:
            return str(fault)

    def _broken_size(self, sample: IndexedSample, shard: ShardPart) -> str | None:
        if (self.min_side, self.max_side, self.min_pixels, self.max_aspect) == (None, None, None, None):
            return None
        shorter, longer = sorted(size_of(sample, shard))
        if self.min_side is not None and shorter < self.min_side:
            return f"shorter side below {self.min_side} pixels"
        if self.max_side is not None and longer > self.max_side:
            return f"longer side above {self.max_side} pixels"
        if self.min_pixels is not None and shorter * longer < self.min_pixels:
            return f"fewer than {self.min_pixels} pixels"
        if self.max_aspect is not None and longer > self.max_aspect * shorter:
            return f"aspect ratio above {self.max_aspect:g}"
        return None

    def _broken_text(self, sample: IndexedSample, shard: ShardPart) -> str | None:
        if self.min_caption_length is None and not self.min_score and not self.max_score:
            return None
        raw: RawSample = {}
        for kind in _TEXTS:
            member = sample.members.get(kind)
            if member is not None:
                if member.size > _MAX_TEXT:
                    raise BadSample(f".{kind} of more than {_MAX_TEXT} bytes")
                raw[kind] = shard.window.read(member.offset, member.offset + member.size)
        metadata = read_metadata(raw)
        for name, limit in self.min_score:
            if _score(metadata, name) < limit:
                return f"{name} below {limit:g}"
        for name, limit in self.max_score:
            if _score(metadata, name) > limit:
                return f"{name} above {limit:g}"
        least = self.min_caption_length
        if least is not None and min(map(len, read_captions(raw, metadata))) < least:
            return f"caption of fewer than {least} characters"
        return None


def _score(metadata: dict[str, Any], name: str) -> float:
    """A number of a sample's json.

    Raises: BadSample if there is none.
    """
    value = metadata.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise BadSample(f"no number {name!r} in its json")
    return value


@dataclass(frozen=True)
class _Job:
    shard: ShardPart
    rules: Rules
    sidecar: Path
    out: Path


def filter_manifest(
    path: Path, out: Path, rules: Rules, splits: list[str] | None = None, workers: int | None = None
) -> Prepared:
    """The manifest at `out` of those samples that meet the rules; "left_out" counts the others by rule.

    `splits`: those that it will have, all if None.

    Raises: DataError if the manifest or a shard cannot be read, or a split would be empty.
    """
    source = Source.open(path)
    chosen = source.splits(splits)
    request = {
        "source": "filter",
        "manifest": Path(os.path.relpath(source.path.resolve(), out.resolve().parent)).as_posix(),
        "splits": chosen,
        "rules": _listed(rules),
    }
    check_out(source, out, request)
    plan = [(split, number, shards) for split in chosen for number, (_, shards) in enumerate(source.parts(split))]

    def jobs() -> Iterator[_Job]:
        for split, number, shards in plan:
            for shard in shards:
                folders = (split, str(number)) if len(source.parts(split)) > 1 else (split,)
                yield _Job(shard, rules, new_sidecar(out, shard, *folders), out)

    total = sum(len(shards) for _, _, shards in plan)
    results = map_shards(_filter_one, jobs(), total, workers, "filter", lambda found: 0)
    left_out: Counter[str] = Counter()
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in chosen}
    for split, number, shards in plan:
        rows = []
        for _ in shards:
            row, counts = next(results)
            left_out.update(counts)
            if row["num_samples"]:
                rows.append(row)
        if rows:
            said = source.parts(split)[number][0]
            entries[split].append({**said, "num_samples": sum(row["num_samples"] for row in rows), "shards": rows})
    next(results, None)  # ends the progress bar and the processes
    written: dict[str, Any] = {}
    for split, parts in entries.items():
        if not parts:
            raise DataError(
                f"{source.path}: no sample of split {split!r} meets the rules ({_told(left_out)}); ease them"
            )
        bucketed = "size" in parts[0]
        written[split] = (
            {"num_samples": sum(part["num_samples"] for part in parts), "parts": parts} if bucketed else parts[0]
        )
    return source.publish(out, request, written, left_out=dict(sorted(left_out.items())))


def _filter_one(job: _Job) -> tuple[dict[str, Any], dict[str, int]]:
    """The new manifest's entry of a shard, and how many samples broke which rule first."""
    choice = {"rules": _listed(job.rules), "of": identity(job.shard)}
    chosen = find_chosen(job.sidecar, choice)
    if chosen is None:
        sidecar, left_out = job.shard.sidecar, Counter[str]()
        rows = []
        for row in range(len(sidecar)):
            broken = job.rules.broken(sidecar.sample(row), job.shard)
            if broken is None:
                rows.append(row)
            else:
                left_out[broken] += 1
        chosen = write_chosen(
            job.sidecar, sidecar, np.array(rows, dtype=np.int64), choice, left_out=dict(sorted(left_out.items()))
        )
    return chosen_row(job.shard, job.sidecar, chosen, job.out), chosen.extra["left_out"]


def _listed(rules: Rules) -> dict[str, Any]:
    """The rules that are set, as JSON has them."""
    listed = {name: value for name, value in asdict(rules).items() if value not in (None, ())}
    return {name: dict(value) if isinstance(value, tuple) else value for name, value in listed.items()}


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in counts.most_common(5))
