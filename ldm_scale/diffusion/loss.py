"""The denoising objective, per image, so that callers can average, weight or bin it by noise level."""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def diffusion_loss(prediction: Tensor, target: Tensor, kind: Literal["l2", "l1"]) -> Tensor:
    """Mean error of each image over its elements.

    Computed in float32 whatever the inputs' type: summed in bfloat16, a loss has two digits.
    Shapes: prediction and target (B, ...); returns (B,) in float32.
    Source: arXiv:2112.10752, eq. 2 and 3 (l2); arXiv:2006.11239, eq. 14.
    """
    assert prediction.shape == target.shape, f"prediction {prediction.shape} and target {target.shape} differ"
    error = prediction.float() - target.float()
    per_element = error.square() if kind == "l2" else error.abs()
    return per_element.flatten(start_dim=1).mean(dim=1)
