"""Moving averages of many tensors in one launch, several decays in the same pass.

A launch covers a list of tensors through two tables on the device: a row per tensor with its size and the addresses of
its weights and averages, and an entry per block that says which tensor and which part of it. The tables hang on the
addresses alone, so they are built once for a set of tensors and kept; the decays are plain numbers of each launch.

Launches take four elements at a time (16 bytes of fp32) where every address of a tensor allows it and one at a time
elsewhere: a fragment of a flat buffer may start anywhere. The last one to three elements of a tensor count as a tensor
of their own for the second kind, because a vector must be wholly inside or wholly outside. Half types get 8-byte
vectors: wider ones would put an element into another thread than its average, and pay a trip through shared memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_kernels.common import launch
from ldm_kernels.common.launch import Launch

_BLOCK = 4096  # elements of a block: 16 for each of 256 threads
_MAX_DECAYS = 4  # in one pass; more take another pass over the weights
_VECTOR = 4  # elements that a thread moves at once
_MAX_TABLES = 8  # sets of tensors remembered: a run has one, or one for each optimizer
_TYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit  # type: ignore[untyped-decorator]
def _ema_update_kernel(
    p_tensors: tl.tensor,  # (T, 2 + NUM_DECAYS) int64: size, address of the weights, address of each average
    p_blocks: tl.tensor,  # (B, 2) int32: row of p_tensors, which block of that tensor
    rate_0: tl.tensor,  # 1 - decay; those beyond NUM_DECAYS are not used
    rate_1: tl.tensor,
    rate_2: tl.tensor,
    rate_3: tl.tensor,
    WEIGHT_TYPE: tl.constexpr,  # "fp32", "fp16" or "bf16"
    NUM_DECAYS: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that every address and size is a multiple of: 4 or 1
    BLOCK: tl.constexpr,
) -> None:
    i_block = tl.program_id(0).to(tl.int64)
    i_tensor = tl.load(p_blocks + 2 * i_block)
    i_part = tl.load(p_blocks + 2 * i_block + 1)
    p_row = p_tensors + i_tensor.to(tl.int64) * (2 + NUM_DECAYS)
    size = tl.multiple_of(tl.load(p_row), VECTOR)
    o_element = i_part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_element < size

    address = tl.load(p_row + 1)
    if WEIGHT_TYPE == "fp32":
        p_weight = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 4 * VECTOR)
    elif WEIGHT_TYPE == "fp16":
        p_weight = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 2 * VECTOR)
    else:
        p_weight = tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 2 * VECTOR)
    weight = tl.load(p_weight + o_element, mask=mask, other=0.0).to(tl.float32)

    for i in tl.static_range(NUM_DECAYS):
        if i == 0:
            rate = rate_0
        elif i == 1:
            rate = rate_1
        elif i == 2:
            rate = rate_2
        else:
            rate = rate_3
        p_average = tl.multiple_of(tl.load(p_row + 2 + i).to(tl.pointer_type(tl.float32)), 4 * VECTOR)
        average = tl.load(p_average + o_element, mask=mask, other=0.0)
        # From the nearer end, as torch.lerp: exact at both, and no cancellation near the weight.
        difference = weight - average
        updated = tl.where(rate < 0.5, average + rate * difference, weight - difference * (1.0 - rate))
        tl.store(p_average + o_element, updated, mask=mask)


@dataclass(frozen=True)
class _Table:
    """The tensors that one launch covers."""

    weight_type: torch.dtype
    vector: int
    tensors: Tensor  # (T, 2 + decays) int64
    blocks: Tensor  # (B, 2) int32


class _Run(NamedTuple):
    """Neighbouring elements that the kernel takes as one tensor."""

    size: int
    addresses: list[int]  # of the weights, then of each average


_Key = tuple[object, ...]
_tables: OrderedDict[_Key, list[_Table]] = OrderedDict()
_captured: list[list[_Table]] = []  # a CUDA graph holds their addresses for as long as it lives


def ema_update_(averages: Sequence[Sequence[Tensor]], weights: Sequence[Tensor], decays: Sequence[float]) -> None:
    """average <- decay * average + (1 - decay) * weight for each decay's averages, in place.

    Shapes: averages one list per decay, fp32; weights; every list in the same order and sizes, in the same layout.
    """
    for first in range(0, len(decays), _MAX_DECAYS):
        some = slice(first, first + _MAX_DECAYS)
        rates = [1.0 - decay for decay in decays[some]]
        rates += [0.0] * (_MAX_DECAYS - len(rates))
        for table in _tables_of(averages[some], weights):
            launch.run(
                Launch(
                    _ema_update_kernel,
                    (table.blocks.shape[0],),
                    {
                        "p_tensors": table.tensors,
                        "p_blocks": table.blocks,
                        **{f"rate_{i}": rate for i, rate in enumerate(rates)},
                    },
                    {
                        "WEIGHT_TYPE": _TYPE_NAMES[table.weight_type],
                        "NUM_DECAYS": len(decays[some]),
                        "VECTOR": table.vector,
                        "BLOCK": _BLOCK,
                    },
                    num_warps=8,
                )
            )


def _tables_of(averages: Sequence[Sequence[Tensor]], weights: Sequence[Tensor]) -> list[_Table]:
    """The tables of these tensors, from memory if their addresses and sizes were met before."""
    rows = list(zip(weights, *averages, strict=True))
    if not rows or rows[0][0].is_meta:
        return _build(rows)
    key: _Key = (
        weights[0].device,
        len(averages),
        *((row[0].numel(), row[0].dtype, *(x.data_ptr() for x in row)) for row in rows),
    )
    capturing = weights[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if key in _tables:
        _tables.move_to_end(key)
    elif capturing:
        raise RuntimeError(
            "ema_update: these tensors are met for the first time while a CUDA graph is captured, and the table of "
            "their addresses cannot be copied there; call ema_update on them once before the capture"
        )
    else:
        _tables[key] = _build(rows)
        if len(_tables) > _MAX_TABLES:
            _forget(_tables.popitem(last=False)[1])
    if capturing:
        _captured.append(_tables[key])
    return _tables[key]


def _forget(tables: Sequence[_Table]) -> None:
    """Lets go of tables that kernels on the current stream may still be reading."""
    for table in tables:
        for tensor in (table.tensors, table.blocks):
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _build(rows: Sequence[tuple[Tensor, ...]]) -> list[_Table]:
    groups: dict[tuple[torch.dtype, int], list[_Run]] = {}
    for row in rows:
        size, steps = row[0].numel(), [x.element_size() for x in row]
        addresses = [_address(x) for x in row]
        body = 0
        if all(address % (_VECTOR * step) == 0 for address, step in zip(addresses, steps, strict=True)):
            body = size - size % _VECTOR
        if body:
            groups.setdefault((row[0].dtype, _VECTOR), []).append(_Run(body, addresses))
        if body < size:
            tail = [address + body * step for address, step in zip(addresses, steps, strict=True)]
            groups.setdefault((row[0].dtype, 1), []).append(_Run(size - body, tail))
    return [_table(dtype, vector, runs, rows[0][0].device) for (dtype, vector), runs in groups.items()]


def _address(x: Tensor) -> int:
    # A tensor of the meta device has none; torch's allocators start on multiples of 16.
    return int(x.storage_offset()) * x.element_size() if x.is_meta else x.data_ptr()


def _table(weight_type: torch.dtype, vector: int, runs: Sequence[_Run], device: torch.device) -> _Table:
    counts = [launch.cdiv(run.size, _BLOCK) for run in runs]
    if device.type == "meta":
        tensors = torch.empty(len(runs), 1 + len(runs[0].addresses), dtype=torch.int64, device=device)
        return _Table(weight_type, vector, tensors, torch.empty(sum(counts), 2, dtype=torch.int32, device=device))
    tensors = torch.tensor([(run.size, *run.addresses) for run in runs], dtype=torch.int64)
    owners = torch.arange(len(runs)).repeat_interleave(torch.tensor(counts))
    parts = torch.cat([torch.arange(count) for count in counts])
    blocks = torch.stack([owners, parts], dim=1).to(torch.int32)
    return _Table(weight_type, vector, tensors.to(device), blocks.to(device))
