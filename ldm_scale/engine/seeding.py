"""Randomness as a function of (seed, purpose, index): nothing to save, nothing that depends on the ranks.

Counter-based (Philox, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the key is the seed and the
purpose, the counter the index, so streams of different images never overlap. Drawn on the CPU, so that an image has
the same noise on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def stream(seed: int, purpose: str, index: int) -> np.random.Generator:
    """Independent random stream of one image (or step) for one purpose."""
    purpose_key = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    key = np.array([seed & (2**64 - 1), purpose_key], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)  # the index in the highest word: streams are 2^192 long
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(streams: Sequence[np.random.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, one image per stream. Shapes: returns (len(streams), *shape), fp32, on the CPU."""
    if not streams:
        return torch.empty(0, *shape)
    noise = np.stack([s.standard_normal(tuple(shape), dtype=np.float32) for s in streams])
    return torch.from_numpy(noise)
