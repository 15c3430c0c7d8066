"""The denoising objective, per image, so that callers can average, weight or bin it by noise level."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ldm_scale.config.schema import DiffusionConfig


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


def x0_weight(cfg: DiffusionConfig, log_snr: Tensor) -> Tensor:
    """Weight of an image's squared error of x0; `cfg.weighting` is not none.

    Shapes: log_snr (B,), returns (B,).
    Source: arXiv:2303.09556, section 3.4 (min_snr); arXiv:2401.11605, section 3.5 (soft_min_snr: 1 / (1/SNR +
    1/gamma)); arXiv:2204.00227 (p2, there for the error of the noise, which is SNR times that of x0).
    """
    if cfg.weighting == "min_snr":
        return log_snr.exp().clamp(max=cfg.snr_gamma)
    if cfg.weighting == "soft_min_snr":
        return cfg.snr_gamma * torch.sigmoid(log_snr - torch.tensor(cfg.snr_gamma).log())
    assert cfg.weighting == "p2", f"no weight for {cfg.weighting!r}"
    return log_snr.exp() / (cfg.p2_k + log_snr.exp()) ** cfg.p2_gamma
