"""Attention of any number of queries to any number of keys, in tiles that never leave the chip.

Forward: one program per (sample, head, tile of queries) walks the keys with the online softmax and keeps one number
per query for the backward, the logarithm of its softmax's denominator. Backward: a first kernel, per tile of queries,
walks the keys for dQ and on the way leaves rowsum(dO * O); a second, per tile of keys, walks the queries for dK and dV.
Both compute P and dP: two matrix products (seven for five) more than one kernel with atomic additions into
dQ, which would be neither deterministic nor free of an fp32 copy of dQ.

Scores live in base 2 (exp2 is one instruction, log2(e) is folded into the scale). The matrix products of fp16 and bf16
accumulate in fp32, with P and dS rounded to the input's type; those of fp32 are split into three TF32 products, which
stay on the tensor cores with an error of the order of fp32's own ("ieee" would leave them for scalar arithmetic).

Strides are counted in units of eight elements where all of them allow it: head strides such as 40 are multiples of 8
and not of the 16 that Triton looks for, and without the hint every load would move a single element.
"""

# Parameters of a kernel have a comment each and no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_kernels.attention.tables import Blocks, padded_head_dim, self_blocks
from ldm_kernels.common import launch
from ldm_kernels.common.launch import Launch

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def slab(
    x,  # (B, H, tokens, D), strides in units of UNIT elements
    i_bh,  # sample * num_heads + head
    num_heads,
    stride_b,
    stride_h,
    UNIT: tl.constexpr,
):
    """Pointer to the tokens of one head of one sample."""
    i_b = (i_bh // num_heads).to(tl.int64)
    i_h = (i_bh % num_heads).to(tl.int64)
    return x + (i_b * stride_b + i_h * stride_h) * UNIT


@triton.jit
def load_rows(
    x,  # pointer to token 0 of a head
    start,  # first token
    num_rows,  # tokens in all
    stride,  # between tokens
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,  # whether ROWS divides num_rows
):
    """Tokens start .. start + ROWS as (ROWS, BLOCK_D), zero past the last token and past D."""
    o_r = tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    # The tile's own offset is the one that can pass 2**31.
    p_x = x + tl.cast(start, tl.int64) * stride + (o_r[:, None] * stride + o_d[None, :])
    if EVEN and BLOCK_D == D:
        b_x = tl.load(p_x)
    elif EVEN:
        b_x = tl.load(p_x, mask=o_d[None, :] < D, other=0.0)
    else:
        b_x = tl.load(p_x, mask=(start + o_r[:, None] < num_rows) & (o_d[None, :] < D), other=0.0)
    return b_x


@triton.jit
def store_rows(
    x,  # pointer to token 0 of a head
    b_x,  # (ROWS, BLOCK_D)
    start,
    num_rows,
    stride,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes tokens start .. start + ROWS, as far as there are tokens, in the memory's type."""
    o_r = tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    p_x = x + tl.cast(start, tl.int64) * stride + (o_r[:, None] * stride + o_d[None, :])
    mask = (start + o_r[:, None] < num_rows) & (o_d[None, :] < D)
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _attention_fwd_kernel(
    q,  # (B, H, queries, D)
    k,  # (B, H, keys, D)
    v,  # (B, H, keys, D)
    out,  # (B, queries, H, D) contiguous
    lse,  # (B, H, queries) fp32: log2 of the softmax's denominator, log2(sum(2 ** (score * log2(e))))
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    num_heads, num_queries, num_keys, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr, EVEN_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs are tiles of one head: its keys and values are read from DRAM once.
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    i_bh = tl.program_id(0) // num_tiles
    o_m = (tl.program_id(0) % num_tiles) * BLOCK_M
    p_k = slab(k, i_bh, num_heads, stride_kb, stride_kh, UNIT)
    p_v = slab(v, i_bh, num_heads, stride_vb, stride_vh, UNIT)
    p_q = slab(q, i_bh, num_heads, stride_qb, stride_qh, UNIT)
    b_q = load_rows(p_q, o_m, num_queries, stride_qm * UNIT, BLOCK_M, D, BLOCK_D, False)
    scale_log2 = scale * LOG2_E

    # Finite, so that a tile of keys that all score -inf weighs nothing and is not (-inf) - (-inf).
    b_max = tl.full([BLOCK_M], -3.0e38, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        b_k = load_rows(p_k, start, num_keys, stride_kn * UNIT, BLOCK_N, D, BLOCK_D, EVEN_KEYS)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if not EVEN_KEYS:
            m_n = start + tl.arange(0, BLOCK_N)[None, :] < num_keys
            b_s = tl.where(m_n, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
        if not EVEN_KEYS:
            b_p = tl.where(m_n, b_p, 0.0)  # once more, since a scale of zero makes NaN of -inf
        b_decay = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_v = load_rows(p_v, start, num_keys, stride_vn * UNIT, BLOCK_N, D, BLOCK_D, EVEN_KEYS)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_decay[:, None], input_precision=PRECISION)
        b_max = b_new

    p_out = slab(out, i_bh, num_heads, num_queries * num_heads * D, D, 1)
    store_rows(p_out, b_out / b_sum[:, None], o_m, num_queries, num_heads * D, BLOCK_M, D, BLOCK_D)
    o_r = o_m + tl.arange(0, BLOCK_M)
    tl.store(lse + i_bh.to(tl.int64) * num_queries + o_r, b_max + tl.log2(b_sum), mask=o_r < num_queries)


@triton.jit
def _attention_bwd_dq_kernel(
    q,  # (B, H, queries, D)
    k,  # (B, H, keys, D)
    v,  # (B, H, keys, D)
    out,  # (B, H, queries, D)
    dout,  # (B, H, queries, D)
    lse,  # (B, H, queries) fp32, in base 2
    delta,  # (B, H, queries) fp32, written: rowsum(dO * O)
    dq,  # (B, queries, H, D) contiguous
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm,
    num_heads, num_queries, num_keys, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr, EVEN_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    i_bh = tl.program_id(0) // num_tiles
    o_m = (tl.program_id(0) % num_tiles) * BLOCK_M
    p_o = slab(out, i_bh, num_heads, stride_ob, stride_oh, UNIT)
    b_o = load_rows(p_o, o_m, num_queries, stride_om * UNIT, BLOCK_M, D, BLOCK_D, False)
    p_do = slab(dout, i_bh, num_heads, stride_gb, stride_gh, UNIT)
    b_do = load_rows(p_do, o_m, num_queries, stride_gm * UNIT, BLOCK_M, D, BLOCK_D, False)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    o_r = o_m + tl.arange(0, BLOCK_M)
    o_row = i_bh.to(tl.int64) * num_queries + o_r
    tl.store(delta + o_row, b_delta, mask=o_r < num_queries)
    b_lse = tl.load(lse + o_row, mask=o_r < num_queries, other=0.0)

    p_q = slab(q, i_bh, num_heads, stride_qb, stride_qh, UNIT)
    p_k = slab(k, i_bh, num_heads, stride_kb, stride_kh, UNIT)
    p_v = slab(v, i_bh, num_heads, stride_vb, stride_vh, UNIT)
    b_q = load_rows(p_q, o_m, num_queries, stride_qm * UNIT, BLOCK_M, D, BLOCK_D, False)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        b_k = load_rows(p_k, start, num_keys, stride_kn * UNIT, BLOCK_N, D, BLOCK_D, EVEN_KEYS)
        b_v = load_rows(p_v, start, num_keys, stride_vn * UNIT, BLOCK_N, D, BLOCK_D, EVEN_KEYS)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_p = tl.exp2(b_s * (scale * LOG2_E) - b_lse[:, None])
        if not EVEN_KEYS:
            # A key that is not there scores zero, and that may be far above the row's own maximum.
            b_p = tl.where(start + tl.arange(0, BLOCK_N)[None, :] < num_keys, b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)

    p_dq = slab(dq, i_bh, num_heads, num_queries * num_heads * D, D, 1)
    store_rows(p_dq, b_dq * scale, o_m, num_queries, num_heads * D, BLOCK_M, D, BLOCK_D)


@triton.jit
def _attention_bwd_dkv_kernel(
    q,  # (B, H, queries, D)
    k,  # (B, H, keys, D)
    v,  # (B, H, keys, D)
    dout,  # (B, H, queries, D)
    lse,  # (B, H, queries) fp32, in base 2
    delta,  # (B, H, queries) fp32: rowsum(dO * O)
    dk,  # (B, keys, H, D) contiguous
    dv,  # (B, keys, H, D) contiguous
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm,
    num_heads, num_queries, num_keys, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr, EVEN_QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_keys, BLOCK_N)
    i_bh = tl.program_id(0) // num_tiles
    o_n = (tl.program_id(0) % num_tiles) * BLOCK_N
    p_k = slab(k, i_bh, num_heads, stride_kb, stride_kh, UNIT)
    p_v = slab(v, i_bh, num_heads, stride_vb, stride_vh, UNIT)
    p_q = slab(q, i_bh, num_heads, stride_qb, stride_qh, UNIT)
    p_do = slab(dout, i_bh, num_heads, stride_gb, stride_gh, UNIT)
    b_k = load_rows(p_k, o_n, num_keys, stride_kn * UNIT, BLOCK_N, D, BLOCK_D, False)
    b_v = load_rows(p_v, o_n, num_keys, stride_vn * UNIT, BLOCK_N, D, BLOCK_D, False)

    # Keys are the rows here: P^T and dS^T are left operands as they are, and K and V take few registers as such.
    # Queries that are not there have dO = 0 and delta = 0: they add nothing to either gradient.
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, num_queries, BLOCK_M):
        o_r = start + tl.arange(0, BLOCK_M)
        o_row = i_bh.to(tl.int64) * num_queries + o_r
        b_q = load_rows(p_q, start, num_queries, stride_qm * UNIT, BLOCK_M, D, BLOCK_D, EVEN_QUERIES)
        b_lse = tl.load(lse + o_row, mask=o_r < num_queries, other=0.0)
        b_st = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_pt = tl.exp2(b_st * (scale * LOG2_E) - b_lse[None, :])
        b_do = load_rows(p_do, start, num_queries, stride_gm * UNIT, BLOCK_M, D, BLOCK_D, EVEN_QUERIES)
        b_dv = tl.dot(b_pt.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dpt = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_delta = tl.load(delta + o_row, mask=o_r < num_queries, other=0.0)
        b_dst = b_pt * (b_dpt - b_delta[None, :])
        b_dk = tl.dot(b_dst.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)

    p_dk = slab(dk, i_bh, num_heads, num_keys * num_heads * D, D, 1)
    p_dv = slab(dv, i_bh, num_heads, num_keys * num_heads * D, D, 1)
    store_rows(p_dk, b_dk * scale, o_n, num_keys, num_heads * D, BLOCK_N, D, BLOCK_D)
    store_rows(p_dv, b_dv, o_n, num_keys, num_heads * D, BLOCK_N, D, BLOCK_D)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention's result, and for the backward log2 of each softmax's denominator (of scores times log2(e)) in fp32.

    Shapes: q (B, H, queries, D); k, v (B, H, keys, D); returns (B, H, queries, D), laid out as (B, queries, H, D), and
    (B, H, queries). scale must not be negative.
    """
    q, k, v = rows(q), rows(k), rows(v)
    batch, heads, queries, head_dim = q.shape
    out = torch.empty((batch, queries, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    blocks, _, _ = self_blocks(head_dim, q.dtype, launch.architecture(q))
    _run(_attention_fwd_kernel, blocks, queries, {"q": q, "k": k, "v": v}, {"out": out, "lse": lse}, scale)
    return out, lse


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Shapes: dout, q, out (B, H, queries, D); k, v (B, H, keys, D); lse (B, H, queries); returns q's, k's and v's, each
    laid out as (B, tokens, H, D).
    """
    dout, q, k, v, out = rows(dout), rows(q), rows(k), rows(v), rows(out)
    dq, dk, dv = (torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (q, k, v))
    dq, dk, dv = dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    delta = torch.empty_like(lse)
    _, of_q, of_kv = self_blocks(q.shape[-1], q.dtype, launch.architecture(q))
    inputs = {"q": q, "k": k, "v": v, "out": out, "dout": dout}
    _run(_attention_bwd_dq_kernel, of_q, q.shape[2], inputs, {"lse": lse, "delta": delta, "dq": dq}, scale)
    del inputs["out"]
    others = {"lse": lse, "delta": delta, "dk": dk, "dv": dv}
    _run(_attention_bwd_dkv_kernel, of_kv, k.shape[2], inputs, others, scale)
    return dq, dk, dv


_STRIDE_NAMES = {
    "q": ("stride_qb", "stride_qh", "stride_qm"),
    "k": ("stride_kb", "stride_kh", "stride_kn"),
    "v": ("stride_vb", "stride_vh", "stride_vn"),
    "out": ("stride_ob", "stride_oh", "stride_om"),
    "dout": ("stride_gb", "stride_gh", "stride_gm"),
}


def rows(x: Tensor) -> Tensor:
    """x with its head dim's elements side by side in memory, copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(tensors: dict[str, Tensor]) -> tuple[dict[str, int], int]:
    """The kernels' stride arguments of the tensors, and the unit of elements that they are counted in."""
    elements = {
        name: 0 if size == 1 else step  # the stride of a single index is arbitrary
        for key, x in tensors.items()
        for name, size, step in zip(_STRIDE_NAMES[key], x.shape, x.stride(), strict=False)
    }
    unit = 8 if all(step % 8 == 0 for step in elements.values()) else 1
    return {name: step // unit for name, step in elements.items()}, unit


def precision(x: Tensor) -> str:
    """How matrix products take operands of x's type (the module's docstring says why)."""
    return "tf32x3" if x.dtype == torch.float32 else "ieee"


def _run(
    kernel: object, blocks: Blocks, num_tokens: int, inputs: dict[str, Tensor], others: dict[str, Tensor], scale: float
) -> None:
    """Launches one program per (sample, head, tile of the tokens that the kernel owns: queries, or keys for dK, dV)."""
    q, k = inputs["q"], inputs["k"]
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    steps, unit = strides(inputs)
    if kernel is _attention_bwd_dkv_kernel:
        tile, even = blocks.keys, {"EVEN_QUERIES": queries % blocks.queries == 0}
    else:
        tile, even = blocks.queries, {"EVEN_KEYS": keys % blocks.keys == 0}
    sizes: dict[str, int | float] = {"num_heads": heads, "num_queries": queries, "num_keys": keys, "scale": scale}
    launch.run(
        Launch(
            kernel,
            (batch * heads * launch.cdiv(num_tokens, tile),),
            {**inputs, **others, **steps, **sizes},
            {
                "D": head_dim,
                "BLOCK_D": padded_head_dim(head_dim),
                "BLOCK_M": blocks.queries,
                "BLOCK_N": blocks.keys,
                "UNIT": unit,
                "PRECISION": precision(q),
                **even,
            },
            blocks.num_warps,
            blocks.num_stages,
        )
    )
