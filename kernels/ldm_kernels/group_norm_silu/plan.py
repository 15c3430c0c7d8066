"""Which variant of the kernels serves a shape, and in what blocks: the written table, in plain Python.

Everything follows from the shape, the type's size, the layout and the architecture, never from the number of
multiprocessors: two GPUs of one architecture add the same numbers in the same order.

- two_pass serves every shape: one read for the statistics, one for the result.
- registers reads once: a program holds all pixels of a few groups, at most 16,384 elements: 64 a thread forward, in 8
  warps, and 32 (of x and of dy) backward, in 16. With more of either, ahead-of-time compilation shows spills.
- cluster is registers over 2, 4 or 8 thread blocks that share the sums through distributed shared memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

from ldm_kernels.common.launch import cdiv, next_power_of_2

Variant = Literal["two_pass", "registers", "cluster"]
VARIANTS: tuple[Variant, ...] = ("two_pass", "registers", "cluster")

# two_pass. A tile is two 16-byte vectors of a half type for each of 128 threads; channels_last takes it as rows of
# 128 bytes, NCHW as runs of 128 pixels.
_TILE = 2048
_LAST_CHANNELS = 64
_FIRST_PIXELS = 128
# Programs to aim at: enough to fill the largest GPU several times. More only adds partial sums, which are kept below
# 3% of the bytes by four tiles to a chunk; at most 32, which bounds what the statistics' pivot can lose.
_PROGRAMS = 1024
_CHUNK_TILES = (4, 32)
_APPLY_TILES = 4  # tiles per program of the second pass: one load of the coefficients serves four tiles

# registers and cluster.
_BLOCK_ELEMENTS = 16384  # of a thread block
_FORWARD_ELEMENTS = 64  # of a thread
_BACKWARD_ELEMENTS = 32
_MIN_WARPS = 4  # even for a small tile: its loads are in flight sooner
_CLUSTERS = (2, 4, 8)
_MAX_LANES = 128
_MAX_GROUPS = 8
_VECTOR_BYTES = 16
_SECTOR = 32  # bytes that memory delivers at a time
_FEW_PIXELS = 256
_SECTOR_RUN = 64  # bytes of one pixel's run below which neighbouring programs read the same sectors
_SMALL_TILE = 2048  # elements below which a program has less to read than its threads could hold in one vector each


@dataclass(frozen=True)
class Plan:
    """A variant with its blocks; the fields of the other variants keep their defaults."""

    variant: Variant
    block_hw: int  # pixels of a tile, a power of two
    block_c: int  # channels of a tile, a power of two
    num_warps: int  # per thread block
    chunks: int = 1  # two_pass: parts of a sample's pixels whose sums are merged afterwards
    chunk_tiles: int = 1  # two_pass: tiles of a chunk
    apply_tiles: int = 1  # two_pass: tiles of a program of the second pass
    groups: int = 1  # registers, cluster: groups of a program
    num_ctas: int = 1  # cluster: thread blocks of a program


@functools.cache
def variant_for(
    batch: int,
    channels: int,
    num_groups: int,
    pixels: int,
    itemsize: int,
    channels_last: bool,
    architecture: int,
    backward: bool,
    clusters: bool = False,
    variant: Variant | None = None,
) -> Plan:
    """The plan for this shape, or the plan of the variant that is asked for.

    `clusters` says that the variant of that name may be taken (architecture 90 and above, and only if asked for).

    Raises: ValueError if the variant asked for cannot hold this shape.
    """
    if variant == "two_pass":
        return _two_pass(batch, channels, pixels, channels_last)
    shape = (channels, num_groups, pixels, itemsize, channels_last, backward)
    for name, allowed in (("registers", True), ("cluster", clusters and architecture >= 90)):
        if variant == name or (variant is None and allowed):
            plan = _single_read(cast(Variant, name), *shape)
            if plan is not None and (
                variant == name or _is_worthwhile(plan, channels // num_groups, pixels, itemsize, channels_last)
            ):
                return plan
    if variant is None:
        return _two_pass(batch, channels, pixels, channels_last)
    raise ValueError(
        f"group_norm_silu: variant {variant!r} cannot hold {pixels} pixels x {channels // num_groups} channels a group "
        f"{'backward' if backward else 'forward'}; it is one of {', '.join(VARIANTS)}, and two_pass takes every shape"
    )


def _two_pass(batch: int, channels: int, pixels: int, channels_last: bool) -> Plan:
    if channels_last:
        block_c = min(_LAST_CHANNELS, next_power_of_2(channels))
        block_hw = min(_TILE // block_c, next_power_of_2(pixels))
    else:
        block_hw = min(_FIRST_PIXELS, next_power_of_2(pixels))
        block_c = min(_TILE // block_hw, next_power_of_2(channels))
    tiles = cdiv(pixels, block_hw)
    wanted = cdiv(_PROGRAMS, max(batch * cdiv(channels, block_c), 1))
    fewest, most = _CHUNK_TILES
    chunk_tiles = min(max(cdiv(tiles, wanted), fewest), most, tiles)
    return Plan(
        "two_pass",
        block_hw,
        block_c,
        num_warps=4,
        chunks=cdiv(tiles, chunk_tiles),
        chunk_tiles=chunk_tiles,
        apply_tiles=min(_APPLY_TILES, chunk_tiles),
    )


def _single_read(
    variant: Variant, channels: int, num_groups: int, pixels: int, itemsize: int, channels_last: bool, backward: bool
) -> Plan | None:
    """Of what fits: the widest vectors, then full sectors (NCHW: full vectors), then the fewest groups a program."""
    per_thread = _BACKWARD_ELEMENTS if backward else _FORWARD_ELEMENTS
    cpg, block_hw = channels // num_groups, next_power_of_2(pixels)
    best: tuple[tuple[int, int, int], Plan] | None = None
    # Masks of rows take the registers that the backward's largest tile leaves free.
    limit = _BLOCK_ELEMENTS // 2 if backward and pixels < block_hw else _BLOCK_ELEMENTS
    for groups in _divisors(num_groups):
        lanes = next_power_of_2(groups * cpg)
        fits = lanes <= _MAX_LANES or groups == 1
        shaped = _blocks(variant, block_hw * lanes, limit, per_thread) if fits else None
        if shaped is None:
            continue
        num_ctas, num_warps = shaped
        run = groups * cpg * itemsize
        if channels_last:
            score = (math.gcd(run, _VECTOR_BYTES), min(run, _SECTOR_RUN), -groups)
        else:
            score = (0, min(block_hw * lanes, _SMALL_TILE), -groups)
        if best is None or score > best[0]:
            best = score, Plan(variant, block_hw, lanes, num_warps, groups=groups, num_ctas=num_ctas)
    return None if best is None else best[1]


def _blocks(variant: Variant, elements: int, limit: int, per_thread: int) -> tuple[int, int] | None:
    """Thread blocks and warps in each for a tile of that many elements; None if no number of them holds it."""
    for num_ctas in (1,) if variant == "registers" else _CLUSTERS:
        if elements <= limit * num_ctas:
            return num_ctas, max(elements // num_ctas // (32 * per_thread), _MIN_WARPS)
    return None


def _divisors(num_groups: int) -> Iterator[int]:
    return (groups for groups in (1, 2, 4, _MAX_GROUPS) if num_groups % groups == 0)


def _is_worthwhile(plan: Plan, cpg: int, pixels: int, itemsize: int, channels_last: bool) -> bool:
    """Whether one read with this plan beats two: half of the tile is data, and what is read is used.

    Runs of less than a sector fetch every sector more than once. With few pixels the tensor is small, and fewer
    launches count for more.
    """
    dense = 2 * pixels * plan.groups * cpg >= plan.block_hw * plan.block_c
    return dense and (not channels_last or pixels <= _FEW_PIXELS or plan.groups * cpg * itemsize >= _SECTOR)
