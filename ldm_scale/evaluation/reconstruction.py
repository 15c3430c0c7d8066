"""How well an autoencoder gives images back: PSNR, beside what plain bicubic resampling by the same factor reaches.

The baseline makes the number readable: an autoencoder that keeps 1/f^2 of the positions must beat throwing away the
rest. (It keeps more channels per position than the small image has, so beating it is necessary, not impressive.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_scale.errors import ConfigError, DataError
from ldm_scale.telemetry.tensorboard import image_grid

PEAK_TO_PEAK = 2.0  # pixels lie in [-1, 1]


@dataclass(frozen=True)
class ReconstructionReport:
    """Means over images of per-image figures."""

    num_images: int
    psnr_db: float
    bicubic_psnr_db: float  # of bicubic down by f and up again
    mean_absolute_error: float  # in pixel values of [-1, 1]

    @property
    def gain_db(self) -> float:
        """PSNR above the bicubic baseline."""
        return self.psnr_db - self.bicubic_psnr_db


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB; infinite for equal images.

    Shapes: pixels x, y (B, 3, H, W) in [-1, 1]; returns (B,) float64.
    """
    assert x.shape == y.shape, f"images {tuple(x.shape)} and {tuple(y.shape)} differ in shape"
    mean_squared_error = (x.double() - y.double()).square().flatten(start_dim=1).mean(dim=1)
    return 10.0 * torch.log10(PEAK_TO_PEAK**2 / mean_squared_error)


def summary(values: Tensor) -> dict[str, float | None]:
    """Mean and standard deviation over the images whose figure is a number, None where there is none.

    Left out are infinite figures, of images that come back exactly, and NaN, of images that have none.
    """
    values = values[values.isfinite()]
    if not len(values):
        return {"mean": None, "std": None}
    return {"mean": values.mean().item(), "std": values.std(correction=0).item()}


def num_summarised(values: Tensor) -> int:
    """Images that `summary` is over."""
    return int(values.isfinite().sum())


@torch.no_grad()
def bicubic_baseline(x: Tensor, factor: int) -> Tensor:
    """Images made `factor` times smaller, with antialiasing, then as large as before.

    Keys' kernel with a = -1/2 both ways, as Pillow and MATLAB have it (torch's without antialiasing has -3/4).
    Shapes: pixels (B, 3, H, W); returns the same, clamped to [-1, 1].
    Raises: ConfigError if `factor` does not divide both sides.
    """
    height, width = x.shape[-2:]
    if height % factor or width % factor:
        raise ConfigError(
            f"images of {height}x{width} pixels cannot be reduced by f = {factor}: f must divide both sides; "
            "change data.resolution or autoencoder.channel_multipliers"
        )
    small = F.interpolate(x.float(), size=(height // factor, width // factor), mode="bicubic", antialias=True)
    return F.interpolate(small, size=(height, width), mode="bicubic", antialias=True).clamp(-1, 1)


@torch.no_grad()
def evaluate_reconstruction(
    reconstruct: Callable[[Tensor], Tensor], batches: Iterable[Tensor], factor: int
) -> ReconstructionReport:
    """Figures over all images of `batches`; reconstructions are clamped to [-1, 1] as a file would clamp them.

    Shapes: `reconstruct` maps pixels (B, 3, H, W) to the same, on the batches' device.
    Raises: DataError if there is no image.
    """
    values = []
    for x in batches:
        y = reconstruct(x).float().clamp(-1, 1)
        absolute = (x - y).abs().double().flatten(start_dim=1).mean(dim=1)
        values.append(torch.stack([psnr(x, y), psnr(x, bicubic_baseline(x, factor)), absolute]).cpu())
    num_images = sum(value.shape[1] for value in values)
    if num_images == 0:
        raise DataError("no image to evaluate reconstructions on: the split is empty; name another data split")
    psnr_db, bicubic_psnr_db, error = torch.cat(values, dim=1).mean(dim=1).tolist()
    return ReconstructionReport(num_images, psnr_db, bicubic_psnr_db, error)


def reconstruction_grid(originals: Tensor, *others: Tensor, columns: int = 8) -> Tensor:
    """One picture: each row of originals with the rows of the others (reconstructions, a baseline) right below it.

    Shapes: all (N, 3, H, W) in [-1, 1]; returns (3, height, width) uint8.
    """
    num_images = len(originals)
    columns = min(columns, num_images)
    rows = []
    for begin in range(0, math.ceil(num_images / columns) * columns, columns):
        for images in (originals, *others):
            row = images[begin : begin + columns].float().cpu()
            rows.append(F.pad(row, (0, 0, 0, 0, 0, 0, 0, columns - len(row)), value=1.0))
    return image_grid(torch.cat(rows), columns)
