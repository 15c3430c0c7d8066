"""Structural similarity (SSIM) with the constants of its paper.

On each of the three RGB channels, averaged over channels and places: what torchmetrics, piq and scikit-image compute
for colour images; on luma alone, as some report it, the number is another one. Only windows that lie whole inside the
image count, and images are not made smaller first. Plain torch in float64: windowed variances are differences of
nearly equal numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_scale.errors import ConfigError

WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03
PROTOCOL = "mean over RGB channels, 11x11 Gaussian window, sigma 1.5, K1 0.01, K2 0.03, whole windows only"


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each pair; 1 for equal images.

    Shapes: pixels x, y (B, 3, H, W) in [-1, 1]; returns (B,) float64.
    Raises: ConfigError if the images are smaller than the window.
    Source: Wang et al. 2004, eq. 13 and section III-C.
    """
    assert x.shape == y.shape, f"images {tuple(x.shape)} and {tuple(y.shape)} differ in shape"
    height, width = x.shape[-2:]
    if min(height, width) < WINDOW:
        raise ConfigError(
            f"images of {height}x{width} pixels are smaller than SSIM's window of {WINDOW}x{WINDOW}: "
            f"evaluate at a resolution of at least {WINDOW}"
        )
    # The luminance term compares brightness from black up: it is not the same on values around zero.
    x, y = (x.double() + 1) / 2, (y.double() + 1) / 2
    mu_x, mu_y, xx, yy, xy = _windowed_means(torch.stack([x, y, x * x, y * y, x * y]))
    variance_x, variance_y, covariance = xx - mu_x.square(), yy - mu_y.square(), xy - mu_x * mu_y
    c1, c2 = K1**2, K2**2
    luminance = (2 * mu_x * mu_y + c1) / (mu_x.square() + mu_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    similarity: Tensor = luminance * structure
    return similarity.mean(dim=(1, 2, 3))


def _windowed_means(values: Tensor) -> Tensor:
    """Gaussian-weighted means around each place that has a whole window, one axis after the other.

    Shapes: (N, B, 3, H, W) to (N, B, 3, H - 10, W - 10).
    """
    offsets = torch.arange(WINDOW, dtype=values.dtype, device=values.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()
    planes = values.flatten(0, 2).unsqueeze(1)
    means = F.conv2d(F.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return means.view(*values.shape[:3], *means.shape[-2:])
