"""What happens to samples that cannot be used: another takes the place, the loss is counted and named, too many stop.

A stray bad file must not end a week's run, and a broken decoder or a wrong mount must not quietly train on what is
left. A limit on bad samples in a row separates the two: in shuffled data a share q of bad samples reaches n in a row
with probability q**n, so 20 in a row mean that nearly everything is bad.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from ldm_scale.errors import DataError

_MAX_NAMED = 100


class BadSample(Exception):
    """A sample that cannot be used; the message is the reason, worded the same for every sample with that fault."""


class BadRecord(NamedTuple):
    """A sample that was skipped. The key is the shard's stem, a slash and the sample's name."""

    key: str
    reason: str


class ConsecutiveLimit:
    """Stops a loader process after too many bad samples in a row (as that process reads them)."""

    def __init__(self, max_consecutive: int) -> None:
        self._max_consecutive = max_consecutive
        self._run: list[BadRecord] = []

    def good(self) -> None:
        """Nothing; a usable sample ends the row."""
        self._run.clear()

    def bad(self, record: BadRecord) -> None:
        """Nothing.

        Raises: DataError, with the names, when the row exceeds the limit.
        """
        self._run.append(record)
        if len(self._run) > self._max_consecutive:
            names = "; ".join(f"{key} ({reason})" for key, reason in self._run)
            raise DataError(
                f"{len(self._run)} samples in a row cannot be used (data.max_consecutive_bad={self._max_consecutive}): "
                f"{names}; repair or remove them"
            )


@dataclass
class BadSampleLog:
    """Everything that a loader skipped so far: events by reason, and the first names."""

    counts: Counter[str] = field(default_factory=Counter)  # a sample met again in a later epoch counts again
    names: dict[str, str] = field(default_factory=dict)  # key -> reason, the first hundred

    def add(self, records: list[BadRecord]) -> None:
        """Nothing; takes in what was skipped before a batch."""
        for key, reason in records:
            self.counts[reason] += 1
            if len(self.names) < _MAX_NAMED:
                self.names.setdefault(key, reason)

    def describe(self) -> str:
        """One line for people: how many of each kind, and some names; "" if nothing was skipped."""
        if not self.counts:
            return ""
        kinds = ", ".join(f"{count} x {reason}" for reason, count in self.counts.most_common())
        return f"skipped {self.counts.total()} samples ({kinds}), such as {', '.join(list(self.names)[:5])}"
