"""Rows come in the order of the images, however they were cut into batches and spread over ranks."""

import json

import pytest
import torch

from ldm_scale.evaluation.blocks import Part
from ldm_scale.evaluation.rows import Rows


def add(rows: Rows, numbers: list[int]) -> None:
    values = torch.tensor(numbers)
    rows.add(
        numbers, {"a.x": values.double(), "a.y": values[:, None].expand(-1, 2)}, {"words": [f"w{n}" for n in numbers]}
    )


def test_ranks_and_batches_change_nothing() -> None:
    alone = Rows()
    for batch in ([0, 1, 2], [3], [4, 5, 6]):
        add(alone, batch)
    ranks = [Rows() for _ in range(3)]
    for number in (6, 5, 4, 3, 2, 1, 0):
        add(ranks[number % 2], [number])
    for rank in ranks[1:]:  # the third has seen no image
        ranks[0].take(Part(rank.part.tensors, json.loads(json.dumps(rank.part.values))))
    for rows in (alone, ranks[0]):
        assert len(rows) == 7
        assert rows.tensor("a.x").tolist() == list(range(7))
        assert rows.tensors("a.")["y"].tolist() == [[n, n] for n in range(7)]
        assert rows.values("words") == [f"w{n}" for n in range(7)]
        assert "words" in rows
        assert "a.z" not in rows


def test_no_image_counts_twice_and_no_row_is_missing() -> None:
    rows = Rows()
    add(rows, [1, 2])
    add(rows, [2])
    with pytest.raises(AssertionError, match="measured twice"):
        rows.tensor("a.x")
    part = Rows()
    part.add([0], {"x": torch.ones(1)})
    part.add([1], {})
    with pytest.raises(AssertionError, match="1 rows of 2 images"):
        part.tensor("x")
