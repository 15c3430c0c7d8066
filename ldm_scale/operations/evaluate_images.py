"""Evaluation of image files, whoever made them: a folder or an array beside a reference set."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_scale import __version__
from ldm_scale.errors import ConfigError, DataError
from ldm_scale.evaluation.clip_score import ClipScorer, clip_figure
from ldm_scale.evaluation.feature_sets import FeatureSet, require_finite
from ldm_scale.evaluation.images import CROP, RESIZE, ImageSet, ImageStream, content_sha256, open_images, picture_side
from ldm_scale.evaluation.results import IMAGES_FORMAT, VERSION, write_result
from ldm_scale.evaluation.set_figures import set_figures
from ldm_scale.operations.evaluation_reference import (
    check_set_request,
    describe_reference,
    extract_all,
    open_scorer,
    reference_features,
    set_protocol,
    warn_of_small_sets,
)
from ldm_scale.operations.evaluation_setup import (
    FrechetSpace,
    check_request,
    choose_device,
    complete,
    describe_bad,
    describe_machine,
    open_features,
)
from ldm_scale.telemetry.log import get_logger

AS_THEY_ARE = "none: samples have this size"


def evaluate_images(arguments: argparse.Namespace) -> dict[str, Any]:
    """The result document; with --out, also written there.

    Raises: ConfigError, DataError for what the command line names.
    """
    check_request(arguments)
    check_set_request(arguments)
    if arguments.resolution is not None and arguments.resolution < 1:
        raise ConfigError(f"--resolution {arguments.resolution}: must be at least 1 pixel")
    device = choose_device(arguments.device)
    images = open_images(arguments.source)
    resolution = arguments.resolution or picture_side(images)
    stream = ImageStream(
        images, resolution, arguments.batch, arguments.num_images, as_they_are=arguments.resolution is None
    )
    scorer = open_scorer(arguments, device)
    if scorer is not None and images.caption is None:
        raise ConfigError(
            f"--clip-weights {arguments.clip_weights}: {arguments.source} has no captions; give a folder with NAME.txt "
            "beside NAME.png, or leave --clip-weights and --clip-model out"
        )
    space = open_features(arguments, resolution, device)
    reference = reference_features(
        arguments.data, arguments.split, arguments.num_reference, resolution, arguments, space, device
    )
    started = time.monotonic()
    made, clip = _measured(arguments, images, stream, space, scorer, device)
    seconds = time.monotonic() - started
    figures = set_figures(made, reference, space.network, space.classifier, arguments.resamples)
    if clip is not None:
        figures["clip_score"] = clip
    warn_of_small_sets(figures)
    content = content_sha256(images, stream.order)
    document = complete(
        {
            "format": IMAGES_FORMAT,
            "version": VERSION,
            "model": {"label": images_label(arguments.source), "path": str(arguments.source)}
            | {"content_sha256": content, "weights": None, "sampling": None},
            "protocol": _protocol(arguments, stream, resolution, space, reference, scorer),
            "figures": {"samples": figures},
            "bad_images": describe_bad(stream.bad),
            "machine": describe_machine(device, made.images["num_images"] / seconds),
        },
        arguments,
    )
    if arguments.out is not None:
        get_logger().info(f"wrote {write_result(arguments.out, document)}")
    return document


def images_label(source: Path) -> str:
    """Short name of a set of images."""
    return source.resolve().name


def _measured(
    arguments: argparse.Namespace,
    images: ImageSet,
    stream: ImageStream,
    space: FrechetSpace,
    scorer: ClipScorer | None,
    device: torch.device,
) -> tuple[FeatureSet, dict[str, Any] | None]:
    """Features of the samples, and their CLIP score if there is a judge.

    Raises: DataError if fewer images than --num-images can be used, or none.
    """
    embedded: list[Tensor] = []
    beside = None if scorer is None else lambda pixels: embedded.append(scorer.images(pixels))
    features = extract_all(stream, space, device, "samples", beside)
    if not len(features):
        raise DataError(f"{images.source}: none of {stream.wanted} images can be used: {stream.bad.describe()}")
    if stream.bad.counts:
        if arguments.num_images is not None:
            raise DataError(
                f"--num-images {arguments.num_images}: of these images {stream.num_images} can be used "
                f"({stream.bad.describe()}), and distances depend on the number; make the others again, or leave "
                "--num-images out to measure what can be used"
            )
        get_logger().warning(f"{images.source}: {stream.bad.describe()}; the figures are over the rest")
    require_finite(features, images.source)
    made = FeatureSet(features, space.description, {"num_images": stream.num_images})
    if scorer is None:
        return made, None
    assert images.caption is not None, "captions were looked for before"
    captions = [images.caption(stream.order[position]) for position in stream.numbers]
    return made, clip_figure(torch.cat(embedded), scorer.texts(captions), captions, None, arguments.resamples)


def _protocol(
    arguments: argparse.Namespace,
    stream: ImageStream,
    resolution: int,
    space: FrechetSpace,
    reference: FeatureSet,
    scorer: ClipScorer | None,
) -> dict[str, Any]:
    described = describe_reference(reference)
    return {
        "program_version": __version__,
        "data": described,
        "resolution": resolution,
        "reference_crop": CROP,
        "reference_resize": RESIZE,
        "samples_resize": AS_THEY_ARE if arguments.resolution is None else f"{CROP}, {RESIZE}",
        "samples": set_protocol(space, stream.num_images, described, scorer),
    }
