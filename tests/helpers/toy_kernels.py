"""Small kernels to try the ahead-of-time machinery on, and launches of them with tensors of the meta device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ldm_kernels.common import binary, compilation, launch
from ldm_kernels.common.binary import Figures
from ldm_kernels.common.launch import Launch

FACTOR = tl.constexpr(2.0)


@triton.jit
def scaled(x):
    return x * FACTOR


@triton.jit
def _toy_fwd_kernel(p_x, p_y, p_bias, size, factor, BLOCK: tl.constexpr):
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + o_x, mask=o_x < size, other=0.0).to(tl.float32)
    if p_bias is not None:
        x += tl.load(p_bias + o_x, mask=o_x < size, other=0.0)
    tl.store(p_y + o_x, scaled(x) * factor, mask=o_x < size)


@triton.jit
def _spilling_fwd_kernel(p_x, p_y, BLOCK: tl.constexpr):
    """Holds 512 numbers a thread, over a reduction that needs all of them first."""
    o_x = tl.arange(0, BLOCK)
    x = tl.load(p_x + o_x)
    tl.store(p_y + o_x, x / tl.sum(x, axis=0))


@triton.jit
def _product_fwd_kernel(p_a, p_b, p_c, stride, PRECISION: tl.constexpr):
    i = tl.arange(0, 32)
    a = tl.load(p_a + i[:, None] * stride + i[None, :])
    b = tl.load(p_b + i[:, None] * stride + i[None, :])
    tl.store(p_c + i[:, None] * stride + i[None, :], tl.dot(a, b, input_precision=PRECISION))


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def toy(size: int = 4096, x: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> Launch:
    """A copy with a factor, of as many elements; 16-byte vectors where size allows them."""
    x = meta(size) if x is None else x
    arguments = {"p_x": x, "p_y": meta(size), "p_bias": bias, "size": size, "factor": 0.5}
    return Launch(_toy_fwd_kernel, (launch.cdiv(size, 1024),), arguments, {"BLOCK": 1024})


def spilling() -> Launch:
    x = meta(65536, dtype=torch.float32)
    return Launch(_spilling_fwd_kernel, (1,), {"p_x": x, "p_y": x}, {"BLOCK": 65536})


def product(dtype: torch.dtype, precision: str) -> Launch:
    a, c = meta(32, 32, dtype=dtype), meta(32, 32, dtype=torch.float32)
    return Launch(_product_fwd_kernel, (1,), {"p_a": a, "p_b": a, "p_c": c, "stride": 32}, {"PRECISION": precision})


def figures(launched: Launch, architecture: int) -> Figures:
    """What the launch's binary uses."""
    return binary.figures_of(compilation.specialize(launched, architecture).compiled())
