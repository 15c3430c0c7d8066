"""Collectives give every rank the same, need no process group on one rank, and leave their arguments alone."""

from __future__ import annotations

from typing import Any

import torch

from ldm_scale.config.schema import TrainConfig
from ldm_scale.engine import collectives, env
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")


def _everything(rank: int) -> dict[str, Any]:
    x = torch.tensor([1.0, 2.0]) * (rank + 1)
    report = {
        "size": collectives.world_size(),
        "mean": collectives.mean_over_ranks(x).tolist(),
        "sum": collectives.sum_over_ranks(x).tolist(),
        "any": collectives.any_rank(rank == 1, CPU),
        "none": collectives.any_rank(False, CPU),
        "gathered": collectives.gather_objects({"rank": rank, "text": "a" * (10 + 100 * rank)}),
        "broadcast": collectives.broadcast_object({"from": rank}),
    }
    collectives.barrier()
    assert x.tolist() == [1.0 * (rank + 1), 2.0 * (rank + 1)], "the argument was changed"
    return report


def test_one_rank_needs_no_process_group() -> None:
    assert _everything(0) == {
        "size": 1,
        "mean": [1.0, 2.0],
        "sum": [1.0, 2.0],
        "any": False,
        "none": False,
        "gathered": [{"rank": 0, "text": "a" * 10}],
        "broadcast": {"from": 0},
    }


def _on_a_rank() -> dict[str, Any]:
    return _everything(env.start(env.read_launch(), TrainConfig(device="cpu")).rank)


def test_ranks_agree() -> None:
    expected = {
        "size": 2,
        "mean": [1.5, 3.0],
        "sum": [3.0, 6.0],
        "any": True,
        "none": False,
        "gathered": [{"rank": 0, "text": "a" * 10}, {"rank": 1, "text": "a" * 110}],
        "broadcast": {"from": 0},
    }
    assert run_ranks(_on_a_rank, 2) == [expected, expected]
