"""Quality against cost: results of `ldm-scale evaluate diffusion` beside the FLOPs that the model took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.pixel_latent.models import count
from ldm_scale.config.schema import Config, DataConfig, TrainConfig
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.evaluation.results import SAMPLES_FORMAT, Result, read_result, reading, require_one_protocol
from ldm_scale.interchange.artifact import DiffusionArtifact
from ldm_scale.interchange.load import read_source


def points(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each result: its distance, and the FLOPs of its training and of one of its samples.

    Raises: ConfigError if the results were measured in different ways; DataError for what is no such result;
    CheckpointError if the model that one names is not there.
    """
    results = [read_result(path, (SAMPLES_FORMAT,)) for path in paths]
    require_one_protocol(results)
    found = []
    for result in results:
        with reading(result):
            source, images = Path(result.model["path"]), result.model["images"]
            sampling = result.model["sampling"]
            guided = 1 if sampling["guidance_scale"] == 1.0 else 2
            name, distance = _distance(result)
        if images is None:
            raise ConfigError(
                f"{result.source}: says not how many images its model was trained on; evaluate a run of ours"
            )
        artifact = _model(source, result)
        counted = count(config_of(artifact))
        assert counted.size.unet is not None, "a diffusion model has a UNet"
        steps = sampling["num_steps"] * guided * (2 if sampling["sampler"] == "heun" else 1)
        found.append(
            {
                "result": result.source,
                "label": result.label,
                "f": artifact.autoencoder.config.downsampling_factor,
                "parameters": counted.parameters,
                "images": images,
                "training_flops": images * counted.train_cached,
                "sample_flops": counted.sample(steps),
                "distance_name": name,
                "distance": distance,
            }
        )
    return found


def config_of(artifact: DiffusionArtifact) -> Config:
    """As much of a configuration as its networks' FLOPs need."""
    return Config(
        stage="diffusion",
        autoencoder=artifact.autoencoder.config,
        unet=artifact.unet,
        conditioning=artifact.conditioning,
        diffusion=artifact.diffusion,
        data=replace(DataConfig(), resolution=artifact.provenance["resolution"]),
        train=TrainConfig(),
    )


def _distance(result: Result) -> tuple[str, float]:
    """Name and value: to the reference set where there is one, to the conditioned images elsewhere."""
    found = result.figures.get("samples", {}).get("frechet", {})
    if found.get("value") is not None:
        return str(found["name"]), float(found["value"])
    frechet = result.figures["frechet"]
    return str(frechet["name"]), float(frechet["distance"])


def _model(source: Path, result: Result) -> DiffusionArtifact:
    if not source.exists():
        raise CheckpointError(
            f"{result.source}: its model {source} is not there, and its architecture gives the cost; start this from "
            "the folder in which it was evaluated"
        )
    artifact = read_source(source)
    if not isinstance(artifact, DiffusionArtifact):
        raise CheckpointError(f"{result.source}: {source} holds an autoencoder, and a diffusion model was evaluated")
    return artifact
