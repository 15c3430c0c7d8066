"""Kernels that read x once: a program holds every pixel of a few groups of one sample in registers.

With `num_ctas` above one the same source runs on a cluster of thread blocks: Triton divides the tile among them, and
the sums cross it through distributed shared memory.

The mean is corrected by the mean of what is left after it is subtracted, so that a constant group has exactly its
constant as mean, and the variance is the sum of squared deviations. Channels are gathered into groups by selection,
never by a product with zeros: NaN in one group must not reach its neighbours.

CPG and GROUPS are constants here: only then can the compiler see that a program's first channel is aligned.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ldm_kernels.group_norm_silu.parts import SIZES, activate, activation_gradient, load_added, load_affine


@triton.jit  # type: ignore[untyped-decorator]
def to_groups(values: tl.tensor, CPG: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr) -> tl.tensor:
    """Sums over each group's lanes, [COLUMNS], or a number for one column; lanes past the last do not count."""
    if COLUMNS == 1:
        sums = tl.sum(tl.where(tl.arange(0, LANES) < CPG, values, 0.0), 0)
    else:
        member = (tl.arange(0, LANES) // CPG)[:, None] == tl.arange(0, COLUMNS)[None, :]
        sums = tl.sum(tl.where(member, values[:, None], 0.0), 0)
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def to_lanes(values: tl.tensor, CPG: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr) -> tl.tensor:
    """Each lane's column's value, [LANES]; zero past the last if there are several."""
    if COLUMNS == 1:
        spread = values + tl.zeros([LANES], tl.float32)
    else:
        member = (tl.arange(0, LANES) // CPG)[:, None] == tl.arange(0, COLUMNS)[None, :]
        spread = tl.sum(tl.where(member, values[None, :], 0.0), 1)
    return spread


@triton.jit  # type: ignore[untyped-decorator]
def load_lanes(p_group: tl.tensor, CPG: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr) -> tl.tensor:
    """Each lane's group's value, [LANES], from the program's first group on; zero past the last group."""
    if GROUPS == 1:
        # One number in one register, however many lanes a thread has.
        values = tl.load(p_group) + tl.zeros([LANES], tl.float32)
    else:
        o_lane = tl.arange(0, LANES)
        values = tl.load(p_group + o_lane // CPG, mask=o_lane < GROUPS * CPG, other=0.0)
    return values


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _group_norm_silu_single_fwd_kernel(
    p_x: tl.tensor,  # (N, C, HW) in these strides, as y
    p_y: tl.tensor,
    p_mean: tl.tensor,  # (N, G), of x + channel_bias + sample_shift
    p_rstd: tl.tensor,  # (N, G)
    p_weight: tl.tensor,  # (C,)
    p_bias: tl.tensor,  # (C,)
    p_channel_bias: tl.tensor,  # (C,) or None
    p_sample_shift: tl.tensor,  # (N, C) or None
    p_scale: tl.tensor,  # (N, C) or None
    p_shift: tl.tensor,  # (N, C) or None
    channels: tl.tensor,
    pixels: tl.tensor,
    stride_hw: tl.tensor,
    stride_c: tl.tensor,
    stride_sample_shift: tl.tensor,
    stride_scale: tl.tensor,
    stride_shift: tl.tensor,
    blocks: tl.tensor,  # programs of a sample, G / GROUPS
    eps: tl.tensor,
    SILU: tl.constexpr,
    CPG: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two of at least GROUPS and, unless 1, the cluster's size: Triton splits it so
    BLOCK_HW: tl.constexpr,
    LANES: tl.constexpr,
    FULL: tl.constexpr,  # whether every row of the tile is a pixel
) -> None:
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    i_block = tl.program_id(0) % blocks
    o_lane = tl.arange(0, LANES)
    o_hw = tl.arange(0, BLOCK_HW)
    m_lane = o_lane < GROUPS * CPG
    o_c = i_block * (GROUPS * CPG) + o_lane
    mask = m_lane[None, :]
    if not FULL:
        mask = mask & (o_hw < pixels)[:, None]
    o_block = i_n * channels * pixels + i_block.to(tl.int64) * (GROUPS * CPG) * stride_c
    o_x = o_hw[:, None] * stride_hw + o_lane[None, :] * stride_c

    x = tl.load(p_x + o_block + o_x, mask=mask, other=0.0).to(tl.float32)
    added = load_added(p_channel_bias, p_sample_shift, i_n, o_c, m_lane, stride_sample_shift)
    pivot = to_groups(tl.sum(x, 0) / pixels + added, CPG, COLUMNS, LANES) / CPG
    d = x - (to_lanes(pivot, CPG, COLUMNS, LANES) - added)[None, :]
    if not FULL:
        d = tl.where((o_hw < pixels)[:, None], d, 0.0)
    d1 = to_groups(tl.sum(d, 0) / pixels, CPG, COLUMNS, LANES) / CPG
    m2 = to_groups(tl.sum(d * d, 0) / pixels, CPG, COLUMNS, LANES) / CPG - d1 * d1
    mean = pivot + d1
    rstd = tl.rsqrt(tl.where(m2 < 0.0, 0.0, m2) + eps)

    w, b = load_affine(p_weight, p_bias, p_scale, p_shift, i_n, o_c, m_lane, stride_scale, stride_shift)
    a = to_lanes(rstd, CPG, COLUMNS, LANES) * w
    b -= to_lanes(d1, CPG, COLUMNS, LANES) * a
    y = activate(d * a[None, :] + b[None, :], SILU)
    tl.store(p_y + o_block + o_x, y.to(p_y.dtype.element_ty), mask=mask)
    o_group = (i_n * blocks + i_block) * GROUPS
    if COLUMNS == 1:
        tl.store(p_mean + o_group, mean)
        tl.store(p_rstd + o_group, rstd)
    else:
        o_column = tl.arange(0, COLUMNS)
        tl.store(p_mean + o_group + o_column, mean, mask=o_column < GROUPS)
        tl.store(p_rstd + o_group + o_column, rstd, mask=o_column < GROUPS)


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _group_norm_silu_single_bwd_kernel(
    p_dy: tl.tensor,  # (N, C, HW) in these strides, as x and dx
    p_x: tl.tensor,
    p_dx: tl.tensor,  # or None where nobody asks
    p_mean: tl.tensor,  # (N, G)
    p_rstd: tl.tensor,  # (N, G)
    p_weight: tl.tensor,  # (C,)
    p_bias: tl.tensor,  # (C,)
    p_channel_bias: tl.tensor,  # (C,) or None
    p_sample_shift: tl.tensor,  # (N, C) or None
    p_scale: tl.tensor,  # (N, C) or None
    p_shift: tl.tensor,  # (N, C) or None
    p_sums: tl.tensor,  # (2 or 3, N, C): S1, S2, and D1 if INPUT; None where nobody asks
    p_means: tl.tensor,  # (N, G, 2): k1 and k2; None without INPUT
    channels: tl.tensor,
    pixels: tl.tensor,
    stride_hw: tl.tensor,
    stride_c: tl.tensor,
    stride_sample_shift: tl.tensor,
    stride_scale: tl.tensor,
    stride_shift: tl.tensor,
    blocks: tl.tensor,  # programs of a sample, G / GROUPS
    plane: tl.tensor,  # N * C
    INPUT: tl.constexpr,  # whether a gradient of what is added to x is wanted
    SILU: tl.constexpr,
    CPG: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two of at least GROUPS and, unless 1, the cluster's size: Triton splits it so
    BLOCK_HW: tl.constexpr,
    LANES: tl.constexpr,
    FULL: tl.constexpr,  # whether every row of the tile is a pixel
) -> None:
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    i_block = tl.program_id(0) % blocks
    o_lane = tl.arange(0, LANES)
    o_hw = tl.arange(0, BLOCK_HW)
    m_lane = o_lane < GROUPS * CPG
    o_c = i_block * (GROUPS * CPG) + o_lane
    mask = m_lane[None, :]
    if not FULL:
        mask = mask & (o_hw < pixels)[:, None]
    o_block = i_n * channels * pixels + i_block.to(tl.int64) * (GROUPS * CPG) * stride_c
    o_x = o_hw[:, None] * stride_hw + o_lane[None, :] * stride_c
    o_group = (i_n * blocks + i_block) * GROUPS

    x = tl.load(p_x + o_block + o_x, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(p_dy + o_block + o_x, mask=mask, other=0.0).to(tl.float32)
    mean = load_lanes(p_mean + o_group, CPG, GROUPS, LANES)
    mean -= load_added(p_channel_bias, p_sample_shift, i_n, o_c, m_lane, stride_sample_shift)
    w, b = load_affine(p_weight, p_bias, p_scale, p_shift, i_n, o_c, m_lane, stride_scale, stride_shift)
    a = load_lanes(p_rstd + o_group, CPG, GROUPS, LANES) * w
    d = x - mean[None, :]
    dz = activation_gradient(dy, d * a[None, :] + b[None, :], SILU)
    s1 = tl.sum(dz, 0)
    sd = tl.sum(dz * d, 0)
    if COLUMNS == 1:
        rstd = tl.load(p_rstd + o_group)
    else:
        o_column = tl.arange(0, COLUMNS)
        rstd = tl.load(p_rstd + o_group + o_column, mask=o_column < GROUPS, other=0.0)
    k1 = to_groups(a * s1, CPG, COLUMNS, LANES) / CPG / pixels
    k2 = to_groups(a * sd, CPG, COLUMNS, LANES) / CPG / pixels * rstd * rstd
    if p_sums is not None:
        p_out = p_sums + i_n * channels + o_c
        tl.store(p_out, s1, mask=m_lane)
        tl.store(p_out + plane, sd * to_lanes(rstd, CPG, COLUMNS, LANES), mask=m_lane)
        if INPUT:
            d1 = tl.sum(d if FULL else tl.where((o_hw < pixels)[:, None], d, 0.0), 0)
            tl.store(p_out + plane + plane, d1, mask=m_lane)
    if INPUT:
        if COLUMNS == 1:
            tl.store(p_means + 2 * o_group, k1)
            tl.store(p_means + 2 * o_group + 1, k2)
        else:
            tl.store(p_means + 2 * (o_group + o_column), k1, mask=o_column < GROUPS)
            tl.store(p_means + 2 * (o_group + o_column) + 1, k2, mask=o_column < GROUPS)
    if p_dx is not None:
        k1 = to_lanes(k1, CPG, COLUMNS, LANES)
        k2 = to_lanes(k2, CPG, COLUMNS, LANES)
        dx = dz * a[None, :] - k1[None, :] - d * k2[None, :]
        tl.store(p_dx + o_block + o_x, dx.to(p_dx.dtype.element_ty), mask=mask)
