"""From what the ranks measured to efficiencies, their table and their picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.measured import spread

TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}  # of losses in fp32 and in bf16


def report(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row for each stage, mode and number of ranks, over all files of it; files are of one case and device."""
    kinds = {(document["case"], document["device"]) for document in found}
    if len(kinds) > 1:
        listed = ", ".join(" on ".join(kind) for kind in sorted(kinds))
        raise SystemExit(f"error: files of {listed}: scaling compares ranks of one case on one device; join them apart")
    rows: dict[tuple[int, str, int], dict[str, Any]] = {}
    for document in found:
        for row in document["rows"]:
            key = (row["stage"], row["mode"], document["ranks"])
            place = {name: document[name] for name in ("hosts", "cores_of_the_host")}
            place["threads"] = document["environment"]["threads"]
            kept = rows.setdefault(key, row | place | {"step_s": [], "communication_share": [], "turn_s": []})
            kept["step_s"] = kept["step_s"] + row["step_s"]
            kept["communication_share"] = [*kept["communication_share"], row["communication_share"]]
            kept["turn_s"] = [*kept["turn_s"], statistics.median(row["step_s"])]
    fewest = min(ranks for _, _, ranks in rows)
    results = []
    for (stage, mode, ranks), row in sorted(rows.items()):
        step_s = spread(row["step_s"])
        rate = row["images"] / step_s["median"] / ranks
        results.append(
            row
            | {
                "ranks": ranks,
                "step_s": step_s,
                "steps": len(row["step_s"]),
                "images_per_s": rate * ranks,
                "images_per_s_per_rank": rate,
                "communication_share": statistics.median(row["communication_share"]),
            }
            | efficiency(row, ranks, rows.get((stage, mode, fewest)), fewest, found[0]["device"])
        )
    first = found[0]
    named = {key: first[key] for key in ("case", "unet", "environment", "device")}
    return named | {"fewest_ranks": fewest, "rows": results}


def efficiency(
    row: dict[str, Any], ranks: int, base: dict[str, Any] | None, fewest: int, device: str
) -> dict[str, Any]:
    """Images/s per rank over those of the fewest ranks in the same turn: median and range over the turns.

    Without these figures if strong scaling has other losses.
    """
    if base is None:
        return {}
    found: dict[str, Any] = {}
    if row["losses"] is not None and base["losses"] is not None:
        off = math.dist(row["losses"], base["losses"]) / math.hypot(*base["losses"])
        found = {"difference": off, "allowed": TOLERANCE[device]}
        if not off <= TOLERANCE[device]:  # written so that a NaN refuses too
            return found | {"refused": "other losses than on the fewest ranks"}
    work = row["images"] / ranks / (base["images"] / fewest)
    turns = [work * b / a for a, b in zip(row["turn_s"], base["turn_s"], strict=False)]
    return found | {"efficiency": statistics.median(turns), "efficiency_range": [min(turns), max(turns)]}


def table(results: dict[str, Any]) -> str:
    """A line for each stage, mode and number of ranks."""
    head = f"{'':<28}{'batch':>6}{'ms':>9}{'quartiles':>20}{'images/s':>10}{'per rank':>10}{'efficiency':>20}"
    lines = [f"{head}{'communication':>15}"]
    shared = False
    for row in results["rows"]:
        ms = {key: 1e3 * value for key, value in row["step_s"].items()}
        quartiles = f"{ms['lower_quartile']:.1f} .. {ms['upper_quartile']:.1f}"
        shares = is_shared(row, results["device"])
        shared = shared or shares
        label = f"ZeRO {row['stage']}, {row['mode']}, {row['ranks']} rank(s)" + (" *" if shares else "")
        known = row.get("refused", "")
        if "efficiency" in row:
            low, high = row["efficiency_range"]
            known = f"{row['efficiency']:.0%} ({low:.0%} .. {high:.0%})"
        lines.append(
            f"{label:<28}{row['images']:>6}{ms['median']:>9.1f}{quartiles:>20}{row['images_per_s']:>10.1f}"
            f"{row['images_per_s_per_rank']:>10.1f}{known:>20}{row['communication_share']:>15.0%}"
        )
    strong = {row["ranks"] for row in results["rows"] if row["mode"] == "strong"}
    lines += [
        f"{ranks} ranks: no strong scaling, the case's batch is not divided by {ranks}"
        for ranks in sorted({row["ranks"] for row in results["rows"]} - strong)
    ]
    if shared:
        lines.append(
            "*: more ranks than cores, which they share; this says what sharing costs, not how training scales"
        )
    return "\n".join(lines)


def is_shared(row: dict[str, Any], device: str) -> bool:
    """Whether ranks had to share cores; GPUs are never shared."""
    return bool(device == "cpu" and row["ranks"] > row["hosts"] * row["cores_of_the_host"])


def draw(results: dict[str, Any], path: Path) -> None:
    """Nothing; efficiency over ranks, weak and strong beside each other, a line for each ZeRO stage."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for panel, mode in zip(panels, ("weak", "strong"), strict=True):
        rows = [row for row in results["rows"] if row["mode"] == mode and "efficiency" in row]
        for stage in sorted({row["stage"] for row in rows}):
            of_stage = [row for row in rows if row["stage"] == stage]
            ranks = [row["ranks"] for row in of_stage]
            panel.plot(ranks, [row["efficiency"] for row in of_stage], marker="o", label=f"ZeRO {stage}")
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set_xscale("log", base=2)
        ticks = sorted({row["ranks"] for row in rows})
        panel.set_xticks(ticks, [f"{n}*" if n in _shared(rows, results["device"]) else str(n) for n in ticks])
        panel.set_title(f"{mode} scaling, {results['case']}, {results['environment']['device']}", fontsize=9)
        panel.set_xlabel("ranks (*: more than cores)")
        panel.grid(alpha=0.3)
        if rows:
            panel.legend(fontsize=8)
    panels[0].set_ylabel(f"images/s per rank / that of {results['fewest_ranks']} rank(s)")
    panels[0].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _shared(rows: Sequence[dict[str, Any]], device: str) -> set[int]:
    return {row["ranks"] for row in rows if is_shared(row, device)}
