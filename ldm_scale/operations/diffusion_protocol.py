"""What an evaluation of samples says of its model and of its protocol, and that data and model mean the same names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_scale import __version__
from ldm_scale.config.schema import SamplingConfig
from ldm_scale.data.shards import Dataset
from ldm_scale.engine.lazy_tensors import num_elements
from ldm_scale.errors import ConfigError
from ldm_scale.evaluation.images import CROP, RESIZE
from ldm_scale.evaluation.samples import PROTOCOLS
from ldm_scale.evaluation.similarity import PROTOCOL as SSIM
from ldm_scale.evaluation.split import SplitStream
from ldm_scale.interchange.artifact import DiffusionArtifact
from ldm_scale.interchange.load import LoadedDiffusion
from ldm_scale.operations.evaluation_setup import FrechetSpace

# Section of the configuration -> the manifest's list of names that its numbers stand for.
_NAMES = {"classes": "classes", "layout": "object_classes", "semantic_map": "map_labels"}


def check_names(labels: Mapping[str, list[str]], dataset: Dataset, kinds: Sequence[str]) -> None:
    """Nothing, if the numbers of the data's classes and labels mean what they meant in training, which `labels` are.

    Raises: ConfigError with the first name that differs.
    """
    for kind, key in _NAMES.items():
        if kind not in kinds:
            continue
        found, known = dataset.labels.get(key, []), labels.get(key, [])
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


def check_captions(clip_weights: object, kinds: Sequence[str], source: object) -> None:
    """Nothing, if there are captions for a CLIP score, where one is asked for.

    Raises: ConfigError.
    """
    if clip_weights is not None and not {"text", "frozen_text"} & set(kinds):
        raise ConfigError(
            f"--clip-weights {clip_weights}: {source} has no captions for its samples, not being conditioned on them; "
            "leave --clip-weights and --clip-model out"
        )


def describe_model(
    source: Path, artifact: DiffusionArtifact, kinds: tuple[str, ...], sampling: SamplingConfig
) -> dict[str, Any]:
    """What was measured. How it samples belongs to it: results of one model with several samplers are compared."""
    provenance = artifact.provenance
    guided = f" w={sampling.guidance_scale:g}" if sampling.guidance_scale != 1.0 else ""
    return {
        "label": f"{'+'.join(kinds) or 'unconditional'} {sampling.sampler}-{sampling.num_steps}{guided}",
        "path": str(source),
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


def diffusion_protocol(
    dataset: Dataset, stream: SplitStream, space: FrechetSpace, model: LoadedDiffusion, seed: int
) -> dict[str, Any]:
    """All that must be equal for figures of two models to be compared, but for the reference."""
    conditioning = model.conditioning
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
        "resolution": model.resolution,
        "crop": CROP,
        "resize": RESIZE,
        "seed": seed,
        "given": given,
        "frechet": space.protocol(stream.num_images),
    }
