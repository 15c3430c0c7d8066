"""Kernels of the two-pass backward: sums over the pixels of a chunk, their merge per group, and the gradient of x.

With d = x + added - mean, a = rstd w, z = d a + b (w and b with scale and shift in them) and dz = dy act'(z):
S1 = sum dz, S2 = rstd sum(dz d) and D1 = sum d over a channel's pixels; k1 = mean(a dz) and k2 = rstd^2 mean(a dz d)
over a group; dx = a dz - k1 - d k2. The derivation is in README.md. Written with d instead of h = rstd d, a thread
keeps one number less per channel, which decides whether a tile fits in its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ldm_kernels.group_norm_silu.parts import SIZES, activation_gradient, load_added, load_affine
from ldm_kernels.group_norm_silu.two_pass import chunk_offset


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _group_norm_silu_reduce_kernel(
    p_dy: tl.tensor,  # (N, C, HW) in these strides, as x
    p_x: tl.tensor,
    p_mean: tl.tensor,  # (N, G)
    p_rstd: tl.tensor,  # (N, G)
    p_weight: tl.tensor,  # (C,)
    p_bias: tl.tensor,  # (C,)
    p_channel_bias: tl.tensor,  # (C,) or None
    p_sample_shift: tl.tensor,  # (N, C) or None
    p_scale: tl.tensor,  # (N, C) or None
    p_shift: tl.tensor,  # (N, C) or None
    p_partial: tl.tensor,  # (2 or 3, N, chunks, C): S1, S2, and D1 if INPUT
    channels: tl.tensor,
    num_groups: tl.tensor,
    cpg: tl.tensor,
    pixels: tl.tensor,
    stride_hw: tl.tensor,
    stride_c: tl.tensor,
    stride_sample_shift: tl.tensor,
    stride_scale: tl.tensor,
    stride_shift: tl.tensor,
    chunks: tl.tensor,
    chunk_tiles: tl.tensor,
    plane: tl.tensor,  # N * chunks * C
    INPUT: tl.constexpr,  # whether a gradient of what is added to x is wanted
    SILU: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    i_part = tl.program_id(0)
    i_n = (i_part // chunks).to(tl.int64)
    first = (i_part % chunks) * chunk_tiles * BLOCK_HW
    rows = tl.minimum(chunk_tiles * BLOCK_HW, pixels - first)
    o_lane = tl.arange(0, BLOCK_C)
    o_hw = tl.arange(0, BLOCK_HW)
    o_c = tl.program_id(1) * BLOCK_C + o_lane
    m_c = o_c < channels
    o_ng = i_n * num_groups + o_c // cpg
    rstd = tl.load(p_rstd + o_ng, mask=m_c, other=0.0)
    mean = tl.load(p_mean + o_ng, mask=m_c, other=0.0)
    mean -= load_added(p_channel_bias, p_sample_shift, i_n, o_c, m_c, stride_sample_shift)
    w, b = load_affine(p_weight, p_bias, p_scale, p_shift, i_n, o_c, m_c, stride_scale, stride_shift)
    a = rstd * w
    o_chunk = chunk_offset(i_n, first, channels, pixels, stride_hw, stride_c, BLOCK_C)
    o_x = o_hw[:, None] * stride_hw + o_lane[None, :] * stride_c
    s1 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    d1 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    for i in range(0, tl.cdiv(rows, BLOCK_HW)):
        o_row = i * BLOCK_HW
        mask = (o_hw + o_row < rows)[:, None] & m_c[None, :]
        o_tile = o_row * stride_hw + o_x
        x = tl.load(p_x + o_chunk + o_tile, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(p_dy + o_chunk + o_tile, mask=mask, other=0.0).to(tl.float32)
        d = x - mean[None, :]
        dz = activation_gradient(dy, d * a[None, :] + b[None, :], SILU)
        s1 += dz
        s2 += dz * d
        if INPUT:
            d1 += tl.where(mask, d, 0.0)
    p_out = p_partial + i_part.to(tl.int64) * channels + o_c
    tl.store(p_out, tl.sum(s1, 0), mask=m_c)
    tl.store(p_out + plane, tl.sum(s2, 0) * rstd, mask=m_c)
    if INPUT:
        tl.store(p_out + plane + plane, tl.sum(d1, 0), mask=m_c)


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _group_norm_silu_merge_bwd_kernel(
    p_partial: tl.tensor,  # (2 or 3, N, chunks, C)
    p_rstd: tl.tensor,  # (N, G)
    p_weight: tl.tensor,  # (C,)
    p_scale: tl.tensor,  # (N, C) or None
    p_sums: tl.tensor,  # (2 or 3, N, C), or None where nobody asks
    p_means: tl.tensor,  # (N, G, 2): k1 and k2
    channels: tl.tensor,
    num_groups: tl.tensor,
    cpg: tl.tensor,
    pixels: tl.tensor,
    stride_scale: tl.tensor,
    chunks: tl.tensor,
    plane: tl.tensor,  # N * chunks * C
    sums_plane: tl.tensor,  # N * C
    INPUT: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    i_ng = tl.program_id(0).to(tl.int64)
    i_n = (tl.program_id(0) // num_groups).to(tl.int64)  # divided in 32 bits, which costs less than in 64
    p_sample = p_partial + i_n * chunks * channels
    wdz = tl.zeros([BLOCK_C], tl.float32)
    wdzh = tl.zeros([BLOCK_C], tl.float32)
    for i in range(0, tl.cdiv(cpg, BLOCK_C)):
        o_lane = i * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_lane < cpg
        o_c = (tl.program_id(0) % num_groups) * cpg + o_lane
        s1 = tl.zeros([BLOCK_CHUNKS, BLOCK_C], tl.float32)
        s2 = tl.zeros([BLOCK_CHUNKS, BLOCK_C], tl.float32)
        d1 = tl.zeros([BLOCK_CHUNKS, BLOCK_C], tl.float32)
        for j in range(0, tl.cdiv(chunks, BLOCK_CHUNKS)):
            o_chunk = j * BLOCK_CHUNKS + tl.arange(0, BLOCK_CHUNKS)
            mask = (o_chunk < chunks)[:, None] & m_c[None, :]
            p_part = p_sample + (o_chunk[:, None] * channels + o_c[None, :])
            s1 += tl.load(p_part, mask=mask, other=0.0)
            s2 += tl.load(p_part + plane, mask=mask, other=0.0)
            if INPUT:
                d1 += tl.load(p_part + plane + plane, mask=mask, other=0.0)
        sum1 = tl.sum(s1, 0)
        sum2 = tl.sum(s2, 0)
        if p_sums is not None:
            p_out = p_sums + i_n * channels + o_c
            tl.store(p_out, sum1, mask=m_c)
            tl.store(p_out + sums_plane, sum2, mask=m_c)
            if INPUT:
                tl.store(p_out + sums_plane + sums_plane, tl.sum(d1, 0), mask=m_c)
        w = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
        if p_scale is not None:
            w = w * (1.0 + tl.load(p_scale + i_n * stride_scale + o_c, mask=m_c, other=0.0).to(tl.float32))
        wdz += w * sum1
        wdzh += w * sum2
    rstd = tl.load(p_rstd + i_ng)
    size = pixels * 1.0 * cpg
    tl.store(p_means + 2 * i_ng, rstd * (tl.sum(wdz) / size))
    tl.store(p_means + 2 * i_ng + 1, rstd * rstd * (tl.sum(wdzh) / size))


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _group_norm_silu_apply_bwd_kernel(
    p_dy: tl.tensor,  # (N, C, HW) in these strides, as x and dx
    p_x: tl.tensor,
    p_dx: tl.tensor,
    p_mean: tl.tensor,  # (N, G)
    p_rstd: tl.tensor,  # (N, G)
    p_means: tl.tensor,  # (N, G, 2): k1 and k2
    p_weight: tl.tensor,  # (C,)
    p_bias: tl.tensor,  # (C,)
    p_channel_bias: tl.tensor,  # (C,) or None
    p_sample_shift: tl.tensor,  # (N, C) or None
    p_scale: tl.tensor,  # (N, C) or None
    p_shift: tl.tensor,  # (N, C) or None
    channels: tl.tensor,
    num_groups: tl.tensor,
    cpg: tl.tensor,
    pixels: tl.tensor,
    stride_hw: tl.tensor,
    stride_c: tl.tensor,
    stride_sample_shift: tl.tensor,
    stride_scale: tl.tensor,
    stride_shift: tl.tensor,
    chunks: tl.tensor,
    chunk_tiles: tl.tensor,
    SILU: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    i_part = tl.num_programs(0) - 1 - tl.program_id(0)
    i_n = (i_part // chunks).to(tl.int64)
    first = (i_part % chunks) * chunk_tiles * BLOCK_HW
    rows = tl.minimum(chunk_tiles * BLOCK_HW, pixels - first)
    o_lane = tl.arange(0, BLOCK_C)
    o_hw = tl.arange(0, BLOCK_HW)
    o_c = tl.program_id(1) * BLOCK_C + o_lane
    m_c = o_c < channels
    o_ng = i_n * num_groups + o_c // cpg
    rstd = tl.load(p_rstd + o_ng, mask=m_c, other=0.0)
    mean = tl.load(p_mean + o_ng, mask=m_c, other=0.0)
    k1 = tl.load(p_means + 2 * o_ng, mask=m_c, other=0.0)
    k2 = tl.load(p_means + 2 * o_ng + 1, mask=m_c, other=0.0)
    mean -= load_added(p_channel_bias, p_sample_shift, i_n, o_c, m_c, stride_sample_shift)
    w, b = load_affine(p_weight, p_bias, p_scale, p_shift, i_n, o_c, m_c, stride_scale, stride_shift)
    a = rstd * w
    o_chunk = chunk_offset(i_n, first, channels, pixels, stride_hw, stride_c, BLOCK_C)
    o_x = o_hw[:, None] * stride_hw + o_lane[None, :] * stride_c
    for i in range(0, tl.cdiv(rows, BLOCK_HW)):
        o_row = i * BLOCK_HW
        mask = (o_hw + o_row < rows)[:, None] & m_c[None, :]
        o_tile = o_row * stride_hw + o_x
        x = tl.load(p_x + o_chunk + o_tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dy = tl.load(p_dy + o_chunk + o_tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        d = x - mean[None, :]
        dz = activation_gradient(dy, d * a[None, :] + b[None, :], SILU)
        dx = dz * a[None, :] - k1[None, :] - d * k2[None, :]
        tl.store(p_dx + o_chunk + o_tile, dx.to(p_dx.dtype.element_ty), mask=mask)
