"""Evaluation from the command line: a folder with an autoencoder becomes figures, their protocol and a picture."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ldm_scale import __version__
from ldm_scale.config.schema import AutoencoderLossConfig
from ldm_scale.engine import collectives
from ldm_scale.engine.agreement import agreed
from ldm_scale.engine.ema import canonical_name
from ldm_scale.engine.lazy_tensors import num_elements
from ldm_scale.errors import ConfigError, DataError
from ldm_scale.evaluation.autoencoder import (
    BASELINE,
    PSNR,
    RECONSTRUCTION,
    STATISTICS,
    Instruments,
    ReconstructionMeter,
)
from ldm_scale.evaluation.blocks import Block, Part
from ldm_scale.evaluation.generation import png_bytes
from ldm_scale.evaluation.images import CROP, RESIZE, ImageSet, ImageStream, content_sha256, open_images
from ldm_scale.evaluation.parts import PartFolder, measure_blocks
from ldm_scale.evaluation.reconstruction import reconstruction_grid
from ldm_scale.evaluation.results import FORMAT, VERSION, write_result
from ldm_scale.evaluation.similarity import PROTOCOL as SSIM
from ldm_scale.evaluation.similarity import WINDOW
from ldm_scale.interchange.artifact import Artifact
from ldm_scale.interchange.load import LoadedAutoencoder, Weights, read_source
from ldm_scale.interchange.safetensors_io import tensors_sha256
from ldm_scale.models.perceptual import PerceptualLoss, build_perceptual
from ldm_scale.operations.evaluation_ranks import on_main
from ldm_scale.operations.evaluation_setup import (
    FrechetSpace,
    check_request,
    choose_device,
    complete,
    describe_bad,
    describe_machine,
    kept_parts,
    measured_before,
    open_features,
    progress_bar,
)
from ldm_scale.telemetry.log import get_logger

PICTURE_FILE = "reconstructions.png"


class _Request(NamedTuple):
    """What is measured with what, opened on this rank."""

    device: torch.device
    artifact: Artifact
    resolution: int
    images: ImageSet
    stream: ImageStream
    instruments: Instruments
    space: FrechetSpace
    model: LoadedAutoencoder


def evaluate_autoencoder(
    arguments: argparse.Namespace, between: Callable[[], object] | None = None, *, reuse: bool = False
) -> dict[str, Any]:
    """The result document; with --out, also written there with a picture of reconstructions. Nothing on other ranks.

    `between` is that of `measure_blocks`. With `reuse`, a result of this very measurement in --out is taken.

    Raises: ConfigError, DataError or CheckpointError for what the command line names; NumericsError for weights whose
    reconstructions are not finite. Collective: all ranks.
    """
    request = agreed(lambda: _open(arguments))
    stream, device, space = request.stream, request.device, request.space
    meter = ReconstructionMeter(request.model, request.instruments)
    kept = kept_parts(
        arguments,
        {
            "model": request.artifact.content_hash,
            "data": [_content(request.images, stream), request.images.split, stream.wanted],
            "resolution": request.resolution,
            "perceptual": _describe_perceptual(request.instruments.perceptual),
        },
        space,
        device,
    )
    if reuse and collectives.broadcast_object((before := measured_before(arguments, kept)) is not None):
        return before or {}
    started = time.monotonic()
    parts = _measure(request, kept, between)
    seconds = time.monotonic() - started

    def finish() -> dict[str, Any]:
        if not stream.num_images:
            raise DataError(
                f"{request.images.source}: none of {stream.wanted} images can be used: {stream.bad.describe()}"
            )
        if stream.bad.counts:
            get_logger().warning(f"{request.images.source}: {stream.bad.describe()}; the figures are over the rest")
        for part in parts:
            meter.take(part)
        document: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "model": _describe_model(arguments.source, request.artifact),
            "protocol": _protocol(request),
            "figures": meter.figures(),
            "bad_images": describe_bad(stream.bad),
            "machine": describe_machine(device, stream, seconds),
        }
        document = complete(document, arguments, kept)
        if arguments.out is not None:
            grid = reconstruction_grid(*meter.shown, columns=8)
            picture = png_bytes(Image.fromarray(grid.permute(1, 2, 0).numpy()))
            path = write_result(arguments.out, document, {PICTURE_FILE: picture})
            kept.remove()
            get_logger().info(f"wrote {path} and {PICTURE_FILE} (reconstructions below their originals)")
        return document

    return on_main(finish)


def _open(arguments: argparse.Namespace) -> _Request:
    check_request(arguments, PICTURE_FILE)
    device = choose_device(arguments.device)
    artifact = _artifact(arguments.source, arguments.weights)
    resolution = _resolution(arguments.resolution, artifact)
    images = open_images(arguments.data, arguments.split)
    stream = ImageStream(images, resolution, arguments.batch, arguments.num_images)
    instruments, space = _instruments(arguments, resolution, device)
    model = LoadedAutoencoder(artifact).to(device, torch.float32)
    return _Request(device, artifact, resolution, images, stream, instruments, space, model)


def _measure(request: _Request, kept: PartFolder, between: Callable[[], object] | None) -> list[Part]:
    """What was measured of each block, on rank 0."""

    def measure(block: Block[Tensor]) -> Part:
        assert block.images is not None
        pixels, before = block.images, request.stream.before(block.number)
        meter = ReconstructionMeter(request.model, request.instruments)
        # The first image of all has none before it, and its comparison with itself is left out of the figure.
        before = pixels[:1] if before is None else before
        meter.add(pixels.to(request.device, non_blocking=True), block.numbers, before.to(request.device))
        bar.update(len(request.stream.places(block.number)))
        return meter.part

    with progress_bar(request.stream, "evaluate") as bar:
        return measure_blocks(request.stream, measure, kept, others_have=bar.update, between=between)


def _artifact(source: Path, weights: Weights | None) -> Artifact:
    """The autoencoder in a folder.

    Raises: ConfigError if the folder does not hold the weights that were asked for.
    """
    found = read_source(source, weights)
    artifact = found if isinstance(found, Artifact) else found.autoencoder
    held = artifact.provenance.get("weights")
    if weights is not None and held != canonical_name(weights):
        raise ConfigError(
            f"--weights {weights}: of its autoencoder, {source} holds {held or 'unnamed'} weights alone; leave it out, "
            "or give a checkpoint of stage 1, which has both"
        )
    return artifact


def _resolution(asked: int | None, artifact: Artifact) -> int:
    resolution = int(artifact.provenance["resolution"]) if asked is None else asked
    factor = artifact.config.downsampling_factor
    if resolution < WINDOW or resolution % factor:
        what = "the model's training resolution" if asked is None else "--resolution"
        raise ConfigError(
            f"{what} {resolution}: must be a multiple of the model's f = {factor} and at least {WINDOW} pixels, SSIM's "
            "window; give another --resolution"
        )
    return resolution


def _instruments(
    arguments: argparse.Namespace, resolution: int, device: torch.device
) -> tuple[Instruments, FrechetSpace]:
    perceptual = _perceptual(arguments.perceptual, arguments.perceptual_weights).to(device)
    space = open_features(arguments, resolution, device)
    score_name = space.network.call("inception_score")
    instruments = Instruments(
        perceptual,
        space.features,
        space.name,
        space.num_features,
        space.num_components,
        space.classifier,
        f"{score_name} of reconstructions",
    )
    return instruments, space


def _perceptual(net: str, weights: Path | None) -> PerceptualLoss:
    try:
        return build_perceptual(
            AutoencoderLossConfig(
                perceptual_net=net,  # type: ignore[arg-type]
                perceptual_weights=None if weights is None else str(weights),
            )
        )
    except ConfigError as error:
        # The models' layer speaks of configuration keys.
        message = str(error).replace("autoencoder_loss.", "").replace("perceptual_weights", "--perceptual-weights")
        raise ConfigError(message.replace("perceptual_net", "--perceptual")) from error


def _describe_model(source: Path, artifact: Artifact) -> dict[str, Any]:
    config = artifact.config
    size = f"n{config.codebook_size}-" if config.codebook_size is not None else ""
    return {
        "label": f"{config.kind}-f{config.downsampling_factor}-{size}c{config.latent_channels}",
        "path": str(source),
        "content_sha256": artifact.content_hash,
        "weights": artifact.provenance.get("weights"),
        "images": artifact.provenance.get("images"),
        "resolution": artifact.provenance["resolution"],
        "kind": config.kind,
        "f": config.downsampling_factor,
        "latent_channels": config.latent_channels,
        "codebook_size": config.codebook_size,
        "parameters": num_elements(artifact.state),
    }


def _content(images: ImageSet, stream: ImageStream) -> str:
    """Hash of what is measured: files in a folder may have been replaced by others of their size."""
    return images.digest if images.split else content_sha256(images, stream.order)


def _describe_perceptual(perceptual: PerceptualLoss) -> dict[str, Any]:
    tensors = dict(perceptual.named_parameters()) | dict(perceptual.named_buffers())
    return {"net": perceptual.name, "weights_sha256": tensors_sha256(tensors)}


def _protocol(request: _Request) -> dict[str, Any]:
    images, stream = request.images, request.stream
    return {
        "program_version": __version__,
        "data": {
            "digest": images.digest,
            "split": images.split,
            "num_images": stream.num_images,
            "pixels_digest": stream.pixels_digest,
        },
        "resolution": request.resolution,
        "crop": CROP,
        "resize": RESIZE,
        "reconstruction": RECONSTRUCTION,
        "statistics": STATISTICS,
        "psnr": PSNR,
        "ssim": SSIM,
        "bicubic": BASELINE,
        "perceptual": _describe_perceptual(request.instruments.perceptual),
        "frechet": request.space.protocol(stream.num_images),
    }
