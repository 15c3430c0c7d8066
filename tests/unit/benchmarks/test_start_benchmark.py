"""The benchmark of starts: how a rank's notes become the parts of a start, and the table of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import verified_start
from benchmarks.start import IMPORTS, PARTS, RESUMED, STEP, TOTAL, read_lines, split, summary, table


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


def test_starts_with_and_without_verification_are_compared_round_by_round() -> None:
    totals = {verified_start.VERIFIED: (11.0, 24.0, 30.0), verified_start.UNVERIFIED: (10.0, 20.0, 30.0)}
    starts = {kind: [{RESUMED: s / 10, TOTAL: s} for s in found] for kind, found in totals.items()}
    results = verified_start.summary(starts)
    assert results["ratio"]["median"] == pytest.approx(1.1)
    lines = verified_start.table(results | {"bytes": 3 << 29}).splitlines()
    assert [line.split() for line in lines[1:3]] == [["verified", "24.00", "2.40"], ["unverified", "20.00", "2.00"]]
    assert "1.50 GiB" in lines[0]
    assert lines[3] == "ratio 1.100 (1.050 .. 1.150), goal 1.05"
