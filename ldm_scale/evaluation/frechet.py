"""Frechet distance of reconstructions from their originals, with the noise that it has at this number of images.

The distance itself is between the originals and the reconstructions of the same images, as rFID is. Its two companions
are between halves that share no image: originals against originals, which is what sampling alone makes of it (the
floor), and originals against reconstructions, which has the same bias and says how much of it the model adds.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ldm_scale.evaluation.features import FeatureSpace, Gaussian, frechet_from_features
from ldm_scale.evaluation.intervals import Halves


def frechet_protocol(num_images: int, num_features: int, num_components: int | None) -> dict[str, Any]:
    """What a distance rests on besides its features; `num_components` None is all dimensions."""
    dimensions = num_components or num_features
    bias = f"{num_images} images in {dimensions} dimensions"
    if num_images <= dimensions:
        bias += ", so the covariances are singular"
    bias += "; between unpaired sets the larger the fewer images: judge the halves by their floor"
    if num_components is None:
        space = "all features"
        bias += "; published numbers are over 50,000 images"
    else:
        space = f"{num_components} leading principal components of the originals' features"
        bias += "; differences outside the originals' leading directions are not seen"
    return {"dimensions": dimensions, "space": space, "bias": bias}


def frechet_figures(
    originals: Tensor, reconstructions: Tensor, num_components: int | None, resamples: int = 0
) -> dict[str, Any]:
    """The distance and its companions, None where there are too few images for them; and the reason then.

    With `resamples`, an `interval` from so many halves of the pairs.
    Principal components are those of the originals. Halves are the even and the odd images.
    Shapes: both (N, D), row i of one image.
    """
    assert originals.shape == reconstructions.shape, "every original has its reconstruction"
    num_images, num_features = originals.shape
    needed = 2 if num_components is None else num_components + 1
    figures: dict[str, Any] = {"distance": None, "halves_reconstructed": None, "halves_original": None}
    if num_images < needed:
        return figures | {"not_measured": f"{num_images} images, at least {needed} are needed"}
    assert num_components is None or num_components <= num_features, "components are some of the dimensions"
    space = None if num_components is None else FeatureSpace.fit(originals, num_components)
    figures["distance"] = _distance(originals, reconstructions, space)
    halves = Halves(num_images, resamples, "the pairs of images")
    if resamples and halves.size >= needed:
        over = [_distance(originals[half], reconstructions[half], space) for half in halves.indices()]
        figures["interval"] = halves.interval(figures["distance"], over, (0.0, math.inf))
    if space is not None:
        share = space.explained_variance
        figures["explained_variance"] = share if math.isfinite(share) else None  # originals that are all alike
    if num_images // 2 < needed:
        return figures | {"not_measured": f"halves of {num_images} images have fewer than {needed}"}
    figures["halves_reconstructed"] = _distance(originals[::2], reconstructions[1::2], space)
    figures["halves_original"] = _distance(originals[::2], originals[1::2], space)
    return figures


def _distance(a: Tensor, b: Tensor, space: FeatureSpace | None) -> float:
    if space is not None:
        return frechet_from_features(a, b, space)
    return Gaussian.of(a).distance(Gaussian.of(b))
