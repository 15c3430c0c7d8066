"""How many bits an autoencoder's latents carry: the rate of arXiv:2112.10752, figure 2.

Two bounds for each kind, both in bits per pixel of the image. What the model was trained with: KL from N(0, 1), or
log2|Z| bits for every code. And what the best code that treats all places alike would pay: one Gaussian for each
channel, or one probability for each code, matched to the evaluated images. The KL divergence bounds the rate from
above (bits-back coding pays exactly that for a sample of the posterior); the entropy bounds it for codes. Bounds of the
second sort are what a plot can put KL and VQ side by side by. The identity's are the 24 bits that its pixels are
stored in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm_scale.config.schema import AutoencoderConfig
from ldm_scale.evaluation.blocks import Part
from ldm_scale.models.autoencoder import kl_divergence

PIXEL_BITS = 24.0  # three channels of 8 bits


def numbers_per_pixel(config: AutoencoderConfig) -> float:
    """Latent values per pixel: c / f^2."""
    return config.latent_channels / config.downsampling_factor**2


class GaussianRate:
    """Sums over posteriors, from which their KL divergences follow. `num_pixels` counts those of the images."""

    def __init__(self, num_channels: int) -> None:
        self._kl_nats = 0.0  # from N(0, 1)
        self._sums = torch.zeros(4, num_channels, dtype=torch.float64)  # mean, mean^2, variance, log-variance
        self._numbers_per_channel = 0
        self.num_pixels = 0

    def add(self, mean: Tensor, logvar: Tensor, num_pixels: int) -> None:
        """Nothing; takes in the posteriors of images with `num_pixels` pixels in all.

        Shapes: mean, logvar (B, c, h, w).
        """
        mean, logvar = mean.double(), logvar.double()
        self._kl_nats += float(kl_divergence(mean, logvar).sum())
        values = torch.stack([mean, mean.square(), logvar.exp(), logvar])
        self._sums += values.sum(dim=(1, 3, 4)).cpu()
        self._numbers_per_channel += mean[:, 0].numel()
        self.num_pixels += num_pixels

    @property
    def part(self) -> Part:
        """The sums, to be sent and kept."""
        values = {"kl_nats": self._kl_nats, "count": self._numbers_per_channel, "num_pixels": self.num_pixels}
        return Part({"rate.sums": self._sums}, {"rate": values})

    def take(self, part: Part) -> None:
        """Nothing; takes in the posteriors of a part."""
        values = part.values["rate"]
        self._kl_nats += values["kl_nats"]
        self._sums += part.tensors["rate.sums"]
        self._numbers_per_channel += values["count"]
        self.num_pixels += values["num_pixels"]

    @property
    def bits_per_pixel(self) -> float:
        """KL from N(0, 1), the prior of training."""
        return self._kl_nats / math.log(2) / self.num_pixels

    @property
    def fitted_bits_per_pixel(self) -> float:
        """KL from one Gaussian for each channel, with the moments of the channel's samples.

        With these moments the KL of a number, (log s^2 - log v + (v + (mean - m)^2) / s^2 - 1) / 2, has the average
        (log s^2 - average of log v) / 2.
        """
        mean, square, variance, logvar = self._sums / self._numbers_per_channel
        prior_variance = variance + square - mean.square()
        nats: float = 0.5 * (prior_variance.log() - logvar).sum().item() * self._numbers_per_channel
        return nats / math.log(2) / self.num_pixels


class CodeUsage:
    """How often each code of a codebook was chosen."""

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)
        self.num_pixels = 0

    def add(self, indices: Tensor, num_pixels: int) -> None:
        """Nothing; takes in the codes of images with `num_pixels` pixels in all. Shapes: indices (B, h, w)."""
        self.counts += torch.bincount(indices.flatten().cpu(), minlength=len(self.counts))
        self.num_pixels += num_pixels

    @property
    def part(self) -> Part:
        """The counts, to be sent and kept."""
        return Part({"rate.counts": self.counts}, {"rate": {"num_pixels": self.num_pixels}})

    def take(self, part: Part) -> None:
        """Nothing; takes in the codes of a part."""
        self.counts += part.tensors["rate.counts"]
        self.num_pixels += int(part.values["rate"]["num_pixels"])

    @property
    def num_chosen(self) -> int:
        """Choices that were made: places of the latents."""
        return int(self.counts.sum())

    @property
    def share_used(self) -> float:
        """Share of the codebook that was chosen at least once; at most num_chosen / |Z|."""
        return float((self.counts > 0).double().mean())

    @property
    def entropy_bits(self) -> float:
        """Entropy of a code in bits, from the frequencies; too low where there are not many choices for each code."""
        shares = self.counts[self.counts > 0].double() / self.num_chosen
        return float(-(shares * shares.log2()).sum())

    @property
    def perplexity(self) -> float:
        """Number of equally frequent codes that would have the same entropy."""
        return float(2.0**self.entropy_bits)

    @property
    def bits_per_pixel(self) -> float:
        """With log2|Z| bits for every code."""
        return math.log2(len(self.counts)) * self.num_chosen / self.num_pixels

    @property
    def fitted_bits_per_pixel(self) -> float:
        """With the code's entropy."""
        return self.entropy_bits * self.num_chosen / self.num_pixels
