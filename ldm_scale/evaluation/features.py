"""Distances between two sets of images, from EfficientNet-Lite0 features reduced to a few principal components.

The Frechet distance of arXiv:1706.08500 on other features than Inception's and in fewer dimensions, so never called
FID: the two are not comparable. The features are those whose weights every installation has. The reduction is there
because a covariance over 1280 dimensions from a few hundred images is mostly noise, and its bias would drown the
difference between models; in 32 dimensions 256 images suffice. The price: differences outside the space's directions
go unseen, so a space must be fitted on images as varied as those that it judges.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm_scale.errors import ConfigError
from ldm_scale.interchange.safetensors_io import tensors_sha256
from ldm_scale.models.perceptual import EfficientNetLite0
from ldm_scale.telemetry.log import shows_progress

NUM_COMPONENTS = 32
FEATURE_RESOLUTION = 128


class ImageFeatures(Protocol):
    """A frozen network that turns images into vectors."""

    @property
    def protocol(self) -> dict[str, str | int]:
        """What a number made from these features depends on, to be written beside it."""

    @property
    def weights_hash(self) -> str:
        """SHA-256 of its weights."""

    def extract(self, images: Tensor) -> Tensor:
        """Features of one batch. Shapes: (B, 3, H, W) in [-1, 1]; returns (B, D) fp32 on the CPU."""


class EfficientNetFeatures:
    """Turns images into the (1280,) vectors that EfficientNet-Lite0's classifier sees."""

    def __init__(
        self, device: torch.device | str = "cpu", resolution: int = FEATURE_RESOLUTION, batch_size: int = 16
    ) -> None:
        self.resolution = resolution
        self._device, self._batch_size = torch.device(device), batch_size
        self._net = EfficientNetLite0().to(self._device)

    @property
    def protocol(self) -> dict[str, str | int]:
        """What a number made from these features depends on, to be written beside it."""
        return {
            "features": "EfficientNet-Lite0, ImageNet weights 57934424, 1280 activations averaged over space",
            "pixels": "clamped to [-1, 1], rounded to 8 bits",
            "resize": "bilinear, antialiased",
            "resolution": self.resolution,
        }

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the network's weights, as they are used here."""
        return tensors_sha256(self._net.state_dict())

    @torch.inference_mode()
    def extract(self, images: Tensor) -> Tensor:
        """Features of one batch. Shapes: (B, 3, H, W) in [-1, 1]; returns (B, 1280) fp32 on the CPU."""
        return self._net.pooled(self._prepare(images)).cpu()

    def __call__(self, images: Tensor | Iterable[Tensor], num_images: int | None = None) -> Tensor:
        """Features of all images, in their order.

        Shapes: images (N, 3, H, W) in [-1, 1], or batches of such, of `num_images` in all where that is known;
        returns (N, 1280) fp32 on the CPU.
        """
        batches: Iterable[Tensor] = torch.split(images, self._batch_size) if isinstance(images, Tensor) else images
        total = len(images) if isinstance(images, Tensor) else num_images
        features = [torch.empty(0, 1280)]
        with tqdm(
            total=total,
            desc="features",
            unit="images",
            mininterval=1.0,
            file=sys.stderr,
            disable=not shows_progress(),
        ) as bar:
            for batch in batches:
                features.append(self.extract(batch))
                bar.update(len(batch))
        return torch.cat(features)

    def _prepare(self, images: Tensor) -> Tensor:
        # As an image file would hold them: a sampler's floats must not be told from decoded files by their values.
        levels = ((images.to(self._device).float().clamp(-1, 1) + 1) * 127.5).round()
        size = (self.resolution, self.resolution)
        return F.interpolate(levels / 127.5 - 1, size=size, mode="bilinear", antialias=True, align_corners=False)


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """The leading principal components of a set of features, not whitened: each keeps its variance.

    Shapes: mean (D,), components (K, D) with orthonormal rows; both float64.
    """

    mean: Tensor
    components: Tensor
    explained_variance: float  # share of the fitted features' variance that the components carry
    num_fitted: int  # images that it was fitted on

    @classmethod
    def fit(cls, features: Tensor, num_components: int = NUM_COMPONENTS) -> FeatureSpace:
        """The space of `features` (N, D); raises ConfigError if they have no `num_components` directions."""
        num_images, num_features = features.shape
        if min(num_images - 1, num_features) < num_components:
            raise ConfigError(
                f"feature space: {num_images} images with {num_features} features have at most "
                f"{max(0, min(num_images - 1, num_features))} principal components, but {num_components} are wanted: "
                "fit it on more images"
            )
        features = features.double()
        mean = features.mean(dim=0)
        _, singular_values, components = torch.linalg.svd(features - mean, full_matrices=False)
        variances = singular_values.square()
        share = variances[:num_components].sum() / variances.sum()
        return cls(mean, components[:num_components].contiguous(), share.item(), num_images)

    @property
    def name(self) -> str:
        """What reports call a Frechet distance in this space."""
        return f"FD-EffNetLite0-PCA{len(self.components)}"

    def project(self, features: Tensor) -> Tensor:
        """Coordinates of features in the space. Shapes: features (N, D); returns (N, K) float64."""
        return (features.double() - self.mean) @ self.components.T


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean (K,) and a factor (R, K) of the covariance, which is factor.T @ factor; float64.

    A factor in place of the covariance: of few vectors in many dimensions it is small, and no root has to be taken.
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> Gaussian:
        """The one with the vectors' moments, of at least two. Shapes: (N, K)."""
        vectors = vectors.double()
        mean = vectors.mean(dim=0)
        if len(vectors) <= vectors.shape[1]:
            return cls(mean, (vectors - mean) / (len(vectors) - 1) ** 0.5)
        return cls(mean, _symmetric_root(torch.cov(vectors.T)))

    def distance(self, other: Gaussian) -> float:
        """Squared Frechet distance: |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

        The eigenvalues of sigma1 sigma2 = A'A B'B are the squared singular values of A B', so the trace of the root is
        their sum. These are real and non-negative in any arithmetic, where a general matrix root of the product may
        turn complex.
        Source: arXiv:1706.08500, eq. 6; Dowson and Landau 1982.
        """
        cross = torch.linalg.svdvals(self.factor @ other.factor.mT).sum()
        variances = self.factor.square().sum() + other.factor.square().sum()
        distance = (self.mean - other.mean).square().sum() + variances - 2 * cross
        return max(0.0, float(distance))  # a difference of equal terms may round below zero


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Squared Frechet distance between two Gaussians, see `Gaussian.distance`.

    Shapes: means (K,), covariances (K, K), symmetric and positive semi-definite; computed in float64.
    """
    first, second = (
        Gaussian(mean.double(), _symmetric_root(covariance.double()))
        for mean, covariance in ((mu1, sigma1), (mu2, sigma2))
    )
    return first.distance(second)


def frechet_from_features(a: Tensor, b: Tensor, space: FeatureSpace) -> float:
    """Frechet distance between two sets of features (N_a, D) and (N_b, D), each seen as a Gaussian in `space`.

    Raises: ConfigError if a set has too few images for its covariance to have full rank.
    """
    gaussians = []
    for features in (a, b):
        coordinates = space.project(features)
        num_images, num_components = coordinates.shape
        if num_images <= num_components:
            raise ConfigError(
                f"{space.name}: {num_images} images give no covariance in {num_components} dimensions: "
                f"use at least {num_components + 1}, better several hundred"
            )
        gaussians.append(Gaussian.of(coordinates))
    return gaussians[0].distance(gaussians[1])


def _symmetric_root(matrix: Tensor) -> Tensor:
    """Square root of a positive semi-definite matrix; eigenvalues that rounding made negative count as 0."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.mT
    return root
