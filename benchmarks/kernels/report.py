"""What came of a sweep, as CSV, Markdown, a roofline plot and the table of winners.

Ratios are medians of cold times, an implementation against another at the same shape and pass. For an operation that
is red (a test of it failed, or our result was wrong somewhere) times are listed and no ratio is: a fast wrong kernel
is not fast.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.kernels import device
from benchmarks.kernels.harness import COPY, Row

WINNING_RATIO = 1.05
# Times are of graphs' replay. Called eagerly, an operation costs the host its launches too, tens of microseconds that
# differ between implementations: below this, they and not the kernels can decide.
WINNING_LEAST_US = 50.0
DRY_RUN = "dry run: no meaning"
_QUARTILES = ("lower_quartile", "upper_quartile")
COLUMNS = (
    *("operation", "model", "batch", "shape", "dtype", "implementation", "direction", "status"),
    *("cold_us", "cold_lower_quartile", "cold_upper_quartile"),
    *("warm_us", "warm_lower_quartile", "warm_upper_quartile", "captured"),
    *("min_bytes", "moved_bytes", "flops", "gb_per_s", "tflop_per_s"),
    *("of_copy_bandwidth", "of_copy_bandwidth_by_moved_bytes", "times_faster_than_best_other"),
    *("output_error", "gradient_error", "count", "note"),
)

Red = Mapping[str, str]  # operation (its folder) -> why


class Key(NamedTuple):
    """What tells a case and pass from others."""

    operation: str
    model: str
    batch: int
    shape: str
    dtype: str
    direction: str


def folder(operation: str) -> str:
    """The operation's folder in ldm_kernels: cross-attention is attention's."""
    return "attention" if operation == "cross_attention" else operation


def red_by_rows(rows: Iterable[Row]) -> dict[str, str]:
    """Operations of which the kernel that calls get was wrong or failed in a sweep, with the first such case.

    A variant by itself is not: calls get it only where the table takes it, and then the operation's own row shows it.
    """
    red: dict[str, str] = {}
    for row in rows:
        if row.ours and row.backend and row.status in ("wrong", "failed"):
            red.setdefault(folder(row.operation), _failure(row))
    return red


def failed_variants(rows: Iterable[Row]) -> dict[str, str]:
    """Variants of our kernels that were wrong or failed when measured by themselves, with the first such case."""
    failed: dict[str, str] = {}
    for row in rows:
        if row.ours and not row.backend and row.status in ("wrong", "failed"):
            failed.setdefault(f"{folder(row.operation)}, {row.implementation}", _failure(row))
    return failed


def _failure(row: Row) -> str:
    case = f"{row.implementation} at {row.model} b{row.batch} {row.shape} {row.dtype}"
    return f"{case}: {row.status}, {row.note}"


def write_all(
    out: Path, rows: Sequence[Row], red: Red, environment: dict[str, Any], ceilings: dict[str, float], mark: str = ""
) -> str:
    """Writes results.csv, results.md, roofline.png and winners.json into `out`; returns the Markdown."""
    write_csv(out / "results.csv", rows, red, mark)
    table = winners(rows, red, environment["device"]) if not mark else {}
    (out / "winners.json").write_text(json.dumps(table, indent=2) + "\n")
    note = plot(out / "roofline.png", rows, ceilings, f"{environment['device']}{f' ({mark})' if mark else ''}")
    head = [f"# Kernels{f' ({mark})' if mark else ''}", "", *device.lines(environment, ceilings), note, ""]
    text = "\n".join([*head, markdown(rows, red), ""])
    (out / "results.md").write_text(text)
    return text


def write_csv(path: Path, rows: Sequence[Row], red: Red, mark: str = "") -> None:
    """A line per implementation, case and pass; `mark` becomes the first line, as a comment."""
    groups = group_by_case(rows)
    with path.open("w", newline="") as file:
        if mark:
            file.write(f"# {mark}\n")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow(_record(row, groups[_key(row)], red))


def markdown(rows: Sequence[Row], red: Red) -> str:
    """A table per operation: times of ours and of the best other, their ratio, and the share of a copy's bandwidth."""
    parts = []
    timed = [row for row in rows if row.status == "ok" and row.cold_us]
    for operation in dict.fromkeys(row.operation for row in timed):
        parts.append(f"### {operation}\n")
        if folder(operation) in red:
            parts.append(f"Red, so no ratios: {red[folder(operation)]}\n")
        parts.append(
            "| model | batch | shape | type | pass | ours us (quartiles) | best other us | times faster | of copy | "
            "warm: ours, other us |\n|---|---|---|---|---|---|---|---|---|---|"
        )
        for key, group in group_by_case(row for row in timed if row.operation == operation).items():
            parts.append(_line(key, group, red))
        parts.append("")
    refused = [row for row in rows if row.status in ("wrong", "failed", "out of memory")]
    if refused:
        parts.append("### Not timed\n")
        parts += [
            f"- {r.operation} {r.model} b{r.batch} {r.shape} {r.dtype}, {r.implementation} ({r.direction}): "
            f"{r.status}, {r.note}"
            for r in refused
        ]
    return "\n".join(parts)


def winners(rows: Sequence[Row], red: Red, gpu: str) -> dict[str, list[dict[str, Any]]]:
    """Rows for winners.json: forward and backward together where there is a backward, of green operations alone.

    Only implementations that `auto` can take are compared, and only where the faster one takes at least
    WINNING_LEAST_US for both passes. One shape that several models share gives one row.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for key, group in group_by_case(row for row in rows if row.status == "ok" and row.cold_us).items():
        operation, directions = key.operation, {row.direction for row in rows if row.operation == key.operation}
        if folder(operation) in red or key.direction != ("both" if "both" in directions else "forward"):
            continue
        choices = sorted((row for row in group if row.backend), key=cold_us)
        if len(choices) < 2 or choices[0].chosen_by is None:
            continue
        if key.direction == "both" and cold_us(choices[0]) < WINNING_LEAST_US:
            continue
        ratio = cold_us(choices[1]) / cold_us(choices[0])
        if ratio >= WINNING_RATIO:
            name, shape = choices[0].chosen_by
            entry = {
                "gpu": gpu,
                "dtype": key.dtype,
                "shape": shape,
                "backend": choices[0].backend,
                "ratio": round(ratio, 3),
            }
            rows_of_operation = table.setdefault(name, {})
            same = json.dumps([key.dtype, shape], sort_keys=True)
            if same not in rows_of_operation or rows_of_operation[same]["ratio"] > entry["ratio"]:
                rows_of_operation[same] = entry  # of several models with this shape, the least convincing ratio
    return {name: list(entries.values()) for name, entries in table.items()}


def plot(path: Path, rows: Sequence[Row], ceilings: Mapping[str, float], title: str) -> str:
    """Achieved rate over arithmetic intensity with both measured ceilings; returns "" or why there is no plot."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no plot: matplotlib is not installed ({error})"
    # Empty axes mean that nothing was timed.
    points = [row for row in rows if row.status == "ok" and row.cold_us and row.flops and row.implementation != COPY]
    figure = Figure(figsize=(10, 6.5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    operations = list(dict.fromkeys(row.operation for row in points))
    for index, operation in enumerate(operations):
        for ours in (False, True):
            chosen = [row for row in points if row.operation == operation and row.ours == ours]
            color = f"C{index}"
            axes.scatter(
                [row.flops / row.min_bytes for row in chosen],
                [row.flops / cold_us(row) / 1e6 for row in chosen],
                s=22,
                marker="o" if ours else "x",
                color=color,
                alpha=0.8,
                label=f"{operation}, {'ours' if ours else 'others'}",
            )
    if points and ceilings.get("copy_gb_per_s"):
        intensities = [row.flops / row.min_bytes for row in points]
        low, high = min(intensities) / 2, max(max(intensities) * 2, 1e3)
        xs = [low * (high / low) ** (i / 100) for i in range(101)]
        peak = ceilings.get("matmul_tflop_per_s", math.inf)
        axes.plot(xs, [min(x * ceilings["copy_gb_per_s"] / 1e3, peak) for x in xs], "k-", label="measured ceilings")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte (fewest bytes)", ylabel="TFLOP/s (cold)", title=title)
    axes.grid(True, which="both", alpha=0.2)
    if points:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return ""


def _key(row: Row) -> Key:
    return Key(row.operation, row.model, row.batch, row.shape, row.dtype, row.direction)


def group_by_case(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """The rows of each case and pass."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    return groups


def cold_us(row: Row) -> float:
    """The row's time: the median with a cold cache."""
    return row.cold_us["median"]


def _best(group: Iterable[Row], ours: bool) -> Row | None:
    rows = [
        row for row in group if row.status == "ok" and row.cold_us and row.ours == ours and row.implementation != COPY
    ]
    return min(rows, key=cold_us, default=None)


def _copy(group: Iterable[Row]) -> Row | None:
    return next((row for row in group if row.implementation == COPY and row.cold_us), None)


def _record(row: Row, group: list[Row], red: Red) -> dict[str, Any]:
    record: dict[str, Any] = {name: getattr(row, name) for name in COLUMNS if hasattr(row, name)}
    for kind, times in (("cold", row.cold_us), ("warm", row.warm_us)):
        record[f"{kind}_us"] = f"{times['median']:.2f}" if times else ""
        for quartile in _QUARTILES:
            record[f"{kind}_{quartile}"] = f"{times[quartile]:.2f}" if times else ""
    for error in ("output_error", "gradient_error"):
        value = getattr(row, error)
        record[error] = "" if value is None else f"{value:.3g}"
    if row.cold_us:
        record["gb_per_s"] = f"{row.min_bytes / cold_us(row) / 1e3:.1f}"
        record["tflop_per_s"] = f"{row.flops / cold_us(row) / 1e6:.3f}"
        copy, other = _copy(group), _best(group, ours=False)
        if copy:
            share = cold_us(copy) / cold_us(row)
            record["of_copy_bandwidth"] = f"{share:.3f}"
            record["of_copy_bandwidth_by_moved_bytes"] = (
                f"{share * row.moved_bytes / row.min_bytes:.3f}" if row.moved_bytes else ""
            )
        if row.ours and other and folder(row.operation) not in red:
            record["times_faster_than_best_other"] = f"{cold_us(other) / cold_us(row):.3f}"
    return record


def _line(key: Key, group: list[Row], red: Red) -> str:
    operation, model, batch, shape, dtype, direction = key
    ours, other, copy = _best(group, ours=True), _best(group, ours=False), _copy(group)
    ratio = f"{cold_us(other) / cold_us(ours):.2f}" if ours and other and folder(operation) not in red else ""
    share = f"{100 * cold_us(copy) / cold_us(ours):.0f}%" if ours and copy else ""
    our_text = ""
    if ours:
        spread = f"{ours.cold_us['lower_quartile']:.1f} to {ours.cold_us['upper_quartile']:.1f}"
        our_text = f"{cold_us(ours):.1f} ({spread}) {ours.implementation}"
    other_text = (
        f"{cold_us(other):.1f} {other.implementation}" + (f", {other.note}" if other.note else "") if other else ""
    )
    warm = ", ".join(f"{row.warm_us['median']:.1f}" if row else "-" for row in (ours, other))
    cells = (model, batch, shape, dtype, direction, our_text, other_text, ratio, share, warm)
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
