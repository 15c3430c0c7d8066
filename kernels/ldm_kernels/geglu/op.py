"""GEGLU: checks, choice of implementation, and the Triton kernels as operators that torch knows.

Default without a measured winner: the kernel wherever Triton serves the tensor, because it moves the fewest bytes that
the formula allows, and plain torch elsewhere.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import custom_op

from ldm_kernels.common import launch, tuning
from ldm_kernels.geglu import reference


def geglu(projection: Tensor, backend: str = "auto") -> Tensor:
    """value * gelu(gate) of the two halves of the last dimension, value first, gelu with the exact erf.

    `backend` is auto, triton or reference. The result is contiguous, except that reference keeps torch's own layout.

    Shapes: projection (..., 2D); returns (..., D).
    Raises: ValueError if the last dimension is missing or odd, or the backend unknown; TypeError if the tensor is not
    of a floating-point type, or "triton" cannot serve it.
    Source: arXiv:2002.05202, eq. 6.
    """
    if projection.dim() == 0 or projection.shape[-1] % 2:
        raise ValueError(
            f"geglu: projection of shape {tuple(projection.shape)} cannot be split into a value and a gate; its last "
            "dimension must be even: twice the width of the result"
        )
    if not projection.is_floating_point():
        raise TypeError(f"geglu: projection must be of a floating-point type, not {projection.dtype}; convert it")
    width = projection.shape[-1] // 2
    shape = {"batch": projection.shape[:-1].numel(), "width": width}
    chosen = tuning.choose("geglu", backend, ("triton", "reference"), projection, shape)
    if chosen is None:
        chosen = "triton" if tuning.serves(projection) else "reference"
    if chosen == "reference":
        launch.note_outcome("geglu", "reference")
        return reference.geglu(projection)
    out: Tensor = _geglu_fwd(projection)
    return out


@custom_op("ldm_kernels::geglu_fwd", mutates_args=())
def _geglu_fwd(projection: Tensor) -> Tensor:
    from ldm_kernels.geglu import kernel

    launch.note_outcome("geglu", "triton")
    return kernel.geglu_fwd(projection)


@_geglu_fwd.register_fake
def _geglu_fwd_fake(projection: Tensor) -> Tensor:
    return projection.new_empty((*projection.shape[:-1], projection.shape[-1] // 2))


@custom_op("ldm_kernels::geglu_bwd", mutates_args=())
def _geglu_bwd(dout: Tensor, projection: Tensor) -> Tensor:
    from ldm_kernels.geglu import kernel

    return kernel.geglu_bwd(dout, projection)


@_geglu_bwd.register_fake
def _geglu_bwd_fake(dout: Tensor, projection: Tensor) -> Tensor:
    return projection.new_empty(projection.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> Tensor:
    (projection,) = ctx.saved_tensors
    dprojection: Tensor = _geglu_bwd(dout, projection)
    return dprojection


_geglu_fwd.register_autograd(_backward, setup_context=_setup_context)
