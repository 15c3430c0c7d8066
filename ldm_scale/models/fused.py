"""Modules around the fused operations of ldm_kernels; the networks use these and never call a kernel themselves."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ldm_kernels import geglu, group_norm_silu


class GroupNorm(nn.Module):
    """GroupNorm followed by SiLU (or nothing), with the timestep's shift added before.

    A module of its own, not a function: ZeRO stage 3 gathers parameters in the hooks of the module that owns them.
    """

    def __init__(self, num_groups: int, channels: int, eps: float, activation: Literal["silu"] | None = "silu") -> None:
        super().__init__()
        self.num_groups, self.eps, self.activation = num_groups, eps, activation
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, sample_shift: Tensor | None = None) -> Tensor:
        """act(GN(x + sample_shift)). Shapes: x (B, C, H, W), sample_shift (B, C); returns (B, C, H, W)."""
        return group_norm_silu(
            x, self.num_groups, self.weight, self.bias, self.eps, self.activation, sample_shift=sample_shift
        )


class FeedForward(nn.Module):
    """The transformer's feed-forward layer with GEGLU (arXiv:2002.05202), inner width 4x."""

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_projection = nn.Linear(channels, 8 * channels)
        self.dropout = nn.Dropout(dropout)
        self.out_projection = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, T, C) to (B, T, C)."""
        hidden: Tensor = self.dropout(geglu(self.in_projection(x)))
        return self.out_projection(hidden)  # type: ignore[no-any-return]
