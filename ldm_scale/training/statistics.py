"""Mean and deviation of latents over many batches and ranks, merged in a way that does not cancel.

A sum of squares less the square of a sum loses all digits when the mean is large against the deviation. Here counts,
means and sums of squared deviations are merged pairwise, in float64.

Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from ldm_scale.errors import NumericsError
from ldm_scale.models.autoencoder import LatentStatistics

# Of the mean: latents that vary less are constant but for rounding.
MIN_RELATIVE_STD = 1e-6
# Of the latents' deviation: images that differ less are one image, or the posterior has collapsed to its noise.
MIN_RELATIVE_DIFFERENCE = 1e-3


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of numbers, channel by channel. Shapes: (c,) each, float64."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, z: Tensor) -> Moments:
        """Those of latents. Shapes: (B, c, h, w)."""
        values = z.detach().double().transpose(0, 1).flatten(1).cpu()
        count = torch.full((len(values),), float(values.shape[1]), dtype=torch.float64)
        if values.shape[1] == 0:
            return cls(count, torch.zeros_like(count), torch.zeros_like(count))
        mean = values.mean(dim=1)
        return cls(count, mean, (values - mean[:, None]).square().sum(dim=1))

    def merged(self, other: Moments) -> Moments:
        """Those of both sets together."""
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count.clamp(min=1), 0.0)
        delta = other.mean - self.mean
        return Moments(
            count, self.mean + delta * share, self.squares + other.squares + delta.square() * self.count * share
        )

    def over_channels(self) -> Moments:
        """Those of all channels' numbers as one set. Shapes: (1,) each."""
        channels = [
            Moments(self.count[i : i + 1], self.mean[i : i + 1], self.squares[i : i + 1]) for i in range(self.num)
        ]
        return merge(channels)

    @property
    def num(self) -> int:
        """Number of channels."""
        return len(self.count)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each channel, (c,)."""
        return (self.squares / self.count.clamp(min=1)).sqrt()


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together, in their order."""
    return reduce(Moments.merged, parts)


def require_difference(between: Moments, moments: Moments, num_images: int) -> None:
    """Nothing, if the posterior's means differ from image to image; one image alone says nothing about that.

    The deviation of the latents themselves does not tell: one picture's latents vary over its places, and the noise
    of the posterior varies by itself. Shapes: `between` has an entry for each place of a latent (c x h x w).
    Raises: NumericsError otherwise.
    """
    difference, std = float(between.std.square().mean().sqrt()), float(moments.over_channels().std[0])
    if num_images > 1 and not difference > MIN_RELATIVE_DIFFERENCE * std:
        raise NumericsError(
            f"latent statistics: the latents of {num_images} images differ by {difference:g} from image to image, and "
            f"their deviation is {std:g}: either all images are the same, or the posterior has collapsed to noise; "
            "look at the data with `ldm-scale doctor data`, or train with a smaller autoencoder_loss.kl_weight"
        )


def latent_statistics(
    moments: Moments, num_images: int, kind: Literal["scalar", "per_channel"], posterior: Literal["sample", "mode"]
) -> LatentStatistics:
    """The map that these moments ask for: shift 0 and 1 / std of all components, or each channel's mean and std.

    Raises: NumericsError if the latents are constant or not finite: no scale makes a latent space of them.
    Source: arXiv:2112.10752, appendix G.
    """
    used = moments if kind == "per_channel" else moments.over_channels()
    for channel, (mean, std) in enumerate(zip(used.mean.tolist(), used.std.tolist(), strict=True)):
        name = f"channel {channel} of the latents" if kind == "per_channel" else "the latents"
        if not std > MIN_RELATIVE_STD * abs(mean) or std == float("inf"):
            raise NumericsError(
                f"latent statistics: {name} of {num_images} images have standard deviation {std:g} around {mean:g}: "
                "constant or not finite, so that nothing can be learned in them; look at the pictures in TensorBoard, "
                "train on other data or with a smaller autoencoder_loss.kl_weight"
                + (", or set latents.statistics=scalar" if kind == "per_channel" else "")
            )
    if kind == "per_channel":
        mean, std = tuple(used.mean.tolist()), tuple(used.std.tolist())
        return LatentStatistics(num_images=num_images, channel_mean=mean, channel_std=std, posterior=posterior)
    return LatentStatistics(scale=1.0 / float(used.std[0]), num_images=num_images, posterior=posterior)
