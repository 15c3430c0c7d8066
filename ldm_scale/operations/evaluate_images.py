"""Evaluation of image files, whoever made them: a folder or an array beside a reference set."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm_scale import __version__
from ldm_scale.engine import collectives
from ldm_scale.engine.agreement import agreed
from ldm_scale.errors import ConfigError, DataError
from ldm_scale.evaluation.blocks import Part
from ldm_scale.evaluation.clip_score import ClipScorer, clip_figure
from ldm_scale.evaluation.feature_sets import FeatureSet, require_finite
from ldm_scale.evaluation.images import CROP, RESIZE, ImageSet, ImageStream, content_sha256, open_images, picture_side
from ldm_scale.evaluation.results import IMAGES_FORMAT, VERSION, write_result
from ldm_scale.evaluation.set_figures import set_figures
from ldm_scale.operations.evaluation_ranks import on_main
from ldm_scale.operations.evaluation_reference import (
    check_set_request,
    describe_reference,
    extract_all,
    features_of,
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
    kept_parts,
    open_features,
)
from ldm_scale.telemetry.log import get_logger

AS_THEY_ARE = "none: samples have this size"


class _Request(NamedTuple):
    """What is measured with what, opened on this rank."""

    device: torch.device
    images: ImageSet
    stream: ImageStream
    resolution: int
    space: FrechetSpace
    scorer: ClipScorer | None


def evaluate_images(arguments: argparse.Namespace) -> dict[str, Any]:
    """The result document; with --out, also written there. Nothing on other ranks.

    Raises: ConfigError, DataError for what the command line names. Collective: all ranks.
    """
    request = agreed(lambda: _open(arguments))
    device, stream, space, scorer = request.device, request.stream, request.space, request.scorer
    reference = reference_features(
        arguments.data, arguments.split, arguments.num_reference, request.resolution, arguments, space, device
    )
    content = agreed(lambda: content_sha256(request.images, stream.order) if collectives.rank() == 0 else "")
    content = collectives.broadcast_object(content)
    what = {
        "images": content,
        "wanted": stream.wanted,
        "resolution": [arguments.resolution, request.resolution],
        "clip": None if scorer is None else scorer.protocol,
    }
    kept = kept_parts(arguments, what, space, device)
    started = time.monotonic()
    beside = None if scorer is None else scorer.images
    parts = extract_all(stream, space, device, "samples", beside, kept)
    seconds = time.monotonic() - started

    def finish() -> dict[str, Any]:
        assert reference is not None, "rank 0 has it"
        made, clip = _measured(arguments, request, parts)
        figures = set_figures(made, reference, space.network, space.classifier, arguments.resamples)
        if clip is not None:
            figures["clip_score"] = clip
        warn_of_small_sets(figures)
        document = complete(
            {
                "format": IMAGES_FORMAT,
                "version": VERSION,
                "model": {"label": images_label(arguments.source), "path": str(arguments.source)}
                | {"content_sha256": content, "weights": None, "sampling": None},
                "protocol": _protocol(arguments, stream, request.resolution, space, reference, scorer),
                "figures": {"samples": figures},
                "bad_images": describe_bad(stream.bad),
                "machine": describe_machine(device, stream, seconds),
            },
            arguments,
            kept,
        )
        if arguments.out is not None:
            path = write_result(arguments.out, document)
            kept.remove()
            get_logger().info(f"wrote {path}")
        return document

    return on_main(finish)


def _open(arguments: argparse.Namespace) -> _Request:
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
    return _Request(device, images, stream, resolution, open_features(arguments, resolution, device), scorer)


def images_label(source: Path) -> str:
    """Short name of a set of images."""
    return source.resolve().name


def _measured(
    arguments: argparse.Namespace, request: _Request, parts: list[Part]
) -> tuple[FeatureSet, dict[str, Any] | None]:
    """Features of the samples, and their CLIP score if there is a judge.

    Raises: DataError if none can be used.
    """
    images, stream, scorer = request.images, request.stream, request.scorer
    if not stream.num_images:
        raise DataError(f"{images.source}: none of {stream.wanted} images can be used: {stream.bad.describe()}")
    if stream.bad.counts:
        get_logger().warning(f"{images.source}: {stream.bad.describe()}; the figures are over the rest")
    features = features_of(parts)
    require_finite(features, images.source)
    made = FeatureSet(features, request.space.description, {"num_images": stream.num_images})
    if scorer is None:
        return made, None
    assert images.caption is not None, "captions were looked for before"
    captions = [images.caption(stream.order[place]) for place in stream.numbers]
    embedded = features_of(parts, "beside")
    return made, clip_figure(embedded, scorer.texts(captions), captions, None, arguments.resamples)


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
