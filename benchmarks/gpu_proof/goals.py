"""What was measured beside what is aimed at (benchmarks/README.md): the worst and the median case of each goal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.harness import COPY, Row
from benchmarks.kernels.report import Red, cold_us, folder, group_by_case
from benchmarks.kernels.unet_step_gpu import ON

LARGE_PIXELS = (32 * 32, 64 * 64)
LARGE_BATCH = 16
TEXT_KEYS = 77

Group = Mapping[str, Row]  # by implementation


@dataclass(frozen=True)
class Goal:
    """At least `wanted` in every case. `figure` is None for a case that the goal does not speak of."""

    text: str
    operation: str
    direction: str
    wanted: float
    figure: Callable[[Group], float | None]


def table(rows: Sequence[Row], unet: Mapping[str, Any] | None, red: Red) -> list[str]:
    """Markdown: a line per goal, with how many cases meet it."""
    lines = ["| goal | at least | cases | met | worst | median |", "|---|---|---|---|---|---|"]
    groups = [
        (key, {row.implementation: row for row in group if row.status == "ok" and row.cold_us})
        for key, group in group_by_case(rows).items()
        if key.dtype == "bfloat16"
    ]
    for goal in GOALS:
        if folder(goal.operation) in red:
            lines.append(f"| {goal.text} | {goal.wanted:.2f} | red | | | |")
            continue
        chosen = (group for key, group in groups if (key.operation, key.direction) == (goal.operation, goal.direction))
        lines.append(_line(goal.text, goal.wanted, [f for group in chosen if (f := goal.figure(group)) is not None]))
    step = (unet or {}).get("times_faster", {}).get(ON)
    lines.append(
        _line("SD-2's training step: times faster than without kernels", 1.15, [step["median"]] if step else [])
    )
    return lines


def _line(text: str, wanted: float, figures: Sequence[float]) -> str:
    if not figures:
        return f"| {text} | {wanted:.2f} | not measured | | | |"
    met = sum(figure >= wanted for figure in figures)
    worst, median = min(figures), statistics.median(figures)
    return f"| {text} | {wanted:.2f} | {len(figures)} | {met} | {worst:.2f} | {median:.2f} |"


def _large(group: Group) -> bool:
    """Of the shapes that the norm's goals are set for."""
    row = next(iter(group.values()))
    shape = row.chosen_by[1] if row.chosen_by else {}
    return row.batch >= LARGE_BATCH and shape.get("pixels") in LARGE_PIXELS


def _share(variants: Iterable[str], moved: bool) -> Callable[[Group], float | None]:
    """Share of a copy's bandwidth, for the bytes moved or the fewest, of the best of these variants."""

    def figure(group: Group) -> float | None:
        rows = [group[f"triton {variant}"] for variant in variants if f"triton {variant}" in group]
        if not rows or COPY not in group or not _large(group):
            return None
        copy = cold_us(group[COPY])
        return max(copy / cold_us(row) * (row.moved_bytes / row.min_bytes if moved else 1.0) for row in rows)

    return figure


def _times_faster(*others: str, where: Callable[[Group], bool] = lambda group: True) -> Callable[[Group], float | None]:
    """Our best time against the best of the others (by the beginning of their names)."""

    def figure(group: Group) -> float | None:
        ours = [cold_us(row) for row in group.values() if row.ours]
        theirs = [cold_us(row) for name, row in group.items() if not row.ours and name.startswith(others)]
        return min(theirs) / min(ours) if ours and theirs and where(group) else None

    return figure


def _on_text(group: Group) -> bool:
    row = next(iter(group.values()))
    return row.chosen_by is not None and row.chosen_by[1].get("keys") == TEXT_KEYS


_NORM, _CROSS = "group_norm_silu at 32^2 and 64^2, batch >= 16", "cross-attention with 77 keys"
_TWO_PASS, _ONE_READ = _share(["two_pass"], moved=True), _share(["registers", "cluster"], moved=False)
_OF_MOVED, _OF_FEWEST = "of a copy's bandwidth for the bytes moved", "of a copy's bandwidth for the fewest bytes"
_COMPILED, _EAGER = _times_faster("torch.compile", where=_large), _times_faster("eager", where=_large)
_SDPA = _times_faster("sdpa", where=_on_text)
GOALS = (
    Goal(f"{_NORM}, two-pass forward: {_OF_MOVED}", "group_norm_silu", "forward", 0.9, _TWO_PASS),
    Goal(f"{_NORM}, two-pass backward: {_OF_MOVED}", "group_norm_silu", "backward", 0.9, _TWO_PASS),
    Goal(f"{_NORM}, single-read forward: {_OF_FEWEST}", "group_norm_silu", "forward", 0.8, _ONE_READ),
    Goal(f"{_NORM}, single-read backward: {_OF_FEWEST}", "group_norm_silu", "backward", 0.75, _ONE_READ),
    Goal(f"{_NORM}: times faster than torch.compile", "group_norm_silu", "both", 1.2, _COMPILED),
    Goal(f"{_NORM}: times faster than eager", "group_norm_silu", "both", 3.0, _EAGER),
    Goal(f"{_CROSS}: times faster than the best SDPA", "cross_attention", "both", 1.5, _SDPA),
    Goal("geglu: times faster than eager", "geglu", "both", 1.8, _times_faster("eager")),
    Goal("geglu: times faster than torch.compile", "geglu", "both", 1.05, _times_faster("torch.compile")),
)
