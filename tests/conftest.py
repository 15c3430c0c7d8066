"""What every test gets: one thread per process (several ranks share two cores), a fixed seed, the log of rank 0."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# Before torch is imported, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import torch.distributed as dist

from ldm_scale.telemetry.log import get_logger

torch.set_num_threads(1)

# Autograd counts devices at its first backward pass. FakeTensorMode makes it count a GPU that is not there and start
# threads that no fork survives: this pass counts before any test does, so that forked ranks can train.
torch.ones(1, requires_grad=True).backward()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def log_of_rank_0() -> None:
    """Whatever a test before has made of it in this process."""
    get_logger(0)


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """Tests start process groups in forks (tests/helpers/ranks.py): threads of gloo here would stall later forks."""
    yield
    groups = sys.modules.get("deepspeed.utils.groups")  # which would be those of an ended process group in later forks
    assert not dist.is_initialized(), "the test has started a process group in pytest's own process"
    assert groups is None or groups._WORLD_GROUP is None, "the test has trained in pytest's own process; use run_ranks"
