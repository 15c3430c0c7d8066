"""Evaluation from the command line: a folder with an autoencoder becomes figures, their protocol and a picture."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ldm_scale import __version__
from ldm_scale.config.schema import AutoencoderLossConfig
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
from ldm_scale.evaluation.images import CROP, RESIZE, ImageSet, ImageStream, open_images
from ldm_scale.evaluation.reconstruction import reconstruction_grid
from ldm_scale.evaluation.results import FORMAT, VERSION, write_result
from ldm_scale.evaluation.similarity import PROTOCOL as SSIM
from ldm_scale.evaluation.similarity import WINDOW
from ldm_scale.interchange.artifact import Artifact
from ldm_scale.interchange.load import LoadedAutoencoder, Weights, read_source
from ldm_scale.interchange.safetensors_io import tensors_sha256
from ldm_scale.models.perceptual import PerceptualLoss, build_perceptual
from ldm_scale.operations.evaluation_setup import (
    FrechetSpace,
    check_request,
    choose_device,
    complete,
    describe_bad,
    describe_machine,
    open_features,
)
from ldm_scale.telemetry.log import get_logger, shows_progress

PICTURE_FILE = "reconstructions.png"


def evaluate_autoencoder(arguments: argparse.Namespace) -> dict[str, Any]:
    """The result document; with --out, also written there with a picture of reconstructions.

    Raises: ConfigError, DataError or CheckpointError for what the command line names; NumericsError for weights whose
    reconstructions are not finite.
    """
    check_request(arguments, PICTURE_FILE)
    device = choose_device(arguments.device)
    artifact = _artifact(arguments.source, arguments.weights)
    resolution = _resolution(arguments.resolution, artifact)
    images = open_images(arguments.data, arguments.split)
    stream = ImageStream(images, resolution, arguments.batch, arguments.num_images)
    instruments, space = _instruments(arguments, resolution, device)
    model = LoadedAutoencoder(artifact).to(device, torch.float32)
    meter = ReconstructionMeter(model, instruments)
    started = time.monotonic()
    _measure(stream, meter, device)
    seconds = time.monotonic() - started
    if not meter.num_images:
        raise DataError(f"{images.source}: none of {stream.wanted} images can be used: {stream.bad.describe()}")
    if stream.bad.counts:
        get_logger().warning(f"{images.source}: {stream.bad.describe()}; the figures are over the rest")
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": _describe_model(arguments.source, artifact),
        "protocol": _protocol(images, stream, instruments.perceptual, space, resolution),
        "figures": meter.figures(),
        "bad_images": describe_bad(stream.bad),
        "machine": describe_machine(device, meter.num_images / seconds),
    }
    document = complete(document, arguments)
    if arguments.out is not None:
        path = write_result(arguments.out, document)
        grid = reconstruction_grid(*meter.shown, columns=8)
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(arguments.out / PICTURE_FILE, format="PNG")
        get_logger().info(f"wrote {path} and {PICTURE_FILE} (reconstructions below their originals)")
    return document


def _measure(stream: ImageStream, meter: ReconstructionMeter, device: torch.device) -> None:
    with tqdm(
        total=stream.wanted,
        desc="evaluate",
        unit="images",
        mininterval=1.0,
        file=sys.stderr,
        disable=not shows_progress(),
    ) as bar:
        for pixels in stream:
            meter.add(pixels.to(device, non_blocking=True))
            bar.update(len(pixels))


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


def _protocol(
    images: ImageSet, stream: ImageStream, perceptual: PerceptualLoss, space: FrechetSpace, resolution: int
) -> dict[str, Any]:
    tensors = dict(perceptual.named_parameters()) | dict(perceptual.named_buffers())
    return {
        "program_version": __version__,
        "data": {
            "digest": images.digest,
            "split": images.split,
            "num_images": stream.num_images,
            "pixels_digest": stream.pixels_digest,
        },
        "resolution": resolution,
        "crop": CROP,
        "resize": RESIZE,
        "reconstruction": RECONSTRUCTION,
        "statistics": STATISTICS,
        "psnr": PSNR,
        "ssim": SSIM,
        "bicubic": BASELINE,
        "perceptual": {"net": perceptual.name, "weights_sha256": tensors_sha256(tensors)},
        "frechet": space.protocol(stream.num_images),
    }
