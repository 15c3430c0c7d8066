"""Parts of a measurement in files: only their own block's, and nobody else's files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ldm_scale.evaluation.blocks import Part
from ldm_scale.evaluation.parts import PartFolder


def test_nothing_of_others_is_removed(tmp_path: Path) -> None:
    mine, other = PartFolder(tmp_path, {"seed": 0}), PartFolder(tmp_path, {"seed": 1})
    notes = tmp_path / "parts" / "notes.txt"
    for folder in (mine, other):
        folder.put(0, Part({"x": torch.ones(2)}, {}))
    notes.write_text("precious")
    mine.remove()
    assert notes.read_text() == "precious"
    assert (mine.blocks(), other.blocks()) == ([], [0])
    notes.unlink()
    other.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_another_block_is_damaged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = PartFolder(tmp_path, {})
    folder.put(3, Part({"x": torch.arange(3)}, {"y": [1]}))
    (path,) = tmp_path.glob("parts/*/*")
    shutil.copy(path, path.with_stem("000004"))
    kept = folder.get(3)
    assert kept is not None
    assert (kept.tensors["x"].tolist(), kept.values) == ([0, 1, 2], {"y": [1]})
    assert folder.get(4) is None
    assert "000004.safetensors is damaged" in capfd.readouterr().err
