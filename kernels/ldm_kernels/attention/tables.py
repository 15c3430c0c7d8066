"""What the attention kernels serve, and the tiles that they take: plain Python, readable without Triton.

Every row is the largest tile that compiles without spilled registers, within the shared memory of the architecture
(163 KB on compute capability 8.0, 227 KB on 9.0). Newer architectures take the rows of 9.0. None was chosen by time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldm_kernels.common import launch

MAX_HEAD_DIM = 128
MAX_CROSS_KEYS = 128


@dataclass(frozen=True)
class Blocks:
    """What one program works on, and with how much: queries and keys in a tile, warps, stages of the loop's loads."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# By (padded head dim, whether fp32): forward, dQ, dK and dV.
_SELF_80 = {
    (16, False): (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    (32, False): (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    (64, False): (Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 3), Blocks(64, 128, 8, 2)),
    (128, False): (Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    (16, True): (Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)),
    (32, True): (Blocks(64, 32, 8, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 8, 2)),
    (64, True): (Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2)),
    (128, True): (Blocks(32, 32, 8, 2), Blocks(16, 16, 8, 1), Blocks(32, 16, 8, 2)),
}
_SELF_90 = {
    (16, False): (Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    (32, False): (Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    (64, False): (Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    (128, False): (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2)),
    (16, True): (Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2)),
    (32, True): (Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2)),
    (64, True): (Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2)),
    (128, True): (Blocks(32, 32, 8, 2), Blocks(16, 16, 8, 2), Blocks(32, 16, 8, 2)),
}

# With all keys on the chip, by (padded head dim, padded keys, whether fp32): forward, backward. No row, not served.
# fp32's backward of head dims 17 to 64 takes four warps: with eight, what Triton 3.6 compiles for an H100 gives wrong
# dK and dV, or faults.
_CROSS_80 = {
    (16, 64, False): (Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2)),
    (32, 64, False): (Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2)),
    (64, 64, False): (Blocks(64, 64, 4, 2), Blocks(16, 64, 4, 2)),
    (128, 64, False): (Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2)),
    (16, 128, False): (Blocks(64, 128, 4, 2), Blocks(32, 128, 8, 2)),
    (32, 128, False): (Blocks(64, 128, 4, 2), Blocks(32, 128, 8, 2)),
    (64, 128, False): (Blocks(64, 128, 4, 2), Blocks(32, 128, 8, 2)),
    (128, 128, False): (Blocks(64, 128, 4, 2), Blocks(32, 128, 8, 1)),
    (16, 64, True): (Blocks(32, 64, 4, 2), Blocks(16, 64, 8, 2)),
    (32, 64, True): (Blocks(32, 64, 4, 2), Blocks(16, 64, 4, 2)),
    (64, 64, True): (Blocks(32, 64, 8, 2), Blocks(16, 64, 4, 2)),
    (16, 128, True): (Blocks(32, 128, 4, 2), Blocks(16, 128, 8, 2)),
}
_CROSS_90 = {
    (16, 64, False): (Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    (32, 64, False): (Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    (64, 64, False): (Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    (128, 64, False): (Blocks(64, 64, 4, 2), Blocks(32, 64, 8, 2)),
    (16, 128, False): (Blocks(64, 128, 4, 2), Blocks(64, 128, 8, 2)),
    (32, 128, False): (Blocks(64, 128, 4, 2), Blocks(64, 128, 8, 2)),
    (64, 128, False): (Blocks(64, 128, 4, 2), Blocks(64, 128, 8, 2)),
    (128, 128, False): (Blocks(64, 128, 4, 2), Blocks(32, 128, 8, 2)),
    (16, 64, True): (Blocks(64, 64, 4, 2), Blocks(16, 64, 8, 2)),
    (32, 64, True): (Blocks(64, 64, 4, 2), Blocks(16, 64, 4, 2)),
    (64, 64, True): (Blocks(64, 64, 4, 2), Blocks(16, 64, 4, 2)),
    (16, 128, True): (Blocks(64, 128, 4, 2), Blocks(16, 128, 8, 2)),
    (32, 128, True): (Blocks(64, 128, 4, 2), Blocks(16, 128, 8, 2)),
}

# A part of the queries costs its own dK and dV in fp32, the bytes of about 200 queries: so none is smaller than this,
# and there are no more than give a large GPU work for about one wave, with the samples and heads that there are.
_MIN_SPLIT_QUERIES = 256
_ENOUGH_PROGRAMS = 256


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a tile's rows are padded to: at least 16, the least that a matrix instruction takes."""
    return max(16, launch.next_power_of_2(head_dim))


def self_blocks(head_dim: int, dtype: torch.dtype, architecture: int) -> tuple[Blocks, Blocks, Blocks]:
    """Tiles of the kernels for any number of keys: forward, dQ, dK and dV."""
    table = _SELF_90 if architecture >= 90 else _SELF_80
    return table[padded_head_dim(head_dim), dtype == torch.float32]


def padded_keys(keys: int) -> int:
    """What the cross-attention kernels pad up to 128 keys to: 64 or 128."""
    return 64 if keys <= 64 else 128


def serves_cross(head_dim: int, keys: int, dtype: torch.dtype, architecture: int) -> bool:
    """Whether the kernels that keep all keys on the chip take the shape."""
    if keys > MAX_CROSS_KEYS:
        return False
    table = _CROSS_90 if architecture >= 90 else _CROSS_80
    return (padded_head_dim(head_dim), padded_keys(keys), dtype == torch.float32) in table


def cross_blocks(head_dim: int, keys: int, dtype: torch.dtype, architecture: int) -> tuple[Blocks, Blocks]:
    """Tiles of the kernels that keep all keys on the chip: forward, backward."""
    table = _CROSS_90 if architecture >= 90 else _CROSS_80
    return table[padded_head_dim(head_dim), padded_keys(keys), dtype == torch.float32]


def cross_splits(batch_heads: int, queries: int) -> int:
    """Into how many parts the queries of a head are divided: from the shape alone, the same on every GPU."""
    most = max(1, queries // _MIN_SPLIT_QUERIES)
    return min(most, launch.cdiv(_ENOUGH_PROGRAMS, max(1, batch_heads)))
