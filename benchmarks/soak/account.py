"""How much of a run's time went into training, and what each fault took of it.

Rows are what metrics.jsonl had while the run went on: when a step ended, and the images seen by then. A run that was
set back passes the same images again; only images beyond all before are new.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence

Row = tuple[float, int]  # seconds, images
LONG = 3.0  # times the usual time of its images: such an interval between two steps is not ordinary training


def image_seconds(rows: Sequence[Row]) -> float:
    """The usual time of one image: the median over all intervals between two steps that bring new images.

    Raises: ValueError if there is no such interval.
    """
    found = [seconds / new for _, seconds, new in _intervals(rows) if new > 0]
    if not found:
        raise ValueError(f"{len(rows)} steps were seen, and two are needed; let the run go on for longer")
    return statistics.median(found)


def effective_share(rows: Sequence[Row], skipped_images: int = 0) -> float:
    """Effective training time: the usual time of all images that count, over the time from first to last step.

    Images of skipped steps were seen and have trained nothing.
    """
    (first_s, first), (last_s, last) = rows[0], rows[-1]
    return (last - first - skipped_images) * image_seconds(rows) / (last_s - first_s)


def lost_seconds(rows: Sequence[Row], faults_s: Sequence[float]) -> list[float]:
    """The time lost before the first fault, and from each fault to the next (for ever after the last).

    An interval between two steps that brings no new image, or lasts LONG times as long as usual, is lost, but for
    the usual time of its new images: steps made again, the way down, the wait, the start. It belongs to the last fault
    before its end.
    """
    usual_s = image_seconds(rows)
    lost = [0.0] * (len(faults_s) + 1)
    for end_s, seconds, new in _intervals(rows):
        if seconds > LONG * new * usual_s:
            lost[sum(at_s <= end_s for at_s in faults_s)] += seconds - new * usual_s
    return lost


def _intervals(rows: Sequence[Row]) -> Iterator[tuple[float, float, int]]:
    """End, duration and number of new images of each interval between two steps."""
    highest = rows[0][1] if rows else 0
    for (begin_s, _), (end_s, images) in itertools.pairwise(rows):
        yield end_s, end_s - begin_s, max(0, images - highest)
        highest = max(highest, images)
