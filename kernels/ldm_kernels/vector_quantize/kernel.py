"""The nearest code of every vector: a block of rows against all codes, one tile of codes after another.

Each pair of a row and a place in the tile keeps its own least score and the tile that it came from, so a tile costs
three instructions a pair beside the score and no reduction; the one reduction comes after the last tile. A later tile
must be strictly nearer to win, and the reduction takes the lowest index, which together is the lowest index among ties.

Two ways to a score:
- up to 8 dimensions, |z - e|^2 as it stands: 2D + 3 fp32 instructions a pair, and an error relative to the distance
  itself. A tile is 32 codes wide: each lane owns one code and reads it straight from memory, the block's rows stay in
  registers, and the loop has neither shared memory nor a barrier in it.
- beyond, |e|^2 - 2 z.e through `tl.dot`. input_precision is "ieee": the product is as good as fp32 on the plain cores,
  and its error can be bounded on paper. TF32 would flip the nearest code; "tf32x3" might be faster, but its error is
  larger and nothing without a GPU shows it. The width is padded to 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_kernels.common import launch
from ldm_kernels.common.launch import Launch
from ldm_kernels.vector_quantize.reference import MAX_DIRECT_WIDTH


@triton.jit  # type: ignore[untyped-decorator]
def _nearest_codes_direct_kernel(
    p_z: tl.tensor,  # (N, D)
    p_codebook: tl.tensor,  # (K, D)
    p_indices: tl.tensor,  # (N,) int64
    z_row_stride: tl.tensor,
    z_column_stride: tl.tensor,
    code_row_stride: tl.tensor,
    code_column_stride: tl.tensor,
    num_rows: tl.tensor,
    num_codes: tl.tensor,
    WIDTH: tl.constexpr,  # D
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
) -> None:
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row = o_row < num_rows
    p_row = p_z + o_row * z_row_stride

    row_square = tl.zeros([BLOCK_ROWS], tl.float32)
    for i in tl.static_range(WIDTH):
        z = tl.load(p_row + i * z_column_stride, mask=m_row, other=0.0).to(tl.float32)
        row_square += z * z

    least = tl.full([BLOCK_ROWS, BLOCK_CODES], float("inf"), tl.float32)
    least_start = tl.zeros([BLOCK_ROWS, BLOCK_CODES], tl.int32)
    bad = tl.full([BLOCK_CODES], 2147483647, tl.int32)  # the first code that is not finite, by place in the tile
    for start in range(0, num_codes, BLOCK_CODES):
        o_code = start + tl.arange(0, BLOCK_CODES)
        m_code = o_code < num_codes
        p_code = p_codebook + o_code.to(tl.int64) * code_row_stride
        code_square = tl.zeros([BLOCK_CODES], tl.float32)
        distance = tl.zeros([BLOCK_ROWS, BLOCK_CODES], tl.float32)
        for i in tl.static_range(WIDTH):
            # Loaded here, and moved out of the loop by the compiler, which has nothing else to name D registers with.
            z = tl.load(p_row + i * z_column_stride, mask=m_row, other=0.0).to(tl.float32)
            # Places beyond the last code are infinitely far.
            code = tl.load(p_code + i * code_column_stride, mask=m_code, other=float("inf")).to(tl.float32)
            code_square += code * code
            difference = z[:, None] - code[None, :]
            distance += difference * difference
        nearer = distance < least
        least = tl.where(nearer, distance, least)
        least_start = tl.where(nearer, start, least_start)
        bad = tl.where(m_code & ~(code_square < float("inf")), tl.minimum(bad, o_code), bad)

    least_of_row = tl.min(least, axis=1)
    candidates = least_start + tl.arange(0, BLOCK_CODES)[None, :]
    index = tl.min(tl.where(least == least_of_row[:, None], candidates, 2147483647), axis=1)
    first_bad = tl.min(bad, axis=0)
    index = tl.where(first_bad < num_codes, first_bad, index)
    index = tl.where(row_square < float("inf"), index, 0)
    tl.store(p_indices + o_row, index.to(tl.int64), mask=m_row)


@triton.jit  # type: ignore[untyped-decorator]
def _nearest_codes_dot_kernel(
    p_z: tl.tensor,  # (N, D)
    p_codebook: tl.tensor,  # (K, D)
    p_indices: tl.tensor,  # (N,) int64
    z_row_stride: tl.tensor,
    z_column_stride: tl.tensor,
    code_row_stride: tl.tensor,
    code_column_stride: tl.tensor,
    num_rows: tl.tensor,
    num_codes: tl.tensor,
    width: tl.tensor,  # D
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_row = o_row < num_rows
    p_row = p_z + o_row[:, None] * z_row_stride

    row_square = tl.zeros([BLOCK_ROWS], tl.float32)
    for offset in range(0, width, BLOCK_WIDTH):
        o_width = (offset + tl.arange(0, BLOCK_WIDTH)).to(tl.int64)
        mask = m_row[:, None] & (o_width < width)[None, :]
        z = tl.load(p_row + o_width[None, :] * z_column_stride, mask=mask, other=0.0).to(tl.float32)
        row_square += tl.sum(z * z, axis=1)

    least = tl.full([BLOCK_ROWS, BLOCK_CODES], float("inf"), tl.float32)
    least_start = tl.zeros([BLOCK_ROWS, BLOCK_CODES], tl.int32)
    bad = tl.full([BLOCK_CODES], 2147483647, tl.int32)  # the first code that is not finite, by place in the tile
    for start in range(0, num_codes, BLOCK_CODES):
        o_code = start + tl.arange(0, BLOCK_CODES)
        m_code = o_code < num_codes
        p_code = p_codebook + o_code.to(tl.int64)[None, :] * code_row_stride
        code_square = tl.zeros([BLOCK_CODES], tl.float32)
        product = tl.zeros([BLOCK_ROWS, BLOCK_CODES], tl.float32)
        for offset in range(0, width, BLOCK_WIDTH):
            o_width = (offset + tl.arange(0, BLOCK_WIDTH)).to(tl.int64)
            m_width = o_width < width
            z = tl.load(
                p_row + o_width[None, :] * z_column_stride, mask=m_row[:, None] & m_width[None, :], other=0.0
            ).to(tl.float32)
            code = tl.load(
                p_code + o_width[:, None] * code_column_stride, mask=m_code[None, :] & m_width[:, None], other=0.0
            ).to(tl.float32)
            product = tl.dot(z, code, product, input_precision="ieee")
            code_square += tl.sum(code * code, axis=0)
        score = tl.where(m_code, code_square, float("inf"))[None, :] - 2.0 * product
        nearer = score < least
        least = tl.where(nearer, score, least)
        least_start = tl.where(nearer, start, least_start)
        bad = tl.where(m_code & ~(code_square < float("inf")), tl.minimum(bad, o_code), bad)

    least_of_row = tl.min(least, axis=1)
    candidates = least_start + tl.arange(0, BLOCK_CODES)[None, :]
    index = tl.min(tl.where(least == least_of_row[:, None], candidates, 2147483647), axis=1)
    first_bad = tl.min(bad, axis=0)
    index = tl.where(first_bad < num_codes, first_bad, index)
    index = tl.where(row_square < float("inf"), index, 0)
    tl.store(p_indices + o_row, index.to(tl.int64), mask=m_row)


def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """The index of the code nearest to each row; the lowest among equally near ones. Allocates nothing else.

    Shapes: z (N, D), codebook (K, D), any strides; returns (N,) int64.
    """
    num_rows, width = z.shape
    indices = torch.empty(num_rows, dtype=torch.int64, device=z.device)
    arguments: dict[str, Tensor | int | float | None] = {
        "p_z": z,
        "p_codebook": codebook,
        "p_indices": indices,
        "z_row_stride": z.stride(0),
        "z_column_stride": z.stride(1),
        "code_row_stride": codebook.stride(0),
        "code_column_stride": codebook.stride(1),
        "num_rows": num_rows,
        "num_codes": codebook.shape[0],
    }
    if width <= MAX_DIRECT_WIDTH:
        rows = _direct_rows(num_rows, width)
        constants: dict[str, int | bool | float | str | None]
        constants = {"WIDTH": width, "BLOCK_ROWS": rows, "BLOCK_CODES": 32}
        launch.run(
            Launch(_nearest_codes_direct_kernel, (launch.cdiv(num_rows, rows),), arguments, constants, num_warps=4)
        )
    else:
        constants = {"BLOCK_ROWS": 64, "BLOCK_CODES": 64, "BLOCK_WIDTH": 16}
        arguments["width"] = width
        launch.run(Launch(_nearest_codes_dot_kernel, (launch.cdiv(num_rows, 64),), arguments, constants, num_warps=8))
    return indices


def _direct_rows(num_rows: int, width: int) -> int:
    """Rows of a block: a quarter of them, times the width, is held in each thread's registers.

    Few rows in all are cut finer, so that more multiprocessors get a block.
    """
    rows = 64 if width <= 4 else 32
    return rows if num_rows >= 16384 else 16
