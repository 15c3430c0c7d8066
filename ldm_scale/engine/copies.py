"""Copies to a device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def put_on(device: torch.device, x: Tensor) -> Tensor:
    """x on the device, in its own type; a copy from the host to a GPU is queued there, and nobody waits for it.

    From ordinary memory CUDA would first wait for all that was queued before. Whoever wants another type converts
    afterwards, on the device: torch converts before it copies, into ordinary memory again.
    """
    if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
