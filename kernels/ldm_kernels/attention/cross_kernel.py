"""Attention to at most 128 keys, such as the 77 tokens of a caption: all keys and values stay on the chip.

A program takes one head of one sample and a part of its queries, loads K and V once and walks the queries. A whole row
of scores fits into the tile, so the softmax is the plain one, and the backward needs nothing of the forward's: from Q,
K, V and dO it computes P again, and rowsum(P * dP) in the tile. dK and dV are sums over all queries: each part of the
queries writes its own in fp32, and a small kernel adds the parts in a fixed order, so that results are deterministic.

Such attention is bound by memory, and these kernels move the fewest bytes: Q in and O out; Q and dO in and dQ out.

The loops switch off Triton's hoisting of invariant code: it would load K and V into registers before the loop, in
every layout that the products want them in, and spill.
"""

# Parameters of a kernel have a comment each and no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_kernels.attention.kernel import LOG2_E, load_rows, precision, rows, slab, store_rows, strides
from ldm_kernels.attention.tables import Blocks, cross_blocks, cross_splits, padded_head_dim
from ldm_kernels.common import launch
from ldm_kernels.common.launch import Launch

_SUM_BLOCK = 1024  # elements that a program of the summing kernel owns


@triton.jit
def _cross_attention_fwd_kernel(
    q,  # (B, H, queries, D)
    k,  # (B, H, keys, D)
    v,  # (B, H, keys, D)
    out,  # (B, queries, H, D) contiguous
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    num_heads, num_queries, num_keys, split_queries, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr, EVEN_QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0)
    p_q = slab(q, i_bh, num_heads, stride_qb, stride_qh, UNIT)
    p_k = slab(k, i_bh, num_heads, stride_kb, stride_kh, UNIT)
    p_v = slab(v, i_bh, num_heads, stride_vb, stride_vh, UNIT)
    p_out = slab(out, i_bh, num_heads, num_queries * num_heads * D, D, 1)
    b_k = load_rows(p_k, 0, num_keys, stride_kn * UNIT, BLOCK_N, D, BLOCK_D, False)
    b_v = load_rows(p_v, 0, num_keys, stride_vn * UNIT, BLOCK_N, D, BLOCK_D, False)
    m_n = tl.arange(0, BLOCK_N)[None, :] < num_keys
    scale_log2 = scale * LOG2_E

    first = tl.program_id(1) * split_queries
    last = tl.minimum(first + split_queries, num_queries)
    for start in tl.range(first, last, BLOCK_M, disable_licm=True):
        b_q = load_rows(p_q, start, num_queries, stride_qm * UNIT, BLOCK_M, D, BLOCK_D, EVEN_QUERIES)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_max = tl.max(tl.where(m_n, b_s, float("-inf")), 1) * scale_log2
        b_p = tl.where(m_n, tl.exp2(b_s * scale_log2 - b_max[:, None]), 0.0)
        b_sum = tl.sum(b_p, 1)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION) / b_sum[:, None]
        store_rows(p_out, b_out, start, num_queries, num_heads * D, BLOCK_M, D, BLOCK_D)


@triton.jit
def _cross_attention_bwd_kernel(
    q,  # (B, H, queries, D)
    k,  # (B, H, keys, D)
    v,  # (B, H, keys, D)
    dout,  # (B, H, queries, D)
    dq,  # (B, queries, H, D) contiguous
    dk,  # (splits, B, keys, H, D) contiguous, fp32 if there are several splits
    dv,  # (splits, B, keys, H, D) contiguous, fp32 if there are several splits
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm,
    num_heads, num_queries, num_keys, split_queries, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr, EVEN_QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0)
    p_q = slab(q, i_bh, num_heads, stride_qb, stride_qh, UNIT)
    p_k = slab(k, i_bh, num_heads, stride_kb, stride_kh, UNIT)
    p_v = slab(v, i_bh, num_heads, stride_vb, stride_vh, UNIT)
    p_do = slab(dout, i_bh, num_heads, stride_gb, stride_gh, UNIT)
    p_dq = slab(dq, i_bh, num_heads, num_queries * num_heads * D, D, 1)
    b_k = load_rows(p_k, 0, num_keys, stride_kn * UNIT, BLOCK_N, D, BLOCK_D, False)
    b_v = load_rows(p_v, 0, num_keys, stride_vn * UNIT, BLOCK_N, D, BLOCK_D, False)
    m_n = tl.arange(0, BLOCK_N)[:, None] < num_keys
    scale_log2 = scale * LOG2_E

    # Keys are the rows: K, V, P^T and dS^T are left operands, which take the fewest registers. Queries that are not
    # there have dO = 0, and with it dP = 0: they add nothing.
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = tl.program_id(1) * split_queries
    last = tl.minimum(first + split_queries, num_queries)
    for start in tl.range(first, last, BLOCK_M, disable_licm=True):
        b_q = load_rows(p_q, start, num_queries, stride_qm * UNIT, BLOCK_M, D, BLOCK_D, EVEN_QUERIES)
        b_do = load_rows(p_do, start, num_queries, stride_gm * UNIT, BLOCK_M, D, BLOCK_D, EVEN_QUERIES)
        b_st = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_max = tl.max(tl.where(m_n, b_st, float("-inf")), 0) * scale_log2
        b_pt = tl.where(m_n, tl.exp2(b_st * scale_log2 - b_max[None, :]), 0.0)
        b_pt = b_pt / tl.sum(b_pt, 0)[None, :]
        b_dv = tl.dot(b_pt.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dpt = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_dst = (b_pt * (b_dpt - tl.sum(b_pt * b_dpt, 0)[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_dst, b_q, b_dk, input_precision=PRECISION)
        b_dq = tl.dot(tl.trans(b_dst), b_k, input_precision=PRECISION) * scale
        store_rows(p_dq, b_dq, start, num_queries, num_heads * D, BLOCK_M, D, BLOCK_D)

    # (sample, head) of this split's own copy of the gradients.
    o_split = tl.program_id(1).to(tl.int64) * tl.num_programs(0) * num_keys * D
    p_dk = slab(dk + o_split, i_bh, num_heads, num_keys * num_heads * D, D, 1)
    p_dv = slab(dv + o_split, i_bh, num_heads, num_keys * num_heads * D, D, 1)
    store_rows(p_dk, b_dk * scale, 0, num_keys, num_heads * D, BLOCK_N, D, BLOCK_D)
    store_rows(p_dv, b_dv, 0, num_keys, num_heads * D, BLOCK_N, D, BLOCK_D)


@triton.jit
def _cross_attention_sum_kernel(
    parts_k,  # (splits, numel) fp32
    parts_v,  # (splits, numel) fp32
    dk,  # (numel,)
    dv,  # (numel,)
    num_splits,
    numel,
    BLOCK: tl.constexpr,
):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < numel
    b_k = tl.zeros([BLOCK], tl.float32)
    b_v = tl.zeros([BLOCK], tl.float32)
    for i_split in range(0, num_splits):
        o_split = tl.cast(i_split, tl.int64) * numel
        b_k += tl.load(parts_k + o_split + o_x, mask=m_x, other=0.0)
        b_v += tl.load(parts_v + o_split + o_x, mask=m_x, other=0.0)
    tl.store(dk + o_x, b_k.to(dk.dtype.element_ty), mask=m_x)
    tl.store(dv + o_x, b_v.to(dv.dtype.element_ty), mask=m_x)


def cross_attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention's result.

    Shapes: q (B, H, queries, D); k, v (B, H, keys, D), keys <= 128; returns (B, H, queries, D), laid out as
    (B, queries, H, D). scale must not be negative.
    """
    q, k, v = rows(q), rows(k), rows(v)
    batch, heads, queries, head_dim = q.shape
    out = torch.empty((batch, queries, heads, head_dim), dtype=q.dtype, device=q.device)
    blocks, _ = cross_blocks(head_dim, k.shape[2], q.dtype, launch.architecture(q))
    _run(_cross_attention_fwd_kernel, blocks, {"q": q, "k": k, "v": v}, {"out": out}, scale)
    return out.transpose(1, 2)


def cross_attention_bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Shapes: dout, q (B, H, queries, D); k, v (B, H, keys, D), keys <= 128; returns q's, k's and v's, each laid out as
    (B, tokens, H, D).
    """
    dout, q, k, v = rows(dout), rows(q), rows(k), rows(v)
    dq, dk, dv = (torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (q, k, v))
    _, blocks = cross_blocks(q.shape[3], k.shape[2], q.dtype, launch.architecture(q))
    inputs = {"q": q, "k": k, "v": v, "dout": dout}
    _, splits = _split(q, blocks)
    if splits == 1:
        _run(_cross_attention_bwd_kernel, blocks, inputs, {"dq": dq, "dk": dk, "dv": dv}, scale)
    else:
        parts_k, parts_v = (torch.empty((splits, *dk.shape), dtype=torch.float32, device=dk.device) for _ in range(2))
        _run(_cross_attention_bwd_kernel, blocks, inputs, {"dq": dq, "dk": parts_k, "dv": parts_v}, scale)
        launch.run(
            Launch(
                _cross_attention_sum_kernel,
                (launch.cdiv(dk.numel(), _SUM_BLOCK),),
                {"parts_k": parts_k, "parts_v": parts_v, "dk": dk, "dv": dv, "num_splits": splits, "numel": dk.numel()},
                {"BLOCK": _SUM_BLOCK},
            )
        )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _split(q: Tensor, blocks: Blocks) -> tuple[int, int]:
    """Queries in each part, a multiple of the tile's, and how many parts that makes."""
    batch, heads, queries, _ = q.shape
    tiles = max(1, launch.cdiv(queries, blocks.queries))
    split_queries = launch.cdiv(tiles, cross_splits(batch * heads, queries)) * blocks.queries
    return split_queries, max(1, launch.cdiv(queries, split_queries))


def _run(kernel: object, blocks: Blocks, inputs: dict[str, Tensor], outputs: dict[str, Tensor], scale: float) -> None:
    batch, heads, queries, head_dim = inputs["q"].shape
    split_queries, splits = _split(inputs["q"], blocks)
    steps, unit = strides(inputs)
    launch.run(
        Launch(
            kernel,
            (batch * heads, splits),
            {
                **inputs,
                **outputs,
                **steps,
                "num_heads": heads,
                "num_queries": queries,
                "num_keys": inputs["k"].shape[2],
                "split_queries": split_queries,
                "scale": scale,
            },
            {
                "D": head_dim,
                "BLOCK_D": padded_head_dim(head_dim),
                "BLOCK_M": blocks.queries,
                "BLOCK_N": blocks.keys,
                "UNIT": unit,
                "EVEN_QUERIES": queries % blocks.queries == 0,
                "PRECISION": precision(inputs["q"]),
            },
            blocks.num_warps,
            blocks.num_stages,
        )
    )
