"""Group normalisation with everything that a residual block puts around it, in plain torch."""

from __future__ import annotations

from typing import Literal

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
    """y = act((GN(x + channel_bias + sample_shift) * weight + bias) * (1 + scale) + shift), in x's layout.

    Shapes: x (N, C, H, W); weight, bias, channel_bias (C,); sample_shift, scale, shift (N, C).
    Source: arXiv:1803.08494, eq. 1 (GroupNorm); arXiv:2105.05233, section 3 (AdaGN's scale and shift).
    """
    if channel_bias is not None:
        x = x + channel_bias[None, :, None, None]
    if sample_shift is not None:
        x = x + sample_shift[:, :, None, None]
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if x.is_contiguous(memory_format=torch.channels_last):
        # On CUDA torch's operator answers in the plain layout, whatever it is given.
        y = y.contiguous(memory_format=torch.channels_last)
    if scale is not None:
        y = y * (1 + scale[:, :, None, None])
    if shift is not None:
        y = y + shift[:, :, None, None]
    return F.silu(y) if activation == "silu" else y
