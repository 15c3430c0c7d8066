"""Scaled dot-product attention behind one function: which implementation a call takes, and our kernels as torch ops.

"auto" takes the measured winner for the shape; without one, torch's own `scaled_dot_product_attention`, which picks
among flash, cuDNN and memory-efficient kernels and is the strongest baseline that is known on every GPU: our kernels
must be measured faster before they replace it. It never gets a mask, the case in which it is slow or was wrong. On the
CPU it has a fused kernel too. In Triton's interpreter, which exists to test kernels, "auto" takes them where it can.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_kernels.attention import reference
from ldm_kernels.attention.tables import MAX_HEAD_DIM, serves_cross
from ldm_kernels.common import launch, tuning

BACKENDS = ("triton", "sdpa", "xformers", "reference")
_HAS_XFORMERS = importlib.util.find_spec("xformers") is not None  # asks, and imports nothing


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto", scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v; scale None is 1 / sqrt(head_dim). No mask, no dropout.

    The three are of one type; under autocast they are taken in autocast's. Views with any strides are allowed, and
    read in place where the head dim's elements lie side by side. `backend`: auto, triton, sdpa, xformers or reference.

    Shapes: q (B, heads, queries, head_dim); k, v (B, heads, keys, head_dim); returns q's shape, its strides being the
    implementation's.
    Raises: TypeError or ValueError if the tensors do not go together, or the backend asked for does not serve them;
    ImportError if it is xformers and that is not installed.
    Source: arXiv:1706.03762, eq. 1; the tiled forward and backward: arXiv:2205.14135, arXiv:2307.08691.
    """
    q, k, v = _in_autocast_type(q), _in_autocast_type(k), _in_autocast_type(v)
    _check(q, k, v)
    shape = {
        "queries": q.shape[2],
        "keys": k.shape[2],
        "head_dim": q.shape[3],
        "batch": max(1, q.shape[0] * q.shape[1]),
    }
    path = tuning.choose("attention", backend, BACKENDS, q, shape)
    if backend == "auto" and (path is None or not _available(path, q, k)):
        path = "triton" if launch.INTERPRETED and tuning.serves(q) and kernel_for(q, k) else "sdpa"
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if path == "triton":
        return _triton(q, k, v, scale)
    launch.note_outcome("attention", str(path))
    if path == "xformers":
        return _xformers(q, k, v, scale)
    if path == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return reference.attention(q, k, v, scale)


def xformers_operator(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The name of the operator that xformers chooses for these tensors, or "unknown" where it cannot be asked.

    It matters to who reads a timing: the same call is FlashAttention-3, FlashAttention-2 or CUTLASS by what was built.
    """
    try:
        from xformers.ops import fmha
        from xformers.ops.fmha import dispatch

        inputs = fmha.Inputs(*(x.transpose(1, 2) for x in (q, k, v)))
        return str(dispatch._dispatch_fw(inputs, needs_gradient=True).NAME)
    except (ImportError, AttributeError, TypeError, NotImplementedError):
        return "unknown"  # the question has no public form, and changes with the release


def _in_autocast_type(x: Tensor) -> Tensor:
    """As autocast casts the arguments of torch's own attention."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))  # itself if it has that type


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"attention: q has {q.dim()} dimensions and k {k.dim()}, but both must have four: (B, heads, tokens, "
            "head_dim); split the heads with view and transpose"
        )
    if not q.is_floating_point() or q.shape[3] == 0:
        raise TypeError(
            f"attention: q is {tuple(q.shape)} of {q.dtype}, but tensors must be of a floating-point type with a head "
            "dim of at least 1; convert or reshape them"
        )
    if v.shape != k.shape or (q.shape[:2], q.shape[3]) != (k.shape[:2], k.shape[3]):
        raise ValueError(
            f"attention: q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, but k and v must be of one "
            "shape and differ from q in the number of tokens (dimension 2) alone; expand or reshape them"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise TypeError(
            f"attention: q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}, v {v.dtype} on {v.device}, but they "
            "must share type and device; convert them with .to(q)"
        )


def _available(path: str, q: Tensor, k: Tensor) -> bool:
    """Whether a measured winner can run here: a table outlives the packages that it was measured with."""
    if path == "xformers":
        return _HAS_XFORMERS
    return path != "triton" or kernel_for(q, k) is not None


def kernel_for(q: Tensor, k: Tensor) -> str | None:
    """Which of our kernels serves the shape: "cross" (few keys, kept on the chip), "self" (any number), or none."""
    keys, head_dim = k.shape[2:]
    if keys == 0 or not 0 < head_dim <= MAX_HEAD_DIM:
        return None
    return "cross" if serves_cross(head_dim, keys, q.dtype, launch.architecture(q)) else "self"


def _triton(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    kernel = kernel_for(q, k)
    if kernel is None:
        raise ValueError(
            f"attention: backend 'triton' serves head dims 1 to {MAX_HEAD_DIM} and at least one key, not head dim "
            f"{q.shape[3]} and {k.shape[2]} keys; take backend 'auto' or 'sdpa'"
        )
    if scale < 0:
        q, scale = -q, -scale  # the kernels find a row's largest score before they scale it
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out: Tensor = cross_attention_fwd(q, k, v, scale) if kernel == "cross" else attention_fwd(q, k, v, scale)[0]
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if not q.is_cuda:
        raise TypeError(
            f"attention: backend 'xformers' needs CUDA tensors, and these are on {q.device.type!r}; take backend "
            "'auto' or 'sdpa'"
        )
    return _memory_efficient_attention(q, k, v, scale)


def _memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """xformers' attention, whose layout is (B, tokens, heads, head_dim)."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ImportError(
            "attention: backend 'xformers' needs the package xformers, which cannot be imported here "
            f"({error}); install it (pip install xformers) or take backend 'auto' or 'sdpa'"
        ) from error
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = memory_efficient_attention(q, k, v, scale=scale)
    return out.transpose(1, 2)


@torch.library.custom_op("ldm_kernels::attention_fwd", mutates_args=())
def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result, and fp32 log2 of each softmax's denominator; see kernel.attention_fwd."""
    from ldm_kernels.attention import kernel

    launch.note_outcome("attention", "triton self")
    return kernel.attention_fwd(q, k, v, scale)


@torch.library.custom_op("ldm_kernels::attention_bwd", mutates_args=())
def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; see kernel.attention_bwd."""
    from ldm_kernels.attention import kernel

    return kernel.attention_bwd(dout, q, k, v, out, lse, scale)


@torch.library.custom_op("ldm_kernels::cross_attention_fwd", mutates_args=())
def cross_attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The result, for few keys; see cross_kernel.cross_attention_fwd."""
    from ldm_kernels.attention import cross_kernel

    launch.note_outcome("attention", "triton cross")
    return cross_kernel.cross_attention_fwd(q, k, v, scale)


@torch.library.custom_op("ldm_kernels::cross_attention_bwd", mutates_args=())
def cross_attention_bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; see cross_kernel.cross_attention_bwd."""
    from ldm_kernels.attention import cross_kernel

    return cross_kernel.cross_attention_bwd(dout, q, k, v, scale)


def _tokens_first(x: Tensor) -> Tensor:
    """A fake tensor of x's shape (B, H, tokens, D), laid out as (B, tokens, H, D)."""
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


@attention_fwd.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _tokens_first(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@attention_bwd.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _tokens_first(q), _tokens_first(k), _tokens_first(v)


@cross_attention_fwd.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _tokens_first(q)


@cross_attention_bwd.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return _tokens_first(q), _tokens_first(k), _tokens_first(v)


def _save_self(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)


def _differentiate_self(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v, out, lse = ctx.saved_tensors
    return *attention_bwd(dout, q, k, v, out, lse, ctx.scale), None


def _save_cross(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v)


def _differentiate_cross(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v = ctx.saved_tensors
    return *cross_attention_bwd(dout, q, k, v, ctx.scale), None


attention_fwd.register_autograd(_differentiate_self, setup_context=_save_self)
cross_attention_fwd.register_autograd(_differentiate_cross, setup_context=_save_cross)
