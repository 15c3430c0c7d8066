"""The picture of published and predicted speeds (`plan_against_published`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(compared_rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Images/s per GPU over GPUs, published and predicted; and predicted over published."""
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.6))
    names = {"mlperf": "MLPerf, SD-2 at 512 px, H100", "mosaic": "Mosaic, SD-2, A100", "edm2": "EDM2, 32 A100"}
    for axis, (campaign, title) in zip(axes, names.items(), strict=False):
        _curves(axis, [row for row in compared_rows if row["campaign"] == campaign and row["of_the_median"]], campaign)
        axis.set_title(title)
        axis.set_ylabel("images/s per GPU")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    for campaign in names:
        chosen = [row for row in compared_rows if row["campaign"] == campaign and row["of_the_median"]]
        points = [(row["published"], row["predicted"]) for row in chosen]
        axes[3].loglog(*zip(*points, strict=True), "o", label=campaign)
    low, high = 200, 80_000
    axes[3].loglog([low, high], [low, high], "k-", linewidth=1)
    axes[3].fill_between([low, high], [0.85 * low, 0.85 * high], [1.15 * low, 1.15 * high], alpha=0.2, label="15%")
    axes[3].set(xlabel="published images/s", ylabel="predicted images/s", title="all rows")
    axes[3].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _curves(axis: Any, chosen: Sequence[dict[str, Any]], campaign: str) -> None:
    """A line a series: published with circles, predicted with crosses; filled circles were fitted on."""
    series: dict[str, list[dict[str, Any]]] = {}
    for row in chosen:
        words = row["row"].split()
        series.setdefault("EDM2" if campaign == "edm2" else " ".join(words[:2]), []).append(row)
    for name, members in series.items():
        if campaign != "edm2":
            members = sorted(members, key=lambda row: row["num_gpus"])
        places = list(range(len(members))) if campaign == "edm2" else [row["num_gpus"] for row in members]
        (line,) = axis.plot(
            places, [row["published"] / row["num_gpus"] for row in members], "o-", mfc="none", label=name
        )
        predicted = [row["predicted"] / row["num_gpus"] for row in members]
        axis.plot(places, predicted, "x--", color=line.get_color(), label=f"{name}, predicted")
        fitted = [
            (x, row["published"] / row["num_gpus"]) for x, row in zip(places, members, strict=True) if row["fitted"]
        ]
        if fitted:
            axis.plot(*zip(*fitted, strict=True), "o", color=line.get_color())
        if campaign == "edm2":
            axis.set_xticks(places, [row["row"].removeprefix("EDM2-") for row in members])
    if campaign != "edm2":
        axis.set_xscale("log", base=2)
        axis.set_xlabel("GPUs")
