"""Sinusoidal embedding of timesteps and the two-layer network behind it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of t at dim / 2 geometric frequencies from 1 to 1 / max_period, in fp32.

    Shapes: t (B,); returns (B, dim); dim is even.
    Source: arXiv:1706.03762, section 3.5; cosines first as in the LDM code, which exported weights rely on.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Embedding of timesteps that every residual block of the UNet receives, its SiLU already applied.

    The blocks share that SiLU: computed once here instead of once in each of them.
    """

    def __init__(self, base_channels: int, dim: int) -> None:
        super().__init__()
        self.base_channels = base_channels
        self.linear1 = nn.Linear(base_channels, dim)
        self.linear2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """Shapes: t (B,) timesteps; returns (B, dim)."""
        embedding = sinusoidal_embedding(t, self.base_channels).to(self.linear1.weight.dtype)
        return F.silu(self.linear2(F.silu(self.linear1(embedding))))
