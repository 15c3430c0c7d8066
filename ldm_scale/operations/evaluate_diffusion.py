"""Evaluation of a conditioned model from the command line: samples for the y of real images become figures.

Masks and small images depend on --seed and the image's place in the order of the split, samples on --seed plus it:
every model is given the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm_scale.conditioning.batches import conditions_of
from ldm_scale.config.schema import SamplingConfig
from ldm_scale.data import Batch
from ldm_scale.data.annotations import MAP, TEXT
from ldm_scale.data.shards import Dataset
from ldm_scale.engine import collectives
from ldm_scale.engine.agreement import agreed
from ldm_scale.errors import CheckpointError, ConfigError, DataError
from ldm_scale.evaluation.blocks import Block, Part
from ldm_scale.evaluation.clip_score import ClipScorer
from ldm_scale.evaluation.feature_sets import FeatureSet
from ldm_scale.evaluation.generation import draw_captioned_grid, png_bytes
from ldm_scale.evaluation.images import open_split
from ldm_scale.evaluation.parts import PartFolder, measure_blocks
from ldm_scale.evaluation.results import SAMPLES_FORMAT, VERSION, write_result
from ldm_scale.evaluation.samples import Judge, RealFeatures, SampleMeter
from ldm_scale.evaluation.shown import captions, first_rows, grid_side, panels
from ldm_scale.evaluation.split import SplitStream
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact
from ldm_scale.interchange.load import LoadedDiffusion, Weights, read_source
from ldm_scale.interchange.sampling import SampleOptions, chosen_sampling
from ldm_scale.operations.diffusion_protocol import check_captions, check_names, describe_model, diffusion_protocol
from ldm_scale.operations.evaluation_ranks import on_main
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
    kept_parts,
    measured_before,
    open_features,
    progress_bar,
)
from ldm_scale.operations.sample import check_sampling, sample_images, sampler_options
from ldm_scale.telemetry.log import get_logger

PICTURE_FILE = "samples.png"
NUM_SHOWN = 24
_MAX_WIDTH_PX = 1600


class _Request(NamedTuple):
    """What is measured with what, opened on this rank."""

    device: torch.device
    artifact: DiffusionArtifact
    model: LoadedDiffusion
    kinds: tuple[str, ...]
    dataset: Dataset
    options: SampleOptions
    sampling: SamplingConfig
    stream: SplitStream
    space: FrechetSpace
    scorer: ClipScorer | None


def evaluate_diffusion(
    arguments: argparse.Namespace,
    between: Callable[[], object] | None = None,
    known: RealFeatures | None = None,
    *,
    reuse: bool = False,
) -> dict[str, Any]:
    """The result document; with --out, also written there with a picture of samples. Nothing on other ranks.

    `between` is that of `measure_blocks`; `known` are features of the same images and autoencoder, where others follow.
    With `reuse`, a result of this very measurement in --out is taken.

    Raises: ConfigError, DataError or CheckpointError for what the command line names; NumericsError for samples that
    are not finite. Collective: all ranks.
    """
    request = agreed(lambda: _open(arguments))
    device, model, stream, space = request.device, request.model, request.stream, request.space
    reference = _reference(arguments, model.resolution, space, device)
    judge = replace(_judge(request), reference=reference, resamples=arguments.resamples, known=known or RealFeatures())
    protocol = diffusion_protocol(request.dataset, stream, space, model, arguments.seed)
    kept = kept_parts(
        arguments,
        {
            "model": [request.artifact.content_hash, request.artifact.autoencoder.content_hash],
            "sampling": dataclasses.asdict(request.sampling),
            "data": [request.dataset.digest, request.dataset.split, stream.wanted],
            "given": protocol,
            "clip": None if request.scorer is None else request.scorer.protocol,
        },
        space,
        device,
    )
    if reuse and collectives.broadcast_object((before := measured_before(arguments, kept)) is not None):
        return before or {}
    agreed(lambda: model.to(device))
    started = time.monotonic()
    parts = _measure(request, judge, arguments.seed, kept, between)
    seconds = time.monotonic() - started
    ranks = collectives.world_size()
    return on_main(lambda: _finish(arguments, request, judge, parts, seconds, ranks, kept))


def _open(arguments: argparse.Namespace) -> _Request:
    check_request(arguments, PICTURE_FILE)
    check_set_request(arguments)
    check_sampling(arguments)
    device = choose_device(arguments.device)
    artifact = read_diffusion(arguments.source, arguments.weights)
    model = LoadedDiffusion(artifact)
    kinds = tuple(model.network.conditioner.conditions)
    dataset = open_split(arguments.data, arguments.split)
    check_names(model.labels, dataset, kinds)
    options = sampler_options(arguments)
    sampling = chosen_sampling(model, options)
    annotations = model.conditioning.annotations - {TEXT}
    if "layout" in kinds and dataset.map_labels:
        annotations |= {MAP}  # they tell the colours that boxes are judged by
    stream = SplitStream(dataset, model.resolution, annotations, arguments.batch, arguments.num_images)
    space = open_features(arguments, model.resolution, device)
    space = space._replace(name=space.name.removeprefix("r"))  # rFID is of reconstructions
    scorer = _scorer(arguments, kinds, device)
    _check_reference(arguments)
    return _Request(device, artifact, model, kinds, dataset, options, sampling, stream, space, scorer)


def _finish(
    arguments: argparse.Namespace,
    request: _Request,
    judge: Judge,
    parts: list[Part],
    seconds: float,
    ranks: int,
    kept: PartFolder,
) -> dict[str, Any]:
    """The document, which is also written."""
    stream, model, log = request.stream, request.model, get_logger()
    name = request.dataset.manifest_path
    if not stream.num_images:
        raise DataError(f"{name}: none of {stream.wanted} images can be used: {stream.bad.describe()}")
    if stream.bad.counts:
        log.warning(f"{name}: {stream.bad.describe()}; the figures are over the rest")
    truncated = sum(part.values.get("truncated", 0) for part in parts)
    if truncated:
        log.warning(f"{truncated} captions or layouts are longer than the model reads")
    meter = SampleMeter(judge)
    for part in parts:
        meter.rows.take(part)
    figures = meter.figures()
    warn_of_small_sets(figures["samples"])
    reference = judge.reference
    described = None if reference is None else describe_reference(reference)
    protocol = diffusion_protocol(request.dataset, stream, request.space, model, arguments.seed)
    document = {
        "format": SAMPLES_FORMAT,
        "version": VERSION,
        "model": describe_model(arguments.source, request.artifact, request.kinds, request.sampling),
        "protocol": protocol | {"samples": set_protocol(request.space, meter.num_images, described, request.scorer)},
        "figures": figures,
        "truncated": truncated,
        "bad_images": describe_bad(stream.bad),
        "machine": describe_machine(request.device, stream, seconds, sampling_images_per_s=_rate(parts) * ranks),
    }
    document = complete(document, arguments, kept)
    if arguments.out is not None:
        path = write_result(arguments.out, document, {PICTURE_FILE: _picture(parts, model.resolution)})
        kept.remove()
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
    check_captions(arguments.clip_weights, kinds, arguments.source)
    return open_scorer(arguments, device)


def _measure(
    request: _Request, judge: Judge, seed: int, kept: PartFolder, between: Callable[[], object] | None
) -> list[Part]:
    """What was measured of each block's samples, on rank 0; also the first images' panels and captions."""
    model, stream, kinds = request.model, request.stream, request.kinds
    steps, names = request.sampling.num_steps, model.labels
    is_first = True

    def measure(block: Block[Batch]) -> Part:
        nonlocal is_first
        batch, truncated = block.images, model.num_truncated
        assert batch is not None
        y = conditions_of(model.network.conditioner, batch, seed)
        seeds = [seed + number for number in block.numbers]
        begin = time.perf_counter()
        samples = sample_images(model, y, seeds, batch=len(seeds), bar=bar, **request.options)
        timed = [len(seeds), time.perf_counter() - begin, is_first]  # the samples are on the CPU, so all is done
        is_first = False
        meter = SampleMeter(judge)
        meter.add(samples, batch.images, y, block.numbers, batch.maps)
        part = meter.rows.part
        values = part.values | {"timed": timed, "truncated": model.num_truncated - truncated}
        tensors = dict(part.tensors)
        if stream.places(block.number).start < NUM_SHOWN:
            drawn = panels(y, kinds, names.get("object_classes", ()), grid_side(model.resolution))
            drawn |= {"sample": samples, "real image": batch.images}
            tensors |= {f"shown.{name}": images[:NUM_SHOWN].cpu() for name, images in drawn.items()}
            values["shown"] = captions(y, kinds, names.get("classes", ()), len(seeds))[:NUM_SHOWN]
            values["panels"] = list(drawn)  # in their order, which files do not keep
        return Part(tensors, values)

    with progress_bar(stream, "sample", "step", steps) as bar:

        def others_have(images: int) -> None:
            bar.update(images * steps)

        return measure_blocks(stream, measure, kept, others_have=others_have, between=between)


def _rate(parts: Sequence[Part]) -> float:
    """Images that one rank samples per second.

    The first batch of a process, in which libraries choose their algorithms, does not count if there are others.
    """
    timed = [part.values["timed"] for part in parts if "timed" in part.values]
    chosen = [row for row in timed if not row[2]] or timed
    return float(sum(row[0] for row in chosen) / sum(row[1] for row in chosen))


def _judge(request: _Request) -> Judge:
    model, dataset, space, autoencoder = request.model, request.dataset, request.space, request.model.autoencoder
    return Judge(
        request.kinds,
        space.features,
        space.name,
        space.num_components,
        space.network,
        space.description,
        classifier=space.classifier,
        scorer=request.scorer,
        reconstruct=lambda x: autoencoder.decode(model.encode_pixels(x)).cpu(),
        object_classes=dataset.object_classes,
        map_labels=dataset.map_labels,
    )


def _check_reference(arguments: argparse.Namespace) -> None:
    for name in ("reference_split", "num_reference"):
        if arguments.reference is None and getattr(arguments, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} without --reference, whose it is; give both or none")


def _reference(
    arguments: argparse.Namespace, resolution: int, space: FrechetSpace, device: torch.device
) -> FeatureSet | None:
    """Features of --reference, or None if the samples are set beside the images whose y they are given."""
    if arguments.reference is None:
        return None
    return reference_features(
        arguments.reference, arguments.reference_split, arguments.num_reference, resolution, arguments, space, device
    )


def _picture(parts: Sequence[Part], resolution: int) -> bytes:
    """The first samples beside what they were given, as a PNG."""
    shown = [part for part in parts if "shown" in part.values]
    rows = [{name: part.tensors[f"shown.{name}"] for name in part.values["panels"]} for part in shown]
    pictures = first_rows(rows, NUM_SHOWN)
    texts = [text for part in shown for text in part.values["shown"]][:NUM_SHOWN]
    side = grid_side(resolution)
    columns = max(1, _MAX_WIDTH_PX // (len(pictures) * (side + 4) + 12))
    return png_bytes(draw_captioned_grid(pictures, texts, columns, side_px=side))
