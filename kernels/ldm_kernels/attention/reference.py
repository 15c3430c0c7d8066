"""Scaled dot-product attention through torch's own operator."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v; scale None is 1 / sqrt(head_dim).

    Shapes: q (B, heads, queries, head_dim); k, v (B, heads, keys, head_dim), strided views allowed; returns q's shape.
    Source: arXiv:1706.03762, eq. 1.
    """
    return F.scaled_dot_product_attention(q, k, v, scale=scale)
