"""Pieces that the kernels of every variant share, and the kernel of the gradients that are summed over samples."""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change with the batch or the image's size: Triton would compile anew when one of them is 1, or stops
# being a multiple of 16, and no address depends on that.
SIZES = ("batch", "chunks", "chunk_tiles", "chunk_pixels", "blocks")


@triton.jit  # type: ignore[untyped-decorator]
def load_affine(
    p_weight: tl.tensor,  # (C,)
    p_bias: tl.tensor,  # (C,)
    p_scale: tl.tensor,  # (N, C) or None, rows `stride_scale` apart
    p_shift: tl.tensor,  # (N, C) or None, rows `stride_shift` apart
    i_n: tl.tensor,
    o_c: tl.tensor,
    m_c: tl.tensor,
    stride_scale: tl.tensor,
    stride_shift: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """weight * (1 + scale) and bias * (1 + scale) + shift of a sample's channels, in fp32."""
    w = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if p_scale is not None:
        gain = 1.0 + tl.load(p_scale + i_n * stride_scale + o_c, mask=m_c, other=0.0).to(tl.float32)
        w = w * gain
        b = b * gain
    if p_shift is not None:
        b += tl.load(p_shift + i_n * stride_shift + o_c, mask=m_c, other=0.0).to(tl.float32)
    return w, b


@triton.jit  # type: ignore[untyped-decorator]
def load_added(
    p_channel_bias: tl.tensor,  # (C,) or None
    p_sample_shift: tl.tensor,  # (N, C) or None, rows `stride_sample_shift` apart
    i_n: tl.tensor,
    o_c: tl.tensor,
    m_c: tl.tensor,
    stride_sample_shift: tl.tensor,
) -> tl.tensor:
    """channel_bias + sample_shift, what is added to x before it is normalised, in fp32."""
    added = tl.zeros(o_c.shape, tl.float32)
    if p_channel_bias is not None:
        added += tl.load(p_channel_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if p_sample_shift is not None:
        added += tl.load(p_sample_shift + i_n * stride_sample_shift + o_c, mask=m_c, other=0.0).to(tl.float32)
    return added


@triton.jit  # type: ignore[untyped-decorator]
def activate(z: tl.tensor, SILU: tl.constexpr) -> tl.tensor:
    """SiLU of z, or z."""
    if SILU:
        z = z * tl.sigmoid(z)
    return z


@triton.jit  # type: ignore[untyped-decorator]
def activation_gradient(dy: tl.tensor, z: tl.tensor, SILU: tl.constexpr) -> tl.tensor:
    """dL/dz from dL/dy, with z the activation's own input: weight, bias, scale and shift are in it."""
    if SILU:
        s = tl.sigmoid(z)
        dy = dy * (s * (1.0 + z * (1.0 - s)))
    return dy


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _group_norm_silu_parameters_kernel(
    p_sums: tl.tensor,  # (2 or 3, N, C): S1, S2, and D1 if INPUT, as in two_pass_backward.py
    p_means: tl.tensor,  # (N, G, 2): k1 and k2, or None without INPUT
    p_rstd: tl.tensor,  # (N, G)
    p_weight: tl.tensor,  # (C,)
    p_bias: tl.tensor,  # (C,)
    p_scale: tl.tensor,  # (N, C) or None, rows `stride_scale` apart
    p_dweight: tl.tensor,  # (C,), as all outputs: None where nobody asks
    p_dbias: tl.tensor,  # (C,)
    p_dchannel_bias: tl.tensor,  # (C,)
    p_dsample_shift: tl.tensor,  # (N, C)
    p_dscale: tl.tensor,  # (N, C)
    p_dshift: tl.tensor,  # (N, C)
    batch: tl.tensor,
    channels: tl.tensor,
    num_groups: tl.tensor,
    cpg: tl.tensor,
    pixels: tl.tensor,
    stride_scale: tl.tensor,
    plane: tl.tensor,  # N * C
    INPUT: tl.constexpr,  # whether a gradient of what is added to x is wanted
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    o_g = o_c // cpg
    weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    # Sample i * BLOCK_N + r always goes to row r: the order of addition is the same at every run and on every GPU.
    dweight = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dadded = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i in range(0, tl.cdiv(batch, BLOCK_N)):
        o_n = tl.arange(0, BLOCK_N).to(tl.int64) + i * BLOCK_N
        mask = (o_n < batch)[:, None] & m_c[None, :]
        o_nc = o_n[:, None] * channels + o_c[None, :]
        s1 = tl.load(p_sums + o_nc, mask=mask, other=0.0)
        s2 = tl.load(p_sums + plane + o_nc, mask=mask, other=0.0)
        if p_dshift is not None:
            tl.store(p_dshift + o_nc, s1.to(p_dshift.dtype.element_ty), mask=mask)
        if p_dscale is not None:
            tl.store(p_dscale + o_nc, (weight * s2 + bias * s1).to(p_dscale.dtype.element_ty), mask=mask)
        if p_scale is not None:
            o_scale = o_n[:, None] * stride_scale + o_c[None, :]
            gain = 1.0 + tl.load(p_scale + o_scale, mask=mask, other=0.0).to(tl.float32)
            s1 = s1 * gain
            s2 = s2 * gain
        dbias += s1
        dweight += s2
        if INPUT:
            d1 = tl.load(p_sums + plane + plane + o_nc, mask=mask, other=0.0)
            o_ng = o_n[:, None] * num_groups + o_g[None, :]
            rstd = tl.load(p_rstd + o_ng, mask=mask, other=0.0)
            k1 = tl.load(p_means + 2 * o_ng, mask=mask, other=0.0)
            k2 = tl.load(p_means + 2 * o_ng + 1, mask=mask, other=0.0)
            added = rstd * weight * s1 - pixels * k1 - k2 * d1
            dadded += added
            if p_dsample_shift is not None:
                tl.store(p_dsample_shift + o_nc, added.to(p_dsample_shift.dtype.element_ty), mask=mask)
    if p_dweight is not None:
        tl.store(p_dweight + o_c, tl.sum(dweight, 0).to(p_dweight.dtype.element_ty), mask=m_c)
    if p_dbias is not None:
        tl.store(p_dbias + o_c, tl.sum(dbias, 0).to(p_dbias.dtype.element_ty), mask=m_c)
    if p_dchannel_bias is not None:
        tl.store(p_dchannel_bias + o_c, tl.sum(dadded, 0).to(p_dchannel_bias.dtype.element_ty), mask=m_c)
