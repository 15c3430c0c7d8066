"""Kernels that read x twice: forward in statistics, merge and apply; backward in reduce, merge and apply.

Statistics of a chunk (some tiles of one sample's pixels) are kept per channel: what is added to x before the norm is
the same for all pixels, so it can enter when channels are merged into groups. A chunk's first tile gives each channel a
pivot, its mean there; all tiles then add d = x - pivot and d * d position by position, and rows are summed once, at the
end. With T tiles in a chunk, |pivot - mean|^2 <= (T - 1) * variance (the pivot is the mean of a 1/T part), so at most
log2(T) <= 5 bits cancel, whatever the data: no E[x^2] - mean^2, and no sum across threads inside the loop.

Merges are two-pass over the chunks' numbers (the formula of Chan, Golub and LeVeque, 1979, for many parts at once).

The second pass walks tiles in reverse order, so that it begins with what the first left in the cache. Offsets inside a
chunk are 32-bit, what leads to the chunk is 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ldm_kernels.group_norm_silu.parts import SIZES, activate, load_added, load_affine


@triton.jit  # type: ignore[untyped-decorator]
def chunk_offset(
    i_n: tl.tensor,
    first: tl.tensor,
    channels: tl.tensor,
    pixels: tl.tensor,
    stride_hw: tl.tensor,
    stride_c: tl.tensor,
    BLOCK_C: tl.constexpr,
) -> tl.tensor:
    """Elements before pixel `first` of this program's channels in sample i_n, in 64 bits."""
    i_c = tl.program_id(1).to(tl.int64) * BLOCK_C
    return i_n * channels * pixels + first.to(tl.int64) * stride_hw + i_c * stride_c


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _group_norm_silu_stats_kernel(
    p_x: tl.tensor,  # (N, C, HW) in these strides
    p_partial: tl.tensor,  # (2, N, chunks, C): mean and sum of squared deviations of x
    channels: tl.tensor,
    pixels: tl.tensor,
    stride_hw: tl.tensor,
    stride_c: tl.tensor,
    chunks: tl.tensor,
    chunk_tiles: tl.tensor,
    plane: tl.tensor,  # N * chunks * C
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    i_part = tl.program_id(0)
    i_n = (i_part // chunks).to(tl.int64)
    first = (i_part % chunks) * chunk_tiles * BLOCK_HW
    rows = tl.minimum(chunk_tiles * BLOCK_HW, pixels - first)
    p_chunk = p_x + chunk_offset(i_n, first, channels, pixels, stride_hw, stride_c, BLOCK_C)
    o_c = tl.arange(0, BLOCK_C)
    o_hw = tl.arange(0, BLOCK_HW)
    m_c = tl.program_id(1) * BLOCK_C + o_c < channels
    o_x = o_hw[:, None] * stride_hw + o_c[None, :] * stride_c

    mask = (o_hw < rows)[:, None] & m_c[None, :]
    x = tl.load(p_chunk + o_x, mask=mask, other=0.0).to(tl.float32)
    pivot = tl.sum(x, 0) / tl.minimum(rows, BLOCK_HW)
    d = tl.where(mask, x - pivot[None, :], 0.0)
    sum1 = d
    sum2 = d * d
    for i in range(1, tl.cdiv(rows, BLOCK_HW)):
        o_row = i * BLOCK_HW
        mask = (o_hw + o_row < rows)[:, None] & m_c[None, :]
        x = tl.load(p_chunk + o_row * stride_hw + o_x, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, x - pivot[None, :], 0.0)
        sum1 += d
        sum2 += d * d
    d1 = tl.sum(sum1, 0)
    m2 = tl.sum(sum2, 0) - d1 * (d1 / rows)
    p_out = p_partial + i_part.to(tl.int64) * channels + tl.program_id(1) * BLOCK_C + o_c
    tl.store(p_out, pivot + d1 / rows, mask=m_c)
    # Rounding may leave a negative sum; a comparison, unlike a maximum, lets NaN pass.
    tl.store(p_out + plane, tl.where(m2 < 0.0, 0.0, m2), mask=m_c)


@triton.jit  # type: ignore[untyped-decorator]
def load_part(
    p_partial: tl.tensor,
    p_channel_bias: tl.tensor,
    p_sample_shift: tl.tensor,
    i_n: tl.tensor,
    i_g: tl.tensor,
    o: tl.tensor,
    channels: tl.tensor,
    cpg: tl.tensor,
    pixels: tl.tensor,
    chunks: tl.tensor,
    chunk_pixels: tl.tensor,
    stride_sample_shift: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Pixels of the parts (chunk, channel) of a group, the mean of x + added in each, and where it was read."""
    mask = o < chunks * cpg
    i_chunk = o // cpg
    o_c = i_g * cpg + o % cpg
    p_part = p_partial + i_n * chunks * channels + (i_chunk * channels + o_c)
    count = tl.where(mask, tl.minimum(chunk_pixels, pixels - i_chunk * chunk_pixels), 0).to(tl.float32)
    mean = tl.load(p_part, mask=mask, other=0.0)
    mean += load_added(p_channel_bias, p_sample_shift, i_n, o_c, mask, stride_sample_shift)
    return count, mean, p_part


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _group_norm_silu_merge_fwd_kernel(
    p_partial: tl.tensor,  # (2, N, chunks, C)
    p_channel_bias: tl.tensor,  # (C,) or None
    p_sample_shift: tl.tensor,  # (N, C) or None, rows `stride_sample_shift` apart
    p_mean: tl.tensor,  # (N, G), of x + channel_bias + sample_shift
    p_rstd: tl.tensor,  # (N, G)
    channels: tl.tensor,
    num_groups: tl.tensor,
    cpg: tl.tensor,
    pixels: tl.tensor,
    chunks: tl.tensor,
    chunk_pixels: tl.tensor,
    stride_sample_shift: tl.tensor,
    eps: tl.tensor,
    plane: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    i_ng = tl.program_id(0).to(tl.int64)
    i_n = (tl.program_id(0) // num_groups).to(tl.int64)  # divided in 32 bits, which costs less than in 64
    i_g = tl.program_id(0) % num_groups
    parts = chunks * cpg
    size = pixels * 1.0 * cpg
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, tl.cdiv(parts, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        count, mean, _ = load_part(
            p_partial,
            p_channel_bias,
            p_sample_shift,
            i_n,
            i_g,
            o,
            channels,
            cpg,
            pixels,
            chunks,
            chunk_pixels,
            stride_sample_shift,
        )
        total += count * mean
    pivot = tl.sum(total) / size
    sum1 = tl.zeros([BLOCK], tl.float32)
    sum2 = tl.zeros([BLOCK], tl.float32)
    for i in range(0, tl.cdiv(parts, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        count, mean, p_part = load_part(
            p_partial,
            p_channel_bias,
            p_sample_shift,
            i_n,
            i_g,
            o,
            channels,
            cpg,
            pixels,
            chunks,
            chunk_pixels,
            stride_sample_shift,
        )
        d = tl.where(count > 0.0, mean - pivot, 0.0)
        sum1 += count * d
        sum2 += count * d * d + tl.load(p_part + plane, mask=o < parts, other=0.0)
    d1 = tl.sum(sum1)
    m2 = tl.sum(sum2) - d1 * (d1 / size)
    tl.store(p_mean + i_ng, pivot + d1 / size)
    tl.store(p_rstd + i_ng, tl.rsqrt(tl.where(m2 < 0.0, 0.0, m2) / size + eps))


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _group_norm_silu_apply_fwd_kernel(
    p_x: tl.tensor,  # (N, C, HW) in these strides, as y
    p_y: tl.tensor,
    p_mean: tl.tensor,  # (N, G)
    p_rstd: tl.tensor,  # (N, G)
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
    # x less its mean first: x * A + B would cancel where the mean is large against the deviation.
    mean -= load_added(p_channel_bias, p_sample_shift, i_n, o_c, m_c, stride_sample_shift)
    w, b = load_affine(p_weight, p_bias, p_scale, p_shift, i_n, o_c, m_c, stride_scale, stride_shift)
    a = rstd * w
    o_chunk = chunk_offset(i_n, first, channels, pixels, stride_hw, stride_c, BLOCK_C)
    o_x = o_hw[:, None] * stride_hw + o_lane[None, :] * stride_c
    for i in range(0, tl.cdiv(rows, BLOCK_HW)):
        o_row = i * BLOCK_HW
        mask = (o_hw + o_row < rows)[:, None] & m_c[None, :]
        p_tile = p_x + o_chunk + o_row * stride_hw + o_x
        x = tl.load(p_tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = activate((x - mean[None, :]) * a[None, :] + b[None, :], SILU)
        tl.store(p_y + o_chunk + o_row * stride_hw + o_x, y.to(p_y.dtype.element_ty), mask=mask)
