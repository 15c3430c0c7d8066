"""What happens to samples that cannot be used: another takes the place, the loss is counted and named, too many stop.

A stray bad file must not end a week's run, and a broken decoder or a wrong mount must not quietly train on what is
left. Three limits separate the two. Bad samples in a row: in shuffled data a share q of bad samples reaches n in a row
with probability q**n, so 20 in a row mean that nearly everything is bad. A share of one shard: from the batches on
that no process has begun when it is found, the shard is in quarantine and none of its samples is tried again. A share
of the run: it stops, with the list.

All of it is a function of the positions seen, so that ranks that know of the same losses decide alike.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_scale.errors import DataError
from ldm_scale.telemetry.side_files import RowFile, read_rows

_MAX_NAMED = 100
_FEWEST_OF_A_RUN, _FEWEST_OF_A_SHARD = 20, 2  # bad samples up to which a share of them says nothing


class BadSample(Exception):
    """A sample that cannot be used; the message is the reason, worded the same for every sample with that fault."""


class InQuarantine(BadSample):
    """A sample of a shard that is in quarantine."""


class BadRecord(NamedTuple):
    """A sample that cannot be used. The key is the shard's stem, a slash and the sample's name."""

    key: str
    reason: str


class SkippedSample(NamedTuple):
    """A sample that was skipped in training; its key as above."""

    key: str
    reason: str
    shard: str = ""  # public name of its shard
    shard_number: int = -1  # in its split
    position: int = -1  # in the training stream; -1 of one that was tried in the place of another
    substitute: str = ""  # key of the sample that took its place


class ConsecutiveLimit:
    """Stops a loader process after too many bad samples in a row (as that process reads them)."""

    def __init__(self, max_consecutive: int) -> None:
        self._max_consecutive = max_consecutive
        self._run: list[SkippedSample] = []

    def good(self) -> None:
        """Nothing; a usable sample ends the row."""
        self._run.clear()

    def bad(self, record: SkippedSample) -> None:
        """Nothing.

        Raises: DataError, with the names, when the row exceeds the limit.
        """
        self._run.append(record)
        if len(self._run) > self._max_consecutive:
            names = "; ".join(f"{record.key} ({record.reason})" for record in self._run)
            where = f" in {record.shard}" if len({bad.shard for bad in self._run}) == 1 and record.shard else ""
            raise DataError(
                f"{len(self._run)} samples in a row{where} cannot be used "
                f"(data.max_consecutive_bad={self._max_consecutive}): {names}; repair or remove them"
            )


class Quarantine:
    """From which position on each shard's samples count as bad; shared with processes that are forked later."""

    def __init__(self, num_shards: int) -> None:
        # Anonymous shared memory: one page per 512 shards that are touched, gone with the last process.
        self._first_bad = np.frombuffer(mmap.mmap(-1, 8 * max(1, num_shards)), dtype=np.int64)

    def add(self, shard_number: int, position: int) -> None:
        """Nothing; samples of the shard are bad at this position and after it."""
        self._first_bad[shard_number] = position + 1  # 0: not in quarantine

    def holds(self, shard_number: int, position: int) -> bool:
        """Whether the shard is in quarantine at this position."""
        return bool(0 < self._first_bad[shard_number] <= position + 1)

    def check(self, shard_number: int, position: int) -> None:
        """Nothing.

        Raises: InQuarantine if the shard is in quarantine at this position.
        """
        if self.holds(shard_number, position):
            raise InQuarantine("its shard is in quarantine")


@dataclass
class BadSampleLog:
    """Everything that a loader skipped so far: events by reason, and the first names."""

    counts: Counter[str] = field(default_factory=Counter)  # a sample met again in a later epoch counts again
    names: dict[str, str] = field(default_factory=dict)  # key -> reason, the first hundred

    def add(self, records: Iterable[BadRecord | SkippedSample]) -> None:
        """Nothing; takes in what was skipped before a batch."""
        for record in records:
            self.counts[record.reason] += 1
            if len(self.names) < _MAX_NAMED:
                self.names.setdefault(record.key, record.reason)

    def describe(self) -> str:
        """One line for people: how many of each kind, and some names; "" if nothing was skipped."""
        if not self.counts:
            return ""
        kinds = ", ".join(f"{count} x {reason}" for reason, count in self.counts.most_common())
        return f"skipped {self.counts.total()} samples ({kinds}), such as {', '.join(list(self.names)[:5])}"


@dataclass(frozen=True)
class Budgets:
    """How much may be bad."""

    max_share_of_shard: float  # of a shard's samples; beyond it the shard is in quarantine
    max_share_of_run: float  # of the images seen; beyond it the run stops


@dataclass
class LossAccount:
    """What a run has lost so far: a few numbers per shard with losses, the same on all ranks; part of its state."""

    total: int = 0  # places of the stream that another sample took
    by_shard: dict[str, list[int]] = field(default_factory=dict)  # shard number -> epoch, its bad samples in it
    quarantined: dict[str, int] = field(default_factory=dict)  # shard number -> first position of its quarantine

    def add(self, records: Iterable[SkippedSample], epoch_samples: int) -> None:
        """Nothing; takes in what all ranks skipped in a step of a stream with epochs of so many samples."""
        for record in records:
            if record.position < 0:
                continue
            self.total += 1
            if record.shard_number < 0:
                continue  # without a manifest nobody knows its share of the shard
            number, epoch = str(record.shard_number), record.position // epoch_samples
            if number not in self.quarantined:
                known = self.by_shard.get(number, [epoch, 0])
                self.by_shard[number] = [epoch, known[1] + 1 if known[0] == epoch else 1]

    def beyond(self, sizes: Any, budgets: Budgets) -> list[int]:
        """Shards that exceed their budget and are not in quarantine yet; `sizes[n]` are the samples of shard n."""
        return [
            int(number)
            for number, (_, bad) in self.by_shard.items()
            if number not in self.quarantined
            and bad > max(_FEWEST_OF_A_SHARD, budgets.max_share_of_shard * int(sizes[int(number)]))
        ]

    def check(self, images: int, budgets: Budgets, log: BadSampleLog) -> None:
        """Nothing.

        Raises: DataError, with names, if too much of the run is bad.
        """
        if self.total > max(_FEWEST_OF_A_RUN, budgets.max_share_of_run * images):
            raise DataError(
                f"{self.total} of {images} images could not be used, more than "
                f"data.max_bad_share={budgets.max_share_of_run:g} of them: {log.describe()}; all are listed in "
                "bad_samples.jsonl of the run: repair or remove them, or raise the limit"
            )


class BadSampleFiles:
    """`bad_samples.jsonl`, every bad sample once, and `substitutions.jsonl`, every place that one left, of a run."""

    def __init__(self, run_dir: Path) -> None:
        self._samples, self._places = RowFile(run_dir / "bad_samples.jsonl"), RowFile(run_dir / "substitutions.jsonl")
        for file in (self._samples, self._places):
            file.cut()
        self._known_keys = _known(self._samples.path, "shard", "key")
        self._known_places = _known(self._places.path, "position", "key")

    def add(self, records: Iterable[SkippedSample]) -> None:
        """Nothing; what is not listed yet is. A run that was resumed passes some positions again."""
        samples, places = [], []
        for record in sorted(records, key=lambda record: record.position):
            if (record.shard, record.key) not in self._known_keys:
                self._known_keys.add((record.shard, record.key))
                samples.append({"shard": record.shard, "key": record.key, "reason": record.reason})
            if record.position >= 0 and (record.position, record.key) not in self._known_places:
                self._known_places.add((record.position, record.key))
                places.append({"position": record.position, "key": record.key, "substitute": record.substitute})
        self._samples.append(*samples)
        self._places.append(*places)


def _known(path: Path, *names: str) -> set[tuple[Any, ...]]:
    """These values of all rows that have them."""
    known: set[tuple[Any, ...]] = set()
    read_rows(path, lambda row: known.add(tuple(row[name] for name in names)))
    return known
