"""A job that comes back without progress is stopped for good; one that gets on, or that a person started, is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm_scale.engine.restarts import MAX_WITHOUT_PROGRESS, STARTS, count_start
from ldm_scale.errors import CheckpointError
from tests.helpers.disks import full_disk


def _start(monkeypatch: pytest.MonkeyPatch, folder: Path, restarts: int, progress: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    count_start(folder, progress)


def test_starts_without_progress_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    for restart in range(MAX_WITHOUT_PROGRESS + 1):
        _start(monkeypatch, folder, restart, 64)
    with pytest.raises(CheckpointError, match=r"run: the job came back 6 times in a row without a new checkpoint"):
        _start(monkeypatch, folder, MAX_WITHOUT_PROGRESS + 1, 64)
    _start(monkeypatch, folder, 0, 64)  # submitted again
    _start(monkeypatch, folder, 1, 64)


def test_progress_counts_and_falling_back_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for restart in range(20):
        _start(monkeypatch, tmp_path, restart, 8 * restart)
    for restart in range(20, 20 + MAX_WITHOUT_PROGRESS):
        _start(monkeypatch, tmp_path, restart, 8 * (restart % 2))  # damaged checkpoints: back and forth below the best
    with pytest.raises(CheckpointError):
        _start(monkeypatch, tmp_path, 30, 16)


def test_outside_slurm_nothing_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    count_start(tmp_path / "run", 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["{", "", "null", '{"progress": 64, "without_progress": 9}', "[" * 100_000])
def test_a_damaged_count_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / STARTS).write_text(text)
    _start(monkeypatch, tmp_path, 9, 0)
    assert json.loads((tmp_path / STARTS).read_text()) == {"job": "7", "start": 9, "progress": 0}


def test_a_full_disk_ends_neither_a_start_nor_the_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _start(monkeypatch, tmp_path, 0, 64)
    before = (tmp_path / STARTS).read_text()
    with full_disk():
        _start(monkeypatch, tmp_path, 1, 128)
        for restart in range(1, 1 + MAX_WITHOUT_PROGRESS):
            _start(monkeypatch, tmp_path, restart, 64)
        with pytest.raises(CheckpointError):
            _start(monkeypatch, tmp_path, 1 + MAX_WITHOUT_PROGRESS, 64)
    assert [path.name for path in tmp_path.iterdir()] == [STARTS]
    assert (tmp_path / STARTS).read_text() == before
    assert f"{tmp_path / STARTS} cannot be written (File too large): free space there" in capsys.readouterr().err
