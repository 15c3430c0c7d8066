"""Which implementation an operation takes: what the caller asked for, or a table of measured winners.

The table (`winners.json`) is written by the benchmarks on a GPU, one row per (GPU, operation, shape, type) in which an
implementation was at least 1.05 times as fast as the next best. A shape without a row takes the operation's default,
which its op.py states with its reason; no row is ever guessed for another GPU or type.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_kernels.common import launch

WINNERS = Path(__file__).with_name("winners.json")
# A row of one GPU and type: its dimensions by name, and the implementation that won.
Row = tuple[tuple[tuple[str, int], ...], str]

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def choose(
    operation: str, backend: str, allowed: Sequence[str], tensor: Tensor, shape: Mapping[str, int]
) -> str | None:
    """The implementation for this call, or None where "auto" has no measured winner and the default applies.

    `shape` names the dimensions that decide, with those that only scale the work under "batch".

    Raises: ValueError if backend is neither "auto" nor in `allowed`; TypeError if "triton" is asked for a tensor that
    no kernel serves.
    """
    if backend != "auto":
        if backend not in allowed:
            raise ValueError(f"{operation}: backend {backend!r} is unknown; take one of auto, {', '.join(allowed)}")
        if backend == "triton":
            require_kernels(operation, tensor)
        return backend
    if not tensor.is_cuda:
        return None
    return _match(_rows(operation, tensor.device.index or 0, str(tensor.dtype)), shape)


def serves(tensor: Tensor) -> bool:
    """Whether the Triton kernels can take this tensor: its device and its type.

    The interpreter's bfloat16 is wrong (stores truncate, matrix products are nonsense), so "auto" never asks for it.
    """
    interpreted = launch.INTERPRETED and not tensor.is_cuda
    return (
        launch.runs_kernels(tensor)
        and tensor.dtype in KERNEL_DTYPES
        and not (interpreted and tensor.dtype == torch.bfloat16)
    )


def require_kernels(operation: str, tensor: Tensor) -> None:
    """Raises: TypeError if the Triton kernels cannot take this tensor, with the reason and the way out."""
    if tensor.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"{operation}: backend 'triton' serves float32, float16 and bfloat16, not {tensor.dtype}; "
            "convert the tensor or take backend 'auto'"
        )
    if not launch.runs_kernels(tensor):
        raise TypeError(
            f"{operation}: backend 'triton' needs the package triton and a tensor on a CUDA device of compute "
            f"capability 8.0 or more, and this one is on {tensor.device.type!r}; take backend 'auto', or set "
            "TRITON_INTERPRET=1 before starting Python to interpret the kernels (slow)"
        )


@launch.constant_when_compiled
def _rows(operation: str, device: int, dtype: str) -> tuple[Row, ...]:
    return _rows_on(operation, torch.cuda.get_device_name(device), dtype.removeprefix("torch."))


@functools.cache
def _rows_on(operation: str, gpu: str, dtype: str) -> tuple[Row, ...]:
    """The rows of exactly this GPU and type."""
    return tuple(
        (tuple((name, int(size)) for name, size in row["shape"].items()), str(row["backend"]))
        for row in _winners().get(operation, ())
        if (row["gpu"], row["dtype"]) == (gpu, dtype)
    )


def _match(rows: tuple[Row, ...], shape: Mapping[str, int]) -> str | None:
    """The backend of the row of exactly this shape, of the nearest batch among several; None without one.

    Plain comparisons, so that a compiler that traces this with symbolic sizes can guard on them.
    """
    winner, nearest = None, 0.0
    for dimensions, backend in rows:
        if all(shape.get(name) == size for name, size in dimensions if name != "batch"):
            batch = dict(dimensions).get("batch", 1)
            distance = max(batch / shape.get("batch", 1), shape.get("batch", 1) / batch)
            if winner is None or distance < nearest:
                winner, nearest = backend, distance
    return winner


def _winner_on(operation: str, gpu: str, dtype: str, shape: Mapping[str, int]) -> str | None:
    return _match(_rows_on(operation, gpu, dtype), shape)


@functools.cache
def _winners() -> dict[str, list[dict[str, Any]]]:
    table: dict[str, list[dict[str, Any]]] = json.loads(WINNERS.read_text())
    return table
