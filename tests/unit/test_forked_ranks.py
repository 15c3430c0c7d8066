"""Ranks of tests are forks of pytest's process: they must be able to train whatever tests ran there before."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.ranks import run_ranks


def _gradient() -> float:
    x = torch.ones(1, requires_grad=True)
    (3 * x).backward()
    assert x.grad is not None
    return float(x.grad)


def test_ranks_train_after_fake_tensors_and_a_backward_pass_here() -> None:
    with FakeTensorMode():
        torch.empty(1)
    assert _gradient() == 3.0
    assert run_ranks(_gradient, 2) == [3.0, 3.0]
