"""What an autoencoder loses and what it keeps, measured image by image.

Reconstructions come from the mode of the posterior, and are clamped and rounded to 8 bits before anything is measured,
as a file would hold them. Beside each figure stands what it is to be judged by: bicubic down by f and up again, and
for the perceptual distance also that between unrelated images (each original against the one before it): a
reconstruction at that distance has nothing left of its picture. What is kept of each image is a few numbers and its
features, so memory does not grow by its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_scale.errors import DataError, NumericsError
from ldm_scale.evaluation.blocks import Part
from ldm_scale.evaluation.features import ImageFeatures
from ldm_scale.evaluation.frechet import frechet_figures
from ldm_scale.evaluation.images import eight_bits
from ldm_scale.evaluation.intervals import RESAMPLES, Halves
from ldm_scale.evaluation.rate import PIXEL_BITS, CodeUsage, GaussianRate, numbers_per_pixel
from ldm_scale.evaluation.reconstruction import bicubic_baseline, num_summarised, psnr, summary
from ldm_scale.evaluation.rows import Rows
from ldm_scale.evaluation.set_figures import score_figure
from ldm_scale.evaluation.similarity import ssim
from ldm_scale.interchange.load import LoadedAutoencoder
from ldm_scale.models.perceptual import PerceptualLoss

NUM_SHOWN = 16
RECONSTRUCTION = "mode of the posterior, float32, clamped to [-1, 1], rounded to 8 bits"
STATISTICS = "mean and population standard deviation of the images' own figures"
PSNR = "over all pixels and channels of an image, peak 255; images that come back exactly are counted and left out"
BASELINE = "Keys' bicubic, a = -1/2, down by f with antialiasing and up again, rounded to 8 bits"


@dataclass(frozen=True, eq=False)
class Instruments:
    """Frozen networks to measure with."""

    perceptual: PerceptualLoss
    features: ImageFeatures
    frechet_name: str
    num_features: int
    num_components: int | None  # principal components that the Frechet distance is taken in; None = all features
    classifier: Tensor | None = None  # of FID's Inception: gives the reconstructions' Inception score
    score_name: str = "IS"


class ReconstructionMeter:
    """Takes in images, batch by batch, and gives the figures of a model on all of them.

    `shown` are the first originals and their reconstructions, for a picture.
    """

    def __init__(self, model: LoadedAutoencoder, instruments: Instruments) -> None:
        self._model, self._instruments = model, instruments
        self.rows = Rows()
        self._previous: tuple[int, Tensor] | None = None  # number and pixels of the last image
        self._shown: list[tuple[Tensor, Tensor]] = []
        config = model.config
        self._rates: GaussianRate | CodeUsage | None = None
        if config.kind == "kl":
            self._rates = GaussianRate(config.latent_channels)
        elif config.codebook_size is not None:
            self._rates = CodeUsage(config.codebook_size)

    @property
    def num_images(self) -> int:
        """Images so far."""
        return len(self.rows)

    @torch.inference_mode()
    def add(self, x: Tensor, numbers: Sequence[int] | None = None, before: Tensor | None = None) -> None:
        """Nothing; measures one batch of neighbours in the order of evaluation.

        `numbers` are the images' places in the order; None follows on the batch before. `before` is the image before
        the first, which is known of a batch that follows on: each is compared with the one before it.
        Shapes: pixels (B, 3, H, W) in [-1, 1] of 8-bit values, on the model's device; before (1, 3, H, W).
        Raises: NumericsError if a reconstruction is not finite; ConfigError for images that f does not divide.
        """
        x = eight_bits(x)
        previous = self._previous
        if numbers is None:
            follows = 0 if previous is None else previous[0] + 1
            numbers = range(follows, follows + len(x))
        first = numbers[0]
        if before is None and previous is not None and previous[0] == first - 1:
            before = previous[1]
        assert before is not None or first == 0, f"image {first} is compared with the one before it, which is not known"
        baseline = eight_bits(bicubic_baseline(x, self._model.config.downsampling_factor))
        y = self._reconstruct(x, numbers)
        perceptual = self._instruments.perceptual
        others = torch.cat([x[:1] if before is None else eight_bits(before), x[:-1]])
        values = {
            "psnr_db": psnr(x, y),
            "ssim": ssim(x, y),
            "mean_absolute_error": (x - y).abs().double().mean(dim=(1, 2, 3)),
            "perceptual": perceptual(y, x),
            "bicubic_psnr_db": psnr(x, baseline),
            "bicubic_ssim": ssim(x, baseline),
            "bicubic_perceptual": perceptual(baseline, x),
            "unrelated_perceptual": perceptual(others, x),
        }
        extract = self._instruments.features.extract
        rows = {name: value.double().cpu() for name, value in values.items()}
        self.rows.add(list(numbers), rows | {"original": extract(x), "reconstruction": extract(y)})
        shown = sum(number < NUM_SHOWN for number in numbers)
        if shown:
            self._shown.append((x[:shown].cpu(), y[:shown].cpu()))
        self._previous = numbers[-1], x[-1:]

    @property
    def part(self) -> Part:
        """All that was measured, to be sent and kept."""
        parts = [self.rows.part, *([] if self._rates is None else [self._rates.part])]
        tensors = {name: x for part in parts for name, x in part.tensors.items()}
        if self._shown:
            tensors["shown.originals"], tensors["shown.reconstructions"] = self.shown
        return Part(tensors, {name: value for part in parts for name, value in part.values.items()})

    def take(self, part: Part) -> None:
        """Nothing; takes in what was measured of the images that follow, by another rank or an earlier start."""
        self.rows.take(part)
        if self._rates is not None and "rate" in part.values:
            self._rates.take(part)
        if "shown.originals" in part.tensors:
            self._shown.append((part.tensors["shown.originals"], part.tensors["shown.reconstructions"]))

    @property
    def shown(self) -> tuple[Tensor, Tensor]:
        """The first originals and reconstructions. Shapes: (N, 3, H, W) twice, N at most NUM_SHOWN."""
        originals, reconstructions = zip(*self._shown, strict=True)
        return torch.cat(originals), torch.cat(reconstructions)

    def figures(self) -> dict[str, Any]:
        """All figures by name, for JSON.

        Units: PSNR in dB; errors in pixel values of [-1, 1]; rates in bits per pixel of the image.
        Raises: DataError if there was no image.
        """
        if not self.num_images:
            raise DataError("no image to evaluate reconstructions on; name another split or folder")
        values = self.rows.tensors("")
        unrelated = values.pop("unrelated_perceptual")[1:]  # the first image has none before it
        bicubic = {name: values.pop(f"bicubic_{name}") for name in ("psnr_db", "ssim", "perceptual")}
        means = values | {"perceptual.unrelated": unrelated} | {f"bicubic.{name}": x for name, x in bicubic.items()}
        originals, reconstructions = values.pop("original"), values.pop("reconstruction")
        instruments = self._instruments
        frechet = frechet_figures(originals, reconstructions, instruments.num_components, RESAMPLES)
        figures: dict[str, Any] = {
            "psnr_db": summary(values["psnr_db"]),
            "exact_images": int(values["psnr_db"].isposinf().sum()),
            "ssim": summary(values["ssim"]),
            "mean_absolute_error": summary(values["mean_absolute_error"]),
            "perceptual": {
                "name": instruments.perceptual.name,
                **summary(values["perceptual"]),
                "unrelated": summary(unrelated)["mean"],
            },
            "frechet": {"name": instruments.frechet_name, **frechet},
            "bicubic": {name: summary(x)["mean"] for name, x in bicubic.items()},
            "counts": {name: num_summarised(x) for name, x in means.items()},  # of the images that means are over
            "rate": {"numbers_per_pixel": numbers_per_pixel(self._model.config), **self._rate()},
        }
        if instruments.classifier is not None:
            figures["inception_score"] = score_figure(
                reconstructions.double() @ instruments.classifier.double().T,
                instruments.score_name,
                Halves(len(reconstructions), RESAMPLES, "the reconstructions"),
            )
        if isinstance(self._rates, CodeUsage):
            figures["codes"] = {
                "share_used": self._rates.share_used,
                "perplexity": self._rates.perplexity,
                "num_chosen": self._rates.num_chosen,
            }
        return figures

    def _reconstruct(self, x: Tensor, numbers: Sequence[int]) -> Tensor:
        network = self._model.network
        mean, logvar = network.encode_moments(x)
        num_pixels = x[:, 0].numel()
        if isinstance(self._rates, GaussianRate):
            assert logvar is not None, "a KL autoencoder's posterior has a variance"
            self._rates.add(mean, logvar, num_pixels)
        if isinstance(self._rates, CodeUsage):
            assert network.quantizer is not None, "a VQ autoencoder has a quantiser"
            self._rates.add(network.quantizer(mean)[1], num_pixels)
        y = network.decode(network.latents(mean, logvar))
        finite = torch.isfinite(y).flatten(start_dim=1).all(dim=1)
        if not finite.all():
            first = numbers[int((~finite).nonzero()[0])]
            raise NumericsError(
                f"{int((~finite).sum())} of {len(y)} reconstructions are not finite, the first of image {first} in "
                "the order of evaluation: these weights are damaged or diverged"
            )
        return eight_bits(y)

    def _rate(self) -> dict[str, float]:
        if isinstance(self._rates, GaussianRate):
            return {
                "kl_bits_per_pixel": self._rates.bits_per_pixel,
                "kl_bits_per_pixel_fitted": self._rates.fitted_bits_per_pixel,
            }
        if isinstance(self._rates, CodeUsage):
            return {
                "code_bits_per_pixel": self._rates.bits_per_pixel,
                "code_entropy_bits_per_pixel": self._rates.fitted_bits_per_pixel,
            }
        return {"stored_bits_per_pixel": PIXEL_BITS}
