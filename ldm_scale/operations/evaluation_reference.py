"""What samples are set beside a reference with: its features, their cache, the judge of captions."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL
import torch
from torch import Tensor

from ldm_scale import __version__
from ldm_scale.engine import collectives
from ldm_scale.engine.agreement import agreed
from ldm_scale.errors import ConfigError, DataError
from ldm_scale.evaluation import fidelity
from ldm_scale.evaluation.blocks import Block, Part
from ldm_scale.evaluation.clip_score import ClipScorer
from ldm_scale.evaluation.feature_sets import (
    EXTENSION,
    FeatureCache,
    FeatureSet,
    default_cache,
    read_features,
    require_finite,
)
from ldm_scale.evaluation.images import CROP, RESIZE, ImageSet, ImageStream, content_sha256, open_images
from ldm_scale.evaluation.parts import PartFolder, measure_blocks
from ldm_scale.evaluation.set_figures import DEFINITIONS
from ldm_scale.operations.evaluation_setup import FrechetSpace, progress_bar
from ldm_scale.telemetry.log import get_logger


def check_set_request(arguments: argparse.Namespace) -> None:
    """Nothing, if the options of figures beside a reference go together.

    Raises: ConfigError.
    """
    if arguments.resamples < 0 or arguments.resamples == 1:
        raise ConfigError(f"--resamples {arguments.resamples}: must be 2 or more, or 0 for no confidence intervals")
    if arguments.clip_weights is None and arguments.clip_model is not None:
        raise ConfigError(
            f"--clip-model {arguments.clip_model}: without weights there is no CLIP score; add --clip-weights FILE, or "
            "OpenCLIP's name of weights in the usual cache"
        )
    if arguments.cache is not None and arguments.cache.exists() and not arguments.cache.is_dir():
        raise ConfigError(f"--cache {arguments.cache} is a file; give a folder")


def open_scorer(arguments: argparse.Namespace, device: torch.device) -> ClipScorer | None:
    """The judge of captions, if its weights are named.

    Raises: ConfigError if they cannot be had.
    """
    if arguments.clip_weights is None:
        return None
    return ClipScorer(arguments.clip_model or "ViT-B-32", arguments.clip_weights, device)


def open_cache(arguments: argparse.Namespace) -> FeatureCache:
    """Where features of reference sets are kept."""
    if arguments.no_cache:
        return FeatureCache(None)
    return FeatureCache(arguments.cache or default_cache())


def reference_features(
    path: Path,
    split: str | None,
    num_images: int | None,
    resolution: int,
    arguments: argparse.Namespace,
    space: FrechetSpace,
    device: torch.device,
) -> FeatureSet | None:
    """Features of a reference set, of a feature file as they are, or from the cache, or taken now and kept.

    None on ranks other than 0, which makes the figures.
    Raises: ConfigError, DataError for what the command line names; NumericsError for features that are not finite.
    Collective: all ranks.
    """
    if path.suffix == EXTENSION:
        return agreed(lambda: _from_file(path, split, num_images, resolution) if collectives.rank() == 0 else None)
    stream, images = agreed(lambda: _open_reference(path, split, num_images, resolution, arguments.batch))
    cache = open_cache(arguments)

    def look() -> tuple[dict[str, Any], FeatureSet | None]:
        if collectives.rank() != 0:
            return {}, None
        wanted = {
            "images_sha256": content_sha256(images, stream.order),
            "num_listed": stream.wanted,
            **_pixels(resolution),
            "decoder": _DECODER,
            "extractor": space.description,
        }
        found = cache.get(wanted)
        if found is not None and num_images is not None and found.images["left_out"]:
            raise DataError(
                f"--num-reference {num_images}: of these images {len(found)} can be used, by the features that the "
                "cache has of them; make the others again, or leave --num-reference out to use what can be used"
            )
        return wanted, found

    wanted, cached = agreed(look)
    if collectives.broadcast_object(cached is not None):
        if cached is not None:
            warn_of_bad(images.source, cached.images["left_out"], "cached")
        return cached
    parts = extract_all(stream, space, device, "reference")

    def keep() -> FeatureSet | None:
        if collectives.rank() != 0:
            return None
        if not stream.num_images:
            raise DataError(f"{images.source}: none of {stream.wanted} images can be used: {stream.bad.describe()}")
        features = features_of(parts)
        require_finite(features, images.source)
        if stream.bad.counts:
            get_logger().warning(f"{images.source}: {stream.bad.describe()}; the reference is the rest")
        described = {
            "wanted": wanted,
            "source": images.source,
            "split": images.split,
            "num_images": stream.num_images,
            "pixels_digest": stream.pixels_digest,
            "left_out": stream.bad.counts.total(),
        }
        found = FeatureSet(features, space.description, described)
        cache.put(wanted, found)
        return found

    return agreed(keep)


_DECODER = f"Pillow {PIL.__version__}, torch {torch.__version__}, ldm-scale {__version__}"


def _pixels(resolution: int) -> dict[str, Any]:
    """How a reference's images become the pixels that features are of."""
    return {"resolution": resolution, "crop": CROP, "resize": RESIZE}


def _from_file(path: Path, split: str | None, num_images: int | None, resolution: int) -> FeatureSet:
    if num_images is not None or split is not None:
        raise ConfigError(f"{path} is a feature file, of which all is used: leave split and number of images out")
    found = read_features(path)
    if not {"pixels_digest", "num_images"} <= set(found.images):
        raise DataError(f"{path}: does not say what its features are of; take a file from the cache of features")
    was = found.images.get("wanted")
    was = was if isinstance(was, dict) else {}
    for name, value in _pixels(resolution).items():
        if was.get(name) != value:
            raise ConfigError(
                f"{path}: its features are of images of another {name}, {was.get(name)!r} where the samples' is "
                f"{value!r}, and distances would be of that; give the images themselves, or a file of this {name}"
            )
    if was.get("decoder") != _DECODER:
        get_logger().warning(
            f"{path}: its images were decoded by {was.get('decoder')}, here it is {_DECODER}; the protocol says so"
        )
    return found


def _open_reference(
    path: Path, split: str | None, num_images: int | None, resolution: int, batch: int
) -> tuple[ImageStream, ImageSet]:
    images = open_images(path, split)
    return ImageStream(images, resolution, batch, num_images, option="--num-reference"), images


def warn_of_bad(source: str, count: int, where: str) -> None:
    """Nothing; says that images were left out."""
    if count:
        get_logger().warning(f"{source}: {count} images could not be used ({where}); the reference is the rest")


def extract_all(
    stream: ImageStream,
    space: FrechetSpace,
    device: torch.device,
    what: str,
    beside: Callable[[Tensor], Tensor] | None = None,
    kept: PartFolder | None = None,
) -> list[Part]:
    """Features of all images of a stream, on rank 0; `beside` gives further rows of each image.

    Collective: all ranks.
    """

    def measure(block: Block[Tensor]) -> Part:
        assert block.images is not None
        tensors = {"features": space.features.extract(block.images.to(device, non_blocking=True))}
        if beside is not None:
            tensors["beside"] = beside(block.images)
        bar.update(len(stream.places(block.number)))
        return Part(tensors, {})

    with progress_bar(stream, what) as bar:
        return measure_blocks(stream, measure, kept, others_have=bar.update)


def features_of(parts: Sequence[Part], name: str = "features") -> Tensor:
    """The features in parts, of which one at least has images. Shapes: returns (N, D) fp32."""
    return torch.cat([part.tensors[name] for part in parts if name in part.tensors])


def describe_reference(reference: FeatureSet) -> dict[str, Any]:
    """What the reference is, as part of a protocol."""
    images = reference.images
    described = {name: images[name] for name in ("pixels_digest", "num_images")} | {"split": images.get("split", "")}
    decoder = images.get("wanted", {}).get("decoder", _DECODER)
    return described if decoder == _DECODER else described | {"decoder": decoder}  # another program's, of a file


def set_protocol(
    space: FrechetSpace, num_samples: int, reference: dict[str, Any] | None, scorer: ClipScorer | None
) -> dict[str, Any]:
    """What figures beside a reference depend on; `reference` None is the images of the protocol's data."""
    definitions = dict(DEFINITIONS)
    if space.classifier is None:
        del definitions["inception_score"]
    if space.num_components is not None:
        definitions["frechet"] += (
            f"; in {space.num_components} leading principal components of the reference's features"
        )
    if not fidelity.is_installed():
        del definitions["kernel"]
    return {
        "num_samples": num_samples,
        "reference": reference,
        "extractor": space.description,
        "definitions": definitions,
        "clip": None if scorer is None else scorer.protocol,
    }


def warn_of_small_sets(figures: dict[str, Any]) -> None:
    """Nothing; what small numbers of images do to the figures goes to the log."""
    for found in figures.values():
        if "warning" in found:
            get_logger().warning(found["warning"])
