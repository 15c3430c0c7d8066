"""Weights for tests of networks that must be the same on two sides."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def random_state(network: nn.Module) -> dict[str, Tensor]:
    """Weights of which none is zero: layers that start at zero would hide all others."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in network.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        state[name] = tensor + 0.1 * noise if tensor.ndim == 1 else noise / tensor[0].numel() ** 0.5
    return state
