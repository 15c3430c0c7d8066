"""Classifier-free guidance: push the prediction away from what the model says without the caption."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
ConditionalDenoiser = Callable[[Tensor, Tensor, Tensor], Tensor]


def guided(denoiser: ConditionalDenoiser, context: Tensor, null_context: Tensor, scale: float) -> Denoiser:
    """A denoiser (z, t) -> eps_u + scale (eps_c - eps_u), for `sample`.

    Scale 1 is no guidance and costs one pass (conditional); 0 is unconditional, one pass too; any other scale runs
    both passes as one batch of twice the size. In the notation of the paper scale is 1 + w.
    Shapes: denoiser (z (B, c, h, w), t (B,), context (B, M, d)); context (B, M, d); null_context (B or 1, M, d).
    Source: arXiv:2207.12598, eq. 6.
    """
    null_context = null_context.expand_as(context)
    if scale == 1.0:
        return lambda z, t: denoiser(z, t, context)
    if scale == 0.0:
        return lambda z, t: denoiser(z, t, null_context)
    both_contexts = torch.cat([null_context, context])

    def predict(z: Tensor, t: Tensor) -> Tensor:
        unconditional, conditional = denoiser(torch.cat([z, z]), torch.cat([t, t]), both_contexts).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return predict
