"""The one harness of the benchmarks that compare ways of doing the same thing, in one process on one machine.

Ways take turns: every round times each of them once, and the order is reversed from round to round, so that whatever
else the machine does for a while hits all of them, and none always follows the same one. The first rounds warm up and
count for nothing. What is compared are ratios within rounds, never medians of different moments; a ratio comes with its
quartiles and the range that holds its median at 95%.

A way whose result is not the baseline's gets no speed-up: `speed_up` wants to know by how much they differ, and
`are_same` says why nothing is timed. A difference that is not a number refuses as well.

What was measured on, the clock, trials and the result file are in `measured.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from benchmarks.measured import spread


@dataclass(frozen=True)
class Way:
    """What is timed, and what is done around it and not timed."""

    run: Callable[[], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    times_itself: bool = False  # `run` returns its seconds, of which it may leave out some


@dataclass(frozen=True)
class Turns:
    """Seconds of every way, one value a round."""

    seconds: dict[str, list[float]]

    def spreads(self) -> dict[str, dict[str, float]]:
        """Of each way's seconds."""
        return {name: spread(values) for name, values in self.seconds.items()}

    def ratios(self, way: str, base: str) -> list[float]:
        """A way's seconds over another's in the same round."""
        return [a / b for a, b in zip(self.seconds[way], self.seconds[base], strict=True)]


def take_turns(
    ways: Mapping[str, Way],
    rounds: int,
    *,
    warmup: int,
    clock: Callable[[], float],
    name: str,
    unit: str = "round",
    shows: bool = True,
) -> Turns:
    """Seconds of the ways, each run once in every round; the order is reversed in every other one.

    `warmup` rounds come before and are not in the result. `unit` is what the progress bar counts; `shows`: whether
    there is one.
    Collective: all ranks, where a way is.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in tqdm(range(warmup + rounds), desc=name, unit=unit, mininterval=1.0, disable=not shows):
        for label, way in list(ways.items())[:: -1 if turn % 2 else 1]:
            with way.around():
                begin_s = clock()
                own_s = way.run()
                spent_s = clock() - begin_s
            if turn >= warmup:
                seconds[label].append(own_s if way.times_itself else spent_s)
    return Turns(seconds)


def median_range(values: Sequence[float]) -> tuple[float, float]:
    """What holds the median of all such values at 95%, whatever their distribution: two of the sorted values.

    Fewer than six values cannot hold it as surely: their extremes.
    """
    ordered, half_width = sorted(values), 0.98 * math.sqrt(len(values))  # 1.96 deviations of a fair coin's count
    low, high = math.floor(len(ordered) / 2 - half_width), math.ceil(len(ordered) / 2 + half_width)
    return ordered[max(0, low)], ordered[min(len(ordered) - 1, high)]


def are_same(name: str, differences: Mapping[str, float], tolerance: float) -> bool:
    """Whether nothing differs by more than the tolerance; says on stderr what does. NaN does."""
    if all(difference <= tolerance for difference in differences.values()):
        return True
    listed = " and ".join(f"{what} differ by {difference:.1e}" for what, difference in differences.items())
    print(f"{name}: {listed} of their norms (allowed {tolerance:.0e}); no speed is measured", file=sys.stderr)
    return False


def speed_up(turns: Turns, way: str, base: str, difference: float, tolerance: float) -> dict[str, Any]:
    """How many times as fast as the base a way is, by rounds; without that figure if their results differ."""
    found: dict[str, Any] = {"difference": difference, "allowed": tolerance}
    if not difference <= tolerance:  # written so that a NaN refuses too
        return found | {"refused": "computes something else than the baseline"}
    ratios = turns.ratios(base, way)
    return found | {"speed_up": spread(ratios), "speed_up_median_range": list(median_range(ratios))}
