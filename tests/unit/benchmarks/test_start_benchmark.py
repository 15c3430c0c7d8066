"""The benchmark of starts: how a rank's notes become the parts of a start, and the table of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.start import IMPORTS, PARTS, STEP, TOTAL, read_lines, split, summary, table


def _notes(path: Path) -> None:
    """Each part takes two seconds, one of them importing; a last line is still being written."""
    lines = [[part, 2.0 * number, 1.0 * number] for number, part in enumerate((*PARTS, STEP), start=1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '["step", 9')


def test_parts_are_without_their_imports(tmp_path: Path) -> None:
    _notes(tmp_path / "notes")
    found = split(read_lines(tmp_path / "notes"))
    assert found == {IMPORTS: len(PARTS)} | dict.fromkeys(PARTS, 1.0) | {TOTAL: 2 * len(PARTS)}


def test_a_start_that_is_not_over_has_no_parts(tmp_path: Path) -> None:
    _notes(tmp_path / "notes")
    with pytest.raises(AssertionError, match="are not the parts of a start"):
        split(read_lines(tmp_path / "notes")[: len(PARTS) - 1])
    assert read_lines(tmp_path / "none") == []


def test_the_table_has_medians() -> None:
    rounds = [{"start": {TOTAL: float(seconds)}} for seconds in (10, 20, 60)]
    assert "total                                         20.00    15.00 .. 40.00" in table(
        {"stage1-1": summary(rounds)}
    )
