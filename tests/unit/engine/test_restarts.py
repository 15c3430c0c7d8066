"""A job that comes back without progress is stopped for good; one that gets on, or that a person started, is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_scale.engine.restarts import MAX_WITHOUT_PROGRESS, STARTS, count_start
from ldm_scale.errors import CheckpointError


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


def test_a_damaged_count_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / STARTS).write_text("{")
    _start(monkeypatch, tmp_path, 9, 0)
