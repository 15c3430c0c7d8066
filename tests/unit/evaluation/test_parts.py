"""Parts of a measurement in files: only their own block's, and nobody else's files."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from ldm_scale.data.decode import DecodeSettings
from ldm_scale.evaluation.blocks import Block, MeasuredImages, Part, stacked_digests
from ldm_scale.evaluation.parts import PartFolder, measure_blocks


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


class Numbers(MeasuredImages[list[int]]):
    """Numbers in blocks of two."""

    def __init__(self, count: int) -> None:
        super().__init__(list(range(count)), 2, DecodeSettings(resolution=1, augment=False))

    def read(self, blocks: Iterable[int]) -> Iterator[Block[list[int]]]:
        for block in blocks:
            numbers = list(self.places(block))
            yield Block(
                block, numbers, numbers, stacked_digests([torch.zeros(16, dtype=torch.uint8)] * len(numbers)), []
            )


def test_what_was_kept_is_told_from_what_was_measured(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path, {})

    def measure(block: Block[list[int]]) -> Part:
        assert block.images is not None
        return Part({"sum": torch.tensor(sum(block.images))}, {})

    before = Numbers(7)
    first = measure_blocks(before, measure, folder)
    assert (before.num_images, before.num_kept) == (7, 0)
    sorted(tmp_path.glob("parts/*/*"))[3].unlink()
    again = Numbers(7)
    second = measure_blocks(again, measure, folder)
    assert (again.num_images, again.num_kept) == (7, 6)
    assert [part.tensors["sum"].item() for part in first] == [part.tensors["sum"].item() for part in second]


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
