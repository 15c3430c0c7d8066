"""Scaled dot-product attention written out: the definition that every backend is tested against.

Products are in the input's type, as plain torch does them; the softmax is in fp32 at least. It holds the whole matrix
of scores, (B, heads, queries, keys), several times over: right for tests and small inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v; scale None is 1 / sqrt(head_dim).

    Shapes: q (B, heads, queries, head_dim); k, v (B, heads, keys, head_dim), strided views allowed; returns q's shape.
    Source: arXiv:1706.03762, eq. 1.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    scores = q @ k.transpose(-1, -2)
    weights = (scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale).softmax(dim=-1)
    return weights.to(v.dtype) @ v
