"""The nearest code of every vector, in plain torch; what devices without Triton train with.

Vectors are taken a few rows at a time, so that the matrix of all distances never exists: at most 2**22 pairs at once,
which is 32 MiB. Narrow vectors (up to 8, the usual case) sum (z - e)^2 as it stands, in their own precision and at
least fp32. Wider ones use |e|^2 - 2 z.e, a matrix product, in float64: that leaves the cancellation in it without
effect, and neither autocast nor TF32 touches it.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_DIRECT_WIDTH = 8
_PAIRS = 2**22  # at once: two fp32 matrices, or one float64, of 32 MiB in all; float64 vectors take twice that


def vector_quantize(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """(codebook[indices], indices): the code nearest to each row of z, the lowest index among equally near ones.

    Shapes: z (N, D), codebook (K, D); returns (N, D) in the codebook's type, and (N,) int64.
    Source: arXiv:1711.00937, eq. 1 and 2.
    """
    indices = nearest_codes(z.detach(), codebook.detach())
    return gather(codebook, indices), indices


def gather(codebook: Tensor, indices: Tensor) -> Tensor:
    """codebook[indices], whose gradient is summed in a fixed order.

    By plain indexing in fp32 at least: its backward sorts the indices and adds up each code's rows in their order. An
    embedding's (above 3,072 indices on CUDA) and index_select's use atomics, and a half type would round every row.
    """
    wide = torch.promote_types(codebook.dtype, torch.float32)
    return codebook.to(wide)[indices].to(codebook.dtype)


def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """The index of the code nearest to each row, without a gradient; the lowest among equally near ones.

    A row that is not finite takes code 0. Any other row takes the first code that is not finite, if there is one, as
    `argmin` has it: bad weights must show in the result. A vector counts as finite if its squared norm in fp32 is.

    Shapes: z (N, D), codebook (K, D); returns (N,) int64.
    """
    direct = z.shape[1] <= MAX_DIRECT_WIDTH
    dtype = torch.promote_types(torch.promote_types(z.dtype, codebook.dtype), torch.float32)
    if not direct:
        dtype = torch.float64
    codes = codebook.to(dtype)
    squares = codes.square().sum(dim=1)
    distances = _direct if direct else _expanded
    chunks = torch.split(z, max(1, _PAIRS // len(codes)))
    indices = torch.cat([distances(chunk.to(dtype), codes, squares).argmin(dim=1) for chunk in chunks])

    bad_codes = ~_finite(codebook)
    first_bad = bad_codes.to(torch.uint8).argmax()
    indices = torch.where(bad_codes.any(), first_bad, indices)
    return torch.where(_finite(z), indices, 0)


def _direct(rows: Tensor, codes: Tensor, squares: Tensor) -> Tensor:
    """|z - e|^2 of every pair, dimension by dimension."""
    distances = torch.zeros(len(rows), len(codes), dtype=rows.dtype, device=rows.device)
    for row, code in zip(rows.unbind(1), codes.unbind(1), strict=True):
        distances += (row[:, None] - code).square_()
    return distances


def _expanded(rows: Tensor, codes: Tensor, squares: Tensor) -> Tensor:
    """|e|^2 - 2 z.e of every pair: the squared distance less |z|^2, which moves no minimum."""
    return torch.addmm(squares, rows, codes.T, alpha=-2)


def _finite(vectors: Tensor) -> Tensor:
    return vectors.float().square().sum(dim=1).isfinite()
