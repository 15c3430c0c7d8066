"""Vector quantisation: checks, choice of implementation, and the search as an operator that torch knows.

Default without a measured winner: the kernel wherever Triton serves both tensors, because plain torch has to write and
read every distance, and plain torch elsewhere. Only the search is an operator of our own; the gather after it is
torch's, with its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from ldm_kernels.common import launch, tuning
from ldm_kernels.vector_quantize import reference


def vector_quantize(z: Tensor, codebook: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(quantized, indices): the code nearest to each row of z, the lowest index among equally near ones.

    The gradient of `quantized` goes to the codebook alone, summed in a fixed order; `indices` have none. A row that is
    not finite takes code 0; otherwise a codebook that is not finite answers with its first such code. `backend` is
    auto, triton or reference.

    Shapes: z (N, D), codebook (K, D), any strides; returns (N, D) in the codebook's type, and (N,) int64.
    Raises: ValueError if the shapes do not go together, or the backend is unknown; TypeError if a tensor is not of a
    floating-point type, or "triton" cannot serve it.
    Source: arXiv:1711.00937, eq. 1 and 2.
    """
    _check(z, codebook)
    shape = {"batch": z.shape[0], "codes": codebook.shape[0], "dim": z.shape[1]}
    chosen = tuning.choose("vector_quantize", backend, ("triton", "reference"), z, shape)
    if chosen is None:
        chosen = "triton" if tuning.serves(z) and tuning.serves(codebook) else "reference"
    if chosen == "reference":
        launch.note_outcome("vector_quantize", "reference")
        return reference.vector_quantize(z, codebook)
    tuning.require_kernels("vector_quantize", codebook)
    indices: Tensor = _nearest_codes(z.detach(), codebook.detach())
    return reference.gather(codebook, indices), indices


def _check(z: Tensor, codebook: Tensor) -> None:
    if z.dim() != 2 or codebook.dim() != 2 or z.shape[1] != codebook.shape[1] or 0 in codebook.shape:
        raise ValueError(
            f"vector_quantize: z of shape {tuple(z.shape)} and codebook of shape {tuple(codebook.shape)} do not go "
            "together; give vectors (N, D) and at least one code (K, D), of the same width D >= 1"
        )
    for name, tensor in (("z", z), ("codebook", codebook)):
        if not tensor.is_floating_point():
            raise TypeError(f"vector_quantize: {name} must be of a floating-point type, not {tensor.dtype}; convert it")
    if z.device != codebook.device:
        raise ValueError(
            f"vector_quantize: z is on {z.device} and codebook on {codebook.device}; move one of them to the other"
        )


@custom_op("ldm_kernels::nearest_codes", mutates_args=())
def _nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    from ldm_kernels.vector_quantize import kernel

    launch.note_outcome("vector_quantize", "triton")
    return kernel.nearest_codes(z, codebook)


@_nearest_codes.register_fake
def _nearest_codes_fake(z: Tensor, codebook: Tensor) -> Tensor:
    return z.new_empty((z.shape[0],), dtype=torch.int64)
