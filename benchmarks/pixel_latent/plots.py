"""The two pictures: cost against f, and quality against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FormatStrFormatter,
    LogFormatterSciNotation,
    LogLocator,
    NullFormatter,
    NullLocator,
)

from benchmarks.pixel_latent.models import FAMILIES
from benchmarks.pixel_latent.published import CLAIM
from benchmarks.pixel_latent.steps import CACHED, ON_THE_FLY
from ldm_scale.evaluation.rate_distortion import write_figure

LINES = {
    CACHED: ("training, latents cached", "tab:blue"),
    ON_THE_FLY: ("training, encoded on the fly", "tab:orange"),
    "sample": ("sampling, 100 DDIM steps", "tab:green"),
}


def plot_cost(figures: Mapping[str, dict[str, Any]], title: str, path: Path) -> None:
    """Nothing; draws images/s over LDM-1's against f: counted for the published networks, and measured."""
    families = [
        family
        for family in FAMILIES
        if family != "inpainting" and any(entry["family"] == family for entry in figures.values())
    ]
    figure = Figure(figsize=(6 * max(1, len(families)), 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(families)), squeeze=False)[0]
    for axes, family in zip(panels, families, strict=False):
        rows = sorted((e for e in figures.values() if e["family"] == family), key=lambda entry: entry["f"])
        _draw_cost(axes, rows, FAMILIES[family])
    figure.suptitle(title, fontsize=9)
    write_figure(figure, path)


def _draw_cost(axes: Axes, rows: Sequence[dict[str, Any]], title: str) -> None:
    for mode, (label, colour) in LINES.items():
        axes.plot(
            [row["f"] for row in rows],
            [row["counted_ratio"][mode] for row in rows],
            "--",
            color=colour,
            alpha=0.6,
            label=f"{label}: counted FLOPs, published width",
        )
        found = [(row["f"], row["ratio"][mode]) for row in rows if mode in row.get("ratio", {})]
        if found:
            middle = [ratio["median"] for _, ratio in found]
            low = [ratio["median"] - ratio["lower_quartile"] for _, ratio in found]
            high = [ratio["upper_quartile"] - ratio["median"] for _, ratio in found]
            axes.errorbar(
                [f for f, _ in found], middle, yerr=[low, high], fmt="o-", color=colour, label=f"{label}: measured"
            )
    axes.plot([4], [CLAIM], "k*", markersize=10, label=f"the paper's claim for inpainting: {CLAIM}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%d"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("f: pixels a side for one latent")
    axes.set_ylabel("images/s over LDM-1's")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def plot_quality(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Nothing; draws distances against FLOPs of training and of sampling, a line for each f."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, column, what in zip(
        figure.subplots(1, 2),
        ("training_flops", "sample_flops"),
        ("FLOPs of training so far (UNet and tau_theta, latents cached)", "FLOPs of one sample, decoded"),
        strict=True,
    ):
        for f in sorted({row["f"] for row in rows}):
            line = sorted((row[column], row["distance"]) for row in rows if row["f"] == f)
            axes.plot([x for x, _ in line], [y for _, y in line], "o-", label=f"f = {f}")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(what)
        axes.set_ylabel(rows[0]["distance_name"])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    write_figure(figure, path)
