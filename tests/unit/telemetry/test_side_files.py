"""Rows of a run's files: whole or not at all, none lost that memory can hold, and nothing that ends a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_scale.telemetry import side_files
from ldm_scale.telemetry.side_files import RowFile, read_rows, side_write
from tests.helpers.disks import full_disk


def test_rows_that_a_full_disk_refused_go_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_files, "MAX_WAITING", 3)
    file = RowFile(tmp_path / "rows.jsonl")
    assert file.append({"n": 0}, durable=True)
    with full_disk():
        for n in range(1, 6):
            assert not file.append({"n": n})
    assert file.append({"n": 6})
    assert [row["n"] for row in read_rows(file.path)] == [0, 4, 5, 6]
    said = capsys.readouterr().err
    assert said.count("rows.jsonl cannot be written (File too large): free space there") == 1
    assert "is written again, with the rows that waited but for the oldest 3, which are lost" in said


def test_half_a_row_does_not_stay(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    file.append({"n": 0})
    with full_disk(at_bytes=file.path.stat().st_size + 3):
        assert not file.append({"n": 1})
        assert file.path.read_text() == '{"n": 0}\n'


def test_a_file_is_cut_before_what_comes_again_and_behind_a_whole_row(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    file.cut()
    file.path.write_text('{"n": 0}\n{"n": dam\n[]\n{"n": 1}\n{"n": 2}\n{"n"')
    assert [row["n"] for row in read_rows(file.path)] == [0, 1, 2]
    file.cut()
    with full_disk():
        file.cut(lambda row: bool(row["n"] < 2))
    file.append({"n": 7})
    assert [row["n"] for row in read_rows(file.path)] == [0, 1, 7]


def test_a_side_write_that_fails_is_told_with_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk(), side_write(tmp_path / "note"):
        (tmp_path / "note").write_text("text")
    assert f"{tmp_path / 'note'} cannot be written (File too large): free space there" in capsys.readouterr().err
