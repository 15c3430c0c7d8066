"""Evaluation of a conditioned model from the command line: samples for the y of real images become figures.

Masks and small images depend on --seed and the image's place in the order of the split, samples on --seed plus it:
every model is given the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_scale import __version__
from ldm_scale.conditioning.batches import conditions_of
from ldm_scale.config.schema import ConditioningConfig, SamplingConfig
from ldm_scale.data.annotations import MAP, TEXT
from ldm_scale.data.shards import Dataset
from ldm_scale.engine.lazy_tensors import num_elements
from ldm_scale.errors import CheckpointError, ConfigError, DataError
from ldm_scale.evaluation.clip_score import ClipScorer
from ldm_scale.evaluation.feature_sets import FeatureSet
from ldm_scale.evaluation.generation import captioned_grid
from ldm_scale.evaluation.images import CROP, RESIZE, open_split
from ldm_scale.evaluation.results import SAMPLES_FORMAT, VERSION, write_result
from ldm_scale.evaluation.samples import PROTOCOLS, Judge, SampleMeter
from ldm_scale.evaluation.shown import captions, first_rows, grid_side, panels
from ldm_scale.evaluation.similarity import PROTOCOL as SSIM
from ldm_scale.evaluation.split import SplitStream
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact
from ldm_scale.interchange.load import LoadedDiffusion, Weights, read_source
from ldm_scale.interchange.sampling import SampleOptions, chosen_sampling
from ldm_scale.operations.evaluation_reference import (
    check_set_request,
    describe_reference,
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
from ldm_scale.operations.sample import check_sampling, sample_images, sampler_options
from ldm_scale.telemetry.log import get_logger, shows_progress

PICTURE_FILE = "samples.png"
NUM_SHOWN = 24
_MAX_WIDTH_PX = 1600
# Section of the configuration -> the manifest's list of names that its numbers stand for.
_NAMES = {"classes": "classes", "layout": "object_classes", "semantic_map": "map_labels"}


def evaluate_diffusion(arguments: argparse.Namespace) -> dict[str, Any]:
    """The result document; with --out, also written there with a picture of samples.

    Raises: ConfigError, DataError or CheckpointError for what the command line names; NumericsError for samples that
    are not finite.
    """
    check_request(arguments, PICTURE_FILE)
    check_set_request(arguments)
    check_sampling(arguments)
    device = choose_device(arguments.device)
    artifact = read_diffusion(arguments.source, arguments.weights)
    model = LoadedDiffusion(artifact)
    kinds = tuple(model.network.conditioner.conditions)
    dataset = open_split(arguments.data, arguments.split)
    _check_names(model, dataset, kinds)
    options = sampler_options(arguments)
    sampling = chosen_sampling(model, options)
    annotations = model.conditioning.annotations - {TEXT}
    if "layout" in kinds and dataset.map_labels:
        annotations |= {MAP}  # they tell the colours that boxes are judged by
    stream = SplitStream(dataset, model.resolution, annotations, arguments.batch, arguments.num_images)
    space = open_features(arguments, model.resolution, device)
    space = space._replace(name=space.name.removeprefix("r"))  # rFID is of reconstructions
    scorer = _scorer(arguments, kinds, device)
    reference = _reference(arguments, model.resolution, space, device)
    model.to(device)
    judge = _judge(model, dataset, kinds, space)
    meter = SampleMeter(replace(judge, scorer=scorer, reference=reference, resamples=arguments.resamples))
    started = time.monotonic()
    pictures, texts, speed = _measure(stream, meter, model, options, sampling, arguments.seed)
    seconds = time.monotonic() - started
    if not meter.num_images:
        raise DataError(f"{dataset.manifest_path}: none of {stream.wanted} images can be used: {stream.bad.describe()}")
    log = get_logger()
    if stream.bad.counts:
        log.warning(f"{dataset.manifest_path}: {stream.bad.describe()}; the figures are over the rest")
    if model.num_truncated:
        log.warning(f"{model.num_truncated} captions or layouts are longer than the model reads")
    figures = meter.figures()
    warn_of_small_sets(figures["samples"])
    protocol = _protocol(dataset, stream, space, model.conditioning, model.resolution, arguments.seed)
    described = None if reference is None else describe_reference(reference)
    document = {
        "format": SAMPLES_FORMAT,
        "version": VERSION,
        "model": _describe_model(arguments, artifact, kinds, sampling),
        "protocol": protocol | {"samples": set_protocol(space, meter.num_images, described, scorer)},
        "figures": figures,
        "truncated": model.num_truncated,
        "bad_images": describe_bad(stream.bad),
        "machine": describe_machine(device, meter.num_images / seconds, sampling_images_per_s=speed),
    }
    document = complete(document, arguments)
    if arguments.out is not None:
        path = write_result(arguments.out, document)
        _write_picture(arguments, pictures, texts, model.resolution)
        log.info(f"wrote {path} and {PICTURE_FILE}")
    return document


def read_diffusion(source: Path, weights: Weights | None) -> DiffusionArtifact:
    """The diffusion model in a folder.

    Raises: CheckpointError if it holds an autoencoder.
    """
    artifact = read_source(source, weights)
    if isinstance(artifact, Artifact):
        raise CheckpointError(
            f"{source} holds an autoencoder, expected a diffusion model: give the folder of a stage-2 run, "
            "or use `ldm-scale evaluate autoencoder`"
        )
    return artifact


def _scorer(arguments: argparse.Namespace, kinds: tuple[str, ...], device: torch.device) -> ClipScorer | None:
    if arguments.clip_weights is not None and not {"text", "frozen_text"} & set(kinds):
        raise ConfigError(
            f"--clip-weights {arguments.clip_weights}: {arguments.source} has no captions for its samples, not being "
            "conditioned on them; leave --clip-weights and --clip-model out"
        )
    return open_scorer(arguments, device)


def _measure(
    stream: SplitStream,
    meter: SampleMeter,
    model: LoadedDiffusion,
    options: SampleOptions,
    sampling: SamplingConfig,
    seed: int,
) -> tuple[dict[str, Tensor], list[str], float]:
    """The first images' panels and captions, and images sampled per second; all images go through the meter.

    The first batch, in which libraries choose their algorithms, is not timed if there are others.
    """
    kinds, names = tuple(model.network.conditioner.conditions), model.labels
    parts: list[dict[str, Tensor]] = []
    texts: list[str] = []
    timed: list[tuple[int, float]] = []
    with tqdm(
        total=stream.wanted * sampling.num_steps,
        desc="sample",
        unit="step",
        mininterval=1.0,
        file=sys.stderr,
        disable=not shows_progress(),
    ) as bar:
        for batch in stream:
            y = conditions_of(model.network.conditioner, batch, seed)
            seeds = [seed + number for number in batch.image_numbers.tolist()]
            begin = time.perf_counter()
            samples = sample_images(model, y, seeds, batch=len(seeds), bar=bar, **options)
            timed.append((len(seeds), time.perf_counter() - begin))  # the samples are on the CPU, so all is done
            meter.add(samples, batch.images, y, batch.image_numbers.tolist(), batch.maps)
            if len(texts) < NUM_SHOWN:
                drawn = panels(y, kinds, names.get("object_classes", ()), grid_side(model.resolution))
                parts.append(drawn | {"sample": samples, "real image": batch.images})
                texts += captions(y, kinds, names.get("classes", ()), len(seeds))
    images, seconds = (sum(column) for column in zip(*(timed[1:] or timed or [(0, 1.0)]), strict=True))
    return (first_rows(parts, NUM_SHOWN) if parts else {}), texts[:NUM_SHOWN], images / seconds


def _check_names(model: LoadedDiffusion, dataset: Dataset, kinds: tuple[str, ...]) -> None:
    """Nothing, if the numbers of the data's classes and labels mean what they meant in training.

    Raises: ConfigError with the first name that differs.
    """
    for kind, key in _NAMES.items():
        if kind not in kinds:
            continue
        found, known = dataset.labels.get(key, []), model.labels.get(key, [])
        if not found:
            raise ConfigError(
                f"--data {dataset.manifest_path} lists no {key}, and the model is conditioned on {kind}; give data "
                "that have them"
            )
        if found != known:
            number = next(
                (n for n, pair in enumerate(zip(known, found, strict=False)) if pair[0] != pair[1]),
                min(len(known), len(found)),
            )
            theirs, ours = (repr(names[number]) if number < len(names) else "nothing" for names in (found, known))
            raise ConfigError(
                f"--data {dataset.manifest_path}: its {key} are not those that the model was trained with: number "
                f"{number} is {theirs} where the model knows {ours}; give data of the same names in the same order"
            )


def _judge(model: LoadedDiffusion, dataset: Dataset, kinds: tuple[str, ...], space: FrechetSpace) -> Judge:
    autoencoder = model.autoencoder
    return Judge(
        kinds,
        space.features,
        space.name,
        space.num_components,
        space.network,
        space.description,
        classifier=space.classifier,
        reconstruct=lambda x: autoencoder.decode(model.encode_pixels(x)).cpu(),
        object_classes=dataset.object_classes,
        map_labels=dataset.map_labels,
    )


def _reference(
    arguments: argparse.Namespace, resolution: int, space: FrechetSpace, device: torch.device
) -> FeatureSet | None:
    """Features of --reference, or None if the samples are set beside the images whose y they are given."""
    if arguments.reference is None:
        for name in ("reference_split", "num_reference"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} without --reference, whose it is; give both or none")
        return None
    return reference_features(
        arguments.reference, arguments.reference_split, arguments.num_reference, resolution, arguments, space, device
    )


def _describe_model(
    arguments: argparse.Namespace, artifact: DiffusionArtifact, kinds: tuple[str, ...], sampling: SamplingConfig
) -> dict[str, Any]:
    """What was measured. How it samples belongs to it: results of one model with several samplers are compared."""
    provenance = artifact.provenance
    guided = f" w={sampling.guidance_scale:g}" if sampling.guidance_scale != 1.0 else ""
    return {
        "label": f"{'+'.join(kinds) or 'unconditional'} {sampling.sampler}-{sampling.num_steps}{guided}",
        "path": str(arguments.source),
        "content_sha256": artifact.content_hash,
        "autoencoder_sha256": artifact.autoencoder.content_hash,
        "weights": provenance.get("weights"),
        "images": provenance.get("images"),
        "resolution": provenance["resolution"],
        "conditioning": list(kinds),
        "sampling": {
            "sampler": sampling.sampler,
            "num_steps": sampling.num_steps,
            "eta": sampling.eta,
            "guidance_scale": sampling.guidance_scale,
            "guidance_rescale": sampling.guidance_rescale,
            "guidance_interval": None if sampling.guidance_interval is None else list(sampling.guidance_interval),
        },
        "parameters": num_elements(artifact.state),
    }


def _protocol(
    dataset: Dataset,
    stream: SplitStream,
    space: FrechetSpace,
    conditioning: ConditioningConfig,
    resolution: int,
    seed: int,
) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for kind in (field.name for field in dataclasses.fields(conditioning)):
        if getattr(conditioning, kind) is not None:
            given[kind] = {"judged": PROTOCOLS[kind]}
    if conditioning.low_resolution is not None:
        section = conditioning.low_resolution
        given["low_resolution"] |= {"factor": section.factor, "degradation": section.degradation, "ssim": SSIM}
    if conditioning.inpainting is not None:
        given["inpainting"] |= {"masks": conditioning.inpainting.masks}
    return {
        "program_version": __version__,
        "data": {
            "digest": dataset.digest,
            "split": dataset.split,
            "num_images": stream.num_images,
            "pixels_digest": stream.pixels_digest,
        },
        "resolution": resolution,
        "crop": CROP,
        "resize": RESIZE,
        "seed": seed,
        "given": given,
        "frechet": space.protocol(stream.num_images),
    }


def _write_picture(
    arguments: argparse.Namespace, pictures: dict[str, Tensor], texts: list[str], resolution: int
) -> None:
    side = grid_side(resolution)
    columns = max(1, _MAX_WIDTH_PX // (len(pictures) * (side + 4) + 12))
    captioned_grid(pictures, texts, columns, arguments.out / PICTURE_FILE, side_px=side)
