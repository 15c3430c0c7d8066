"""Group normalisation with everything that a residual block puts around it, in plain torch.

It is the definition that the kernels are tested against, and what trains where no kernel serves (the CPU above all).
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    activation: Literal["silu"] | None = "silu",
    channel_bias: Tensor | None = None,
    sample_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """y = act((GN(x + channel_bias + sample_shift) * weight + bias) * (1 + scale) + shift), in x's type and layout.

    Where the types differ, it is computed in the type that holds them all and rounded once.

    Shapes: x (N, C, H, W); weight, bias, channel_bias (C,); sample_shift, scale, shift (N, C).
    Source: arXiv:1803.08494, eq. 1 (GroupNorm); arXiv:2105.05233, section 3 (AdaGN's scale and shift).
    """
    dtype, channels_last = x.dtype, x.is_contiguous(memory_format=torch.channels_last)
    x, weight, bias, channel_bias, sample_shift, scale, shift = _in_one_dtype(
        x, weight, bias, channel_bias, sample_shift, scale, shift
    )
    # Added to each other first: one pass over x for both.
    added = _sum(None if channel_bias is None else channel_bias[None], sample_shift)
    if added is not None:
        x = x + added[:, :, None, None]
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if channels_last:
        # On CUDA torch's operator answers in the plain layout, whatever it is given.
        y = y.contiguous(memory_format=torch.channels_last)
    if scale is not None:
        y = y * (1 + scale[:, :, None, None])
    if shift is not None:
        y = y + shift[:, :, None, None]
    if activation == "silu":
        # y is ours. In place, a tensor of the size of x need not be made: on a CPU that costs as much as the SiLU.
        y = F.silu(y, inplace=not y.requires_grad)
    # Autocast makes torch's group norm answer in fp32.
    return y.to(dtype)


def _in_one_dtype(*tensors: Tensor | None) -> list[Any]:
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors if tensor is not None))
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
