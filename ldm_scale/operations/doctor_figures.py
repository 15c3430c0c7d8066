"""The figures of a split's usable samples, in columns of some 90 bytes a sample: sizes, captions, pictures alike."""

from __future__ import annotations

from array import array
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ldm_scale.data import Dataset
from ldm_scale.operations.doctor_duplicates import MAX_BITS, NUM_COLOURS, Groups, find_groups
from ldm_scale.operations.doctor_report import Report

if TYPE_CHECKING:
    from ldm_scale.operations.doctor_samples import Seen

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)  # percent
MAX_GROUPS, MAX_OF_GROUP = 10, 8  # groups of alike pictures by name, and keys of each


class Figures:
    """Columns over the usable samples; a caption that is missing or empty has length 0."""

    def __init__(self, dataset: Dataset, resolution: int) -> None:
        self._dataset, self._resolution = dataset, resolution
        self._numbers, self._bits = array("q"), array("Q")
        self._integers = array("i")  # width, height, characters, words
        self._colours = bytearray()

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, sample: Seen) -> None:
        """Nothing; takes a usable sample in."""
        self._numbers.append(sample.number)
        caption = sample.caption or ""
        self._integers.extend((*sample.size, len(caption), len(caption.split())))
        self._bits.append(sample.fingerprint.bits)
        self._colours += sample.fingerprint.colours

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The samples' numbers in the data set."""
        return np.frombuffer(self._numbers, dtype=np.int64)

    @property
    def widths(self) -> NDArray[np.int32]:
        """Pixels, upright."""
        return self._column(0)

    @property
    def heights(self) -> NDArray[np.int32]:
        """Pixels, upright."""
        return self._column(1)

    @property
    def aspects(self) -> NDArray[np.float64]:
        """Width by height."""
        return self.widths / self.heights

    @property
    def characters(self) -> NDArray[np.int32]:
        """Lengths of the captions that are there and not empty."""
        found = self._column(2)
        return found[found > 0]

    @property
    def words(self) -> NDArray[np.int32]:
        """The same in words, which white space parts."""
        return self._column(3)[self._column(2) > 0]

    def _column(self, column: int) -> NDArray[np.int32]:
        return np.frombuffer(self._integers, dtype=np.int32).reshape(-1, 4)[:, column]

    @cached_property
    def num_small(self) -> int:
        """Pictures that training would enlarge: to its resolution, or to the size of their bucket."""
        parts = self._dataset.parts
        wanted = np.array([part.size or (self._resolution, self._resolution) for part in parts])
        ends = np.cumsum([part.num_samples for part in parts])
        heights, widths = wanted[np.searchsorted(ends, self.numbers, side="right")].T
        return int(((self.widths < widths) | (self.heights < heights)).sum())

    @cached_property
    def groups(self) -> Groups:
        """Pictures that look alike; no more is added."""
        colours = np.frombuffer(bytes(self._colours), dtype=np.uint8).reshape(-1, NUM_COLOURS)
        return find_groups(np.frombuffer(self._bits, dtype=np.uint64), colours)

    def keys_of(self, rows: list[int]) -> list[str]:
        """The keys of some rows."""
        return [self._dataset.key(number) for number in self.numbers[rows].tolist()]

    def judge(self, report: Report, label: str) -> None:
        """Nothing; the report says what was found."""
        self._judge_sizes(report, label)
        if len(self.characters):
            low, middle, high = np.percentile(self.characters, (5, 50, 95)).round().astype(int)
            words = np.percentile(self.words, (5, 50, 95)).round().astype(int).tolist()
            report.ok(
                f"captions have {middle} characters in the median, {low} to {high} in 90%; {words[1]} words, "
                f"{words[0]} to {words[2]}",
                label,
            )
        self._judge_groups(report, label)

    def _judge_sizes(self, report: Report, label: str) -> None:
        sides = np.minimum(self.widths, self.heights)
        spread = f"shorter sides {sides.min()} to {sides.max()} px, median {np.median(sides):.0f}"
        sized = self._dataset.parts[0].size is not None
        goal = "their buckets" if sized else f"{self._resolution} px"
        if self.num_small:
            report.warning(
                f"{self.num_small} of {len(self)} pictures ({self.num_small / len(self):.1%}) are smaller than {goal} "
                f"and would be enlarged; {spread}",
                label,
                "leave them out (`ldm-scale prepare filter --min-side`) or train at a lower resolution",
            )
        else:
            report.ok(f"no picture is smaller than {goal}; {spread}", label)
        low, middle, high = np.percentile(self.aspects, (5, 50, 95))
        shapes = self._shapes()
        report.ok(
            f"aspect ratios (width by height) {middle:.2f} in the median, {low:.2f} to {high:.2f} in 90%; "
            + ", ".join(f"{count / len(self):.0%} {name}" for name, count in shapes.items()),
            label,
        )

    def _shapes(self) -> dict[str, int]:
        widths, heights = self.widths, self.heights
        counts = (widths > heights).sum(), (widths == heights).sum(), (widths < heights).sum()
        return dict(zip(("landscape", "square", "portrait"), map(int, counts), strict=True))

    def _judge_groups(self, report: Report, label: str) -> None:
        rows, complete = self.groups
        if rows:
            names = self.keys_of(rows[0][:3])
            more = f" and {len(rows[0]) - 3} more" if len(rows[0]) > 3 else ""
            report.warning(
                f"{sum(map(len, rows))} of {len(self)} pictures look like another of them, in {len(rows)} groups "
                f"(hashes within {MAX_BITS} of 64 bits); the largest: {', '.join(names)}{more}",
                label,
                "look at them (--sheet) and leave some out, or let them count as often",
            )
        else:
            report.ok(f"no two pictures look alike (hashes within {MAX_BITS} of 64 bits)", label)
        if not complete:
            report.warning("so many pictures have nearly one hash that not all of them were compared", label)

    def facts(self) -> dict[str, Any]:
        """The figures as JSON values."""
        sides = np.minimum(self.widths, self.heights)
        rows, complete = self.groups
        return {
            "shorter_side_percentiles_px": _percentiles(sides),
            "width_percentiles_px": _percentiles(self.widths),
            "height_percentiles_px": _percentiles(self.heights),
            "aspect_percentiles": _percentiles(self.aspects, 3),
            "shapes": self._shapes(),
            "smaller_than_resolution": self.num_small,
            "caption_characters_percentiles": _percentiles(self.characters),
            "caption_words_percentiles": _percentiles(self.words),
            "look_alike": {
                "max_bits": MAX_BITS,
                "groups": len(rows),
                "pictures": sum(map(len, rows)),
                "complete": complete,
                "largest": [
                    {"pictures": len(group), "keys": self.keys_of(group[:MAX_OF_GROUP])} for group in rows[:MAX_GROUPS]
                ],
            },
        }


def _percentiles(values: NDArray[Any], digits: int = 1) -> dict[str, float]:
    """Percent -> value; empty where there is none."""
    found = np.percentile(values, QUANTILES).round(digits).tolist() if len(values) else []
    return dict(zip(map(str, QUANTILES), found, strict=False))
