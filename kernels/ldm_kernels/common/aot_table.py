"""The committed table of what every compiled kernel uses, and the rules that a binary is held to.

A row states the figures of one compilation; it is found again by operation, direction, kernel, architecture, type and
the first case that asks for it. Two kinds of rule: those that hold for every kernel on every version of Triton (no
spills, no atomics, shared memory within the chip), and those against the stated figures, which are compared only with
the version of Triton that they were made with, since another compiler allocates registers in another way.

A spill that is accepted is written into its row by hand, and an update keeps it:
`"allowed": {"stack_bytes": 16, "local_instructions": 4, "reason": "..."}`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ldm_kernels.common.binary import MAX_SHARED_BYTES, Figures

TABLE = Path(__file__).with_name("aot_table.json")
NUM_FIXED = 24
# Share of the bits moved by accesses narrower than 128 that may come on top of the stated one.
_NARROW_SLACK = 0.02


@dataclass(frozen=True)
class Row:
    """One compilation and its figures."""

    operation: str
    direction: str
    kernel: str
    architecture: int
    dtype: str
    case: str  # the first that asks for it
    calls: int  # cases that share it
    launch: str  # warps, stages and constants, for the reader
    num_ctas: int
    hash: str
    figures: Figures
    fixed: bool = False  # compiled at every check
    allowed: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.operation}.{self.direction} {self.kernel} sm_{self.architecture} {self.dtype} {self.case}"


@dataclass(frozen=True)
class Table:
    """All rows, and the version of Triton that their figures hold for."""

    triton: str
    rows: tuple[Row, ...]


def read(path: Path = TABLE) -> Table:
    """The table in that file."""
    content = json.loads(path.read_text())
    return Table(content["triton"], tuple(_row(entry) for entry in content["rows"]))


def write(table: Table, path: Path = TABLE) -> None:
    """Replaces the file, one row a line, so that a change in a figure is a change in a line."""
    lines = [
        json.dumps({k: v for k, v in asdict(row).items() if v is not None and v is not False}) for row in table.rows
    ]
    body = ",\n".join(f"    {line}" for line in lines)
    path.write_text(f'{{\n  "triton": {json.dumps(table.triton)},\n  "rows": [\n{body}\n  ]\n}}\n')


def updated(rows: Sequence[Row], old: Table | None) -> tuple[Row, ...]:
    """The rows with what was allowed before, and with those marked that every check compiles."""
    allowed = {row.name: row.allowed for row in old.rows} if old is not None else {}
    fixed = {row.name for row in choose_fixed(rows)}
    return tuple(replace(row, allowed=allowed.get(row.name), fixed=row.name in fixed) for row in rows)


def choose_fixed(rows: Sequence[Row]) -> list[Row]:
    """At most `NUM_FIXED` rows: each operation, direction and architecture once, then kernels not yet among them.

    The row in the middle by length of code stands for its group: typical, and never the slowest to compile. Beyond
    sm_90 there is none: the checks on those architectures are for a full run.
    """
    chosen: dict[str, Row] = {}
    candidates = [row for row in rows if row.architecture <= 90]
    for keys in (
        ("operation", "direction", "architecture"),
        ("kernel", "architecture"),
        ("kernel", "dtype"),
        ("name",),
    ):
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in candidates:
            groups.setdefault(tuple(getattr(row, key) for key in keys), []).append(row)
        for key in sorted(groups):
            covered = any(tuple(getattr(row, k) for k in keys) == key for row in chosen.values())
            if not covered and len(chosen) < NUM_FIXED:
                by_length = sorted(groups[key], key=lambda row: (row.figures.instructions, row.name))
                middle = by_length[(len(by_length) - 1) // 2]
                chosen[middle.name] = middle
    return list(chosen.values())


def broken_rules(row: Row) -> list[str]:
    """What the row's figures break of the rules for every kernel, each with figure and limit."""
    figures, allowed = row.figures, row.allowed or {}
    broken = []
    if figures.stack_bytes > allowed.get("stack_bytes", 0):
        broken.append(f"stack of {figures.stack_bytes} bytes a thread, allowed {allowed.get('stack_bytes', 0)}")
    local = figures.local_loads + figures.local_stores
    if local > allowed.get("local_instructions", 0):
        broken.append(
            f"registers spilled: {figures.local_loads} loads and {figures.local_stores} stores of local memory, "
            f"allowed {allowed.get('local_instructions', 0)}"
        )
    if figures.shared_bytes > MAX_SHARED_BYTES[row.architecture]:
        broken.append(f"shared memory of {figures.shared_bytes} bytes, limit {MAX_SHARED_BYTES[row.architecture]}")
    if figures.atomics:
        broken.append(f"{figures.atomics} atomic instructions on global memory, allowed 0")
    return broken


def regressions(stated: Figures, found: Figures) -> list[str]:
    """What is worse than stated, each with figure and stated value."""
    worse = []
    if found.registers > stated.registers:
        worse.append(f"registers {found.registers}, stated {stated.registers}")
    for name in ("loads", "stores"):
        now, then = getattr(found, name), getattr(stated, name)
        if _narrow_share(now) > _narrow_share(then) + _NARROW_SLACK or max(now, default=0) < max(then, default=0):
            worse.append(f"global {name} by width in bits {_widths(now)}, stated {_widths(then)}")
    if found.tensor_copies < stated.tensor_copies and found.tensor_copies == 0:
        worse.append(f"no tensor memory copies, stated {stated.tensor_copies}")
    if set(found.matrix) != set(stated.matrix):
        worse.append(f"matrix instructions {sorted(found.matrix) or 'none'}, stated {sorted(stated.matrix) or 'none'}")
    return worse


def _narrow_share(by_width: dict[int, int]) -> float:
    bits = sum(width * count for width, count in by_width.items())
    return sum(width * count for width, count in by_width.items() if width < 128) / bits if bits else 0.0


def _widths(by_width: dict[int, int]) -> str:
    return ", ".join(f"{count} of {width}" for width, count in by_width.items()) or "none"


def _row(entry: dict[str, Any]) -> Row:
    figures = dict(entry["figures"])
    for name in ("loads", "stores"):
        figures[name] = {int(width): count for width, count in figures[name].items()}
    return Row(**{**entry, "figures": Figures(**figures)})
