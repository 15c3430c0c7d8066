"""GEGLU in one pass each way, over tiles of [rows, columns].

The two halves are read where the projection left them, so the split costs nothing, and the backward writes both halves
of one gradient, so no concatenation does either. Nothing is kept for the backward but the projection itself: gelu of
the gate is computed again, a few instructions an element in a kernel that waits for memory.

A tile is at most 256 columns wide, because the usual widths (1,280, 2,560, 5,120) are multiples of 256 but not of the
next powers of two; narrow layers get more rows instead.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ldm_kernels.common import launch
from ldm_kernels.common.launch import Launch

_ELEMENTS = 2048  # of one half, in a tile: two 16-byte vectors of a half type for each of 128 threads
_MAX_COLUMNS = 256


@triton.jit  # type: ignore[untyped-decorator]
def _geglu_fwd_kernel(
    p_projection: tl.tensor,  # (T, 2D), rows `stride` apart
    p_out: tl.tensor,  # (T, D)
    stride: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,  # D
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    num_column_blocks = tl.cdiv(width, BLOCK_COLUMNS)
    i_tile = tl.program_id(0)
    o_row = (i_tile // num_column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_column = (i_tile % num_column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (o_row < num_rows)[:, None] & (o_column < width)[None, :]

    p_value = p_projection + o_row[:, None] * stride + o_column[None, :]
    value = tl.load(p_value, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(p_value + width, mask=mask, other=0.0).to(tl.float32)
    # 0.7071... is 1 / sqrt(2): Phi(x) = (1 + erf(x / sqrt(2))) / 2.
    out = value * (gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)))
    tl.store(p_out + o_row[:, None] * width + o_column[None, :], out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _geglu_bwd_kernel(
    p_dout: tl.tensor,  # (T, D), rows `dout_stride` apart
    p_projection: tl.tensor,  # (T, 2D), rows `stride` apart
    p_dprojection: tl.tensor,  # (T, 2D)
    dout_stride: tl.tensor,
    stride: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,  # D
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    num_column_blocks = tl.cdiv(width, BLOCK_COLUMNS)
    i_tile = tl.program_id(0)
    o_row = (i_tile // num_column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_column = (i_tile % num_column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (o_row < num_rows)[:, None] & (o_column < width)[None, :]

    p_value = p_projection + o_row[:, None] * stride + o_column[None, :]
    dout = tl.load(p_dout + o_row[:, None] * dout_stride + o_column[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.load(p_value, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(p_value + width, mask=mask, other=0.0).to(tl.float32)
    # Phi and phi, the normal distribution and its density: gelu(x) = x Phi(x), gelu'(x) = Phi(x) + x phi(x).
    distribution = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)  # 1 / sqrt(2 pi)
    dvalue = dout * (gate * distribution)
    dgate = dout * value * (distribution + gate * density)

    p_dvalue = p_dprojection + o_row[:, None] * 2 * width + o_column[None, :]
    tl.store(p_dvalue, dvalue.to(p_dprojection.dtype.element_ty), mask=mask)
    tl.store(p_dvalue + width, dgate.to(p_dprojection.dtype.element_ty), mask=mask)


def geglu_fwd(projection: Tensor) -> Tensor:
    """value * gelu(gate), contiguous, in the projection's type.

    Shapes: projection (..., 2D); returns (..., D).
    """
    rows = _rows(projection)
    num_rows, width = rows.shape[0], rows.shape[1] // 2
    out = projection.new_empty((*projection.shape[:-1], width))
    grid, constants = _tiles(num_rows, width)
    launch.run(
        Launch(
            _geglu_fwd_kernel,
            grid,
            {
                "p_projection": rows,
                "p_out": out,
                "stride": rows.stride(0),
                "num_rows": num_rows,
                "width": width,
            },
            constants,
        )
    )
    return out


def geglu_bwd(dout: Tensor, projection: Tensor) -> Tensor:
    """The projection's gradient, contiguous, in its type.

    Shapes: dout (..., D), projection (..., 2D); returns (..., 2D).
    """
    drows, rows = _rows(dout), _rows(projection)
    num_rows, width = drows.shape
    dprojection = projection.new_empty(projection.shape)
    grid, constants = _tiles(num_rows, width)
    launch.run(
        Launch(
            _geglu_bwd_kernel,
            grid,
            {
                "p_dout": drows,
                "p_projection": rows,
                "p_dprojection": dprojection,
                "dout_stride": drows.stride(0),
                "stride": rows.stride(0),
                "num_rows": num_rows,
                "width": width,
            },
            constants,
        )
    )
    return dprojection


def _rows(x: Tensor) -> Tensor:
    """The tensor as (rows, last dimension) with neighbouring elements in a row: a view where the strides allow one."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _tiles(num_rows: int, width: int) -> tuple[tuple[int, ...], dict[str, int | bool | float | str | None]]:
    """Grid (one axis, which may pass 65,535; tiles of one row stay neighbours) and tile of an output this big."""
    columns = min(launch.next_power_of_2(width), _MAX_COLUMNS)
    rows = _ELEMENTS // columns
    grid = (launch.cdiv(num_rows, rows) * launch.cdiv(width, columns),)
    return grid, {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns}
