"""Quality against cost over guidance scales, numbers of steps and averages of the weights, as rows, CSV and a plot.

The plot is laid out as Figure 7 of arXiv:2112.10752: sampling throughput along x, the distance along y, a line for each
model (here: weights and guidance scale) with a marker for each number of steps.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_scale.engine.tensor_file import replace_file
from ldm_scale.evaluation.rate_distortion import write_figure
from ldm_scale.evaluation.results import Result, require_one_protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURES = (
    "frechet",
    "kernel",
    "precision",
    "recall",
    "density",
    "coverage",
    "inception_score",
    "clip_score",
)
_MARKERS = "osD^vP*X<>"


def sweep_rows(documents: Sequence[dict[str, Any]], sources: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each result document: how it was sampled, how fast, and figures with intervals (None if absent).

    Raises: ConfigError if they were measured under different protocols.
    """
    require_one_protocol(
        [
            Result(source, document["model"], document["protocol"], document["figures"], document["format"])
            for source, document in zip(sources, documents, strict=True)
        ]
    )
    rows = []
    for source, document in zip(sources, documents, strict=True):
        model, machine, samples = document["model"], document["machine"], document["figures"]["samples"]
        row = {
            "weights": model["weights"],
            **{name: model["sampling"][name] for name in ("guidance_scale", "num_steps", "sampler", "eta")},
            "sampling_images_per_s": machine["sampling_images_per_s"],
            "device": machine["device"],
            "num_images": document["protocol"]["samples"]["num_samples"],
        }
        for name in FIGURES:
            found = samples.get(name, {})
            interval = found.get("interval") or {}
            row |= {name: found.get("value"), f"{name}_low": interval.get("low"), f"{name}_high": interval.get("high")}
        rows.append(row | {"content_sha256": model["content_sha256"], "result": source})
    return rows


def names_of(documents: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What figures are called, by their columns."""
    return {name: found["name"] for name, found in documents[0]["figures"]["samples"].items()}


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Nothing; the file is there whole, or as it was."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue())


def sweep_table(rows: Sequence[dict[str, Any]], names: dict[str, str]) -> str:
    """The rows for people, best distance first."""
    lines = [["weights", "guidance", "steps", "images/s", names["frechet"], "precision", "recall"]]
    for row in sorted(rows, key=lambda row: math.inf if row["frechet"] is None else row["frechet"]):
        lines.append(
            [
                str(row["weights"]),
                f"{row['guidance_scale']:g}",
                str(row["num_steps"]),
                f"{row['sampling_images_per_s']:.3g}",
                *(("-" if row[name] is None else f"{row[name]:.3f}") for name in ("frechet", "precision", "recall")),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def plot_sweep(rows: Sequence[dict[str, Any]], names: dict[str, str], title: str, path: Path) -> None:
    """Nothing; the PNG is there whole, or as it was."""
    # matplotlib takes a second to import. The figure belongs to no window, so no backend is chosen for the process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    second = "clip_score" if all(row["clip_score"] is not None for row in rows) else "coverage"
    for axes, column in ((left, "frechet"), (right, second)):
        if all(row[column] is None for row in rows):
            axes.text(0.5, 0.5, "not measured in any cell", ha="center", va="center", transform=axes.transAxes)
        else:
            _draw(axes, rows, column)
            axes.set_xscale("log")
        axes.set_xlabel("throughput, samples/s")
        axes.set_ylabel(names.get(column, column))
        axes.grid(alpha=0.3)
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=8)
    device = rows[0]["device"]
    figure.suptitle(
        f"{title}; {rows[0]['num_images']} samples, {device}; numbers are steps, bars 95% intervals", fontsize=9
    )
    write_figure(figure, path)


def _draw(axes: Axes, rows: Sequence[dict[str, Any]], column: str) -> None:
    """Nothing; a line for each pair of weights and guidance scale, through its numbers of steps."""
    groups = list(dict.fromkeys((row["weights"], row["guidance_scale"]) for row in rows))
    scales = list(dict.fromkeys(scale for _, scale in groups))
    profiles = list(dict.fromkeys(weights for weights, _ in groups))
    for weights, scale in groups:
        line = [row for row in rows if (row["weights"], row["guidance_scale"]) == (weights, scale)]
        line = sorted((row for row in line if row[column] is not None), key=lambda row: row["num_steps"])
        if not line:
            continue
        x, y = [row["sampling_images_per_s"] for row in line], [row[column] for row in line]
        bars = [
            [row[column] - (row[f"{column}_low"] if row[f"{column}_low"] is not None else row[column]) for row in line],
            [
                (row[f"{column}_high"] if row[f"{column}_high"] is not None else row[column]) - row[column]
                for row in line
            ],
        ]
        axes.errorbar(
            x,
            y,
            yerr=bars,
            color=f"C{scales.index(scale) % 10}",
            marker=_MARKERS[profiles.index(weights) % len(_MARKERS)],
            linewidth=1.0,
            elinewidth=0.6,
            label=f"{weights}, guidance {scale:g}",
        )
        for row, place in zip(line, zip(x, y, strict=True), strict=True):
            axes.annotate(str(row["num_steps"]), place, textcoords="offset points", xytext=(4, 4), fontsize=7)
