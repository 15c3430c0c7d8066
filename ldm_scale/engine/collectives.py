"""The few collectives that the trainer needs beside ZeRO's own; each is a no-op on one rank."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from ldm_scale.engine import phases


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def mean_over_ranks(x: Tensor) -> Tensor:
    """x averaged over all ranks, on every rank; x itself is unchanged. Collective: all ranks."""
    return sum_over_ranks(x) / world_size()


def sum_over_ranks(x: Tensor) -> Tensor:
    """x summed over all ranks, on every rank; x itself is unchanged. Collective: all ranks."""
    phases.meet()
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. Collective: all ranks."""
    phases.meet()
    if world_size() == 1:
        return flag
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item() > 0)


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank. Collective: all ranks."""
    phases.meet()
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_on_main(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on rank 0; nothing on the others. Collective: all ranks."""
    phases.meet()
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank. Collective: all ranks."""
    phases.meet()
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Returns when all ranks have called it. Collective: all ranks."""
    if world_size() > 1:
        dist.barrier()


def num_begun() -> int:
    """Collectives that this rank has begun, over all process groups; 0 where torch does not tell.

    Ranks begin the same ones in the same order, so that the rank with fewer is the one that others wait for.
    """
    try:
        groups: list[Any] = list(c10d._world.pg_map)
        return sum(group._get_sequence_number_for_group() for group in groups)
    except (AttributeError, RuntimeError):
        return 0


def set_time_limit(limit: timedelta) -> None:
    """Nothing; collectives of all process groups that exist fail after that time, and not earlier."""
    set_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout  # the first is torch 2.14's
    for group in list(c10d._world.pg_map):
        set_timeout(limit, group)
