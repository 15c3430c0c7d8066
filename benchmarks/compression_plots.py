"""The two pictures of benchmarks/compression.py, laid out as Figures 6 and 7 of arXiv:2112.10752."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ldm_scale.evaluation.rate_distortion import write_figure


@dataclass(frozen=True)
class Point:
    """One evaluation. Units: seconds of training steps, of one model; samples/s with the decoder."""

    factor: int
    images: int  # seen in training
    training_s: float
    steps: int  # of the sampler
    samples_per_s: float
    name: str  # of the distance
    distance: float
    low: float | None  # 95%
    high: float | None
    precision: float
    recall: float


def plot_over_training(points: Sequence[Point], path: Path) -> None:
    """Nothing; the PNG is there: distance and precision over the time of training."""
    figure, (left, middle, right) = _panels(3)
    _lines(left, points, lambda point: point.training_s / 60, "minutes of training steps")
    _lines(middle, points, lambda point: point.images, "images seen")
    _in_doublings(middle, [point.images for point in points])
    _lines(right, points, lambda point: point.training_s / 60, "minutes of training steps", of_recall=True)
    figure.suptitle(f"Equal UNets, equal time; {points[0].steps} DDIM steps; bars: 95% intervals", fontsize=10)
    write_figure(figure, path)


def plot_over_sampling(points: Sequence[Point], path: Path) -> None:
    """Nothing; the PNG is there: distance over sampling throughput, a marker for each number of steps."""
    figure, (left, right) = _panels(2)
    for axes, of_recall in ((left, False), (right, True)):
        _lines(axes, points, lambda point: point.samples_per_s, "throughput, samples/s", of_recall=of_recall)
        _in_doublings(axes, [point.samples_per_s for point in points])
        for point in points:
            where = (point.samples_per_s, point.recall if of_recall else point.distance)
            axes.annotate(str(point.steps), where, fontsize=6, xytext=(3, 3), textcoords="offset points")
    figure.suptitle("After equal training; numbers are DDIM steps", fontsize=10)
    write_figure(figure, path)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.5 * count, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count))


def _in_doublings(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis whose ticks double, written out."""
    axes.set_xscale("log")
    ticks = [2.0**power for power in range(math.floor(math.log2(min(values))), math.ceil(math.log2(max(values))) + 1)]
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()


def _lines(
    axes: Axes, points: Sequence[Point], x_of: Callable[[Point], float], label: str, of_recall: bool = False
) -> None:
    for factor in sorted({point.factor for point in points}):
        own = [point for point in points if point.factor == factor]
        x = [x_of(point) for point in own]
        name = f"LDM-{factor}" + (" (pixels)" if factor == 1 else "")
        if of_recall:
            axes.plot(x, [point.recall for point in own], marker="o", markersize=4, label=name)
            continue
        bars = [[p.distance - (p.distance if p.low is None else p.low) for p in own]]
        bars.append([(p.distance if p.high is None else p.high) - p.distance for p in own])
        axes.errorbar(x, [p.distance for p in own], yerr=bars, marker="o", markersize=4, capsize=2, label=name)
    axes.set_xlabel(label)
    axes.set_ylabel("recall" if of_recall else points[0].name)
    axes.grid(alpha=0.3)
    if of_recall:  # where lines leave room
        axes.legend(fontsize=8)
