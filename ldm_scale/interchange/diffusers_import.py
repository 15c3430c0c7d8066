"""Folders of diffusers that other software wrote, as artifacts.

    _class_name in config.json          AutoencoderKL, VQModel: an autoencoder
    _class_name in model_index.json     a pipeline of `PIPELINES`: a diffusion model

Nothing is guessed: what our networks cannot hold is refused with the file, the key and its value. Parts that are no
part of the model (safety checker, feature extractor) are left out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

from ldm_scale.config.schema import (
    AutoencoderConfig,
    ConditioningConfig,
    InpaintingConditioningConfig,
    LowResolutionConditioningConfig,
    TextConditioningConfig,
)
from ldm_scale.engine.lazy_tensors import LazyTensors, renamed
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact, make_artifact, make_diffusion_artifact
from ldm_scale.interchange.diffusers_layout import CONDITIONER_PREFIX, PIPELINES, UNET_PREFIX, Pipeline
from ldm_scale.interchange.diffusers_scheduler import read_scheduler
from ldm_scale.interchange.diffusers_unet import our_input_order
from ldm_scale.interchange.foreign_autoencoder import AUTOENCODER_CLASSES, read_foreign_autoencoder
from ldm_scale.interchange.foreign_config import CONFIG, Plain, read_class_config
from ldm_scale.interchange.foreign_text import read_foreign_text
from ldm_scale.interchange.foreign_tower import GUIDANCE_SCALES
from ldm_scale.interchange.foreign_unet import ForeignUNet, read_foreign_unet
from ldm_scale.models.autoencoder import LatentStatistics

MODEL_INDEX = "model_index.json"
PIXELS = AutoencoderConfig(kind="identity", base_channels=1, channel_multipliers=(1,), latent_channels=3, norm_groups=1)


def read_foreign_diffusers(folder: Path) -> Artifact | DiffusionArtifact:
    """The artifact of a model or pipeline that diffusers, or a program with its layout, has written to `folder`.

    Raises: CheckpointError if it is none that the networks here can hold, with the part, key and value; if it is
    incomplete; or if weights and configuration do not fit, with the names of the tensors.
    """
    if (folder / MODEL_INDEX).is_file():
        return _read_pipeline(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds neither {MODEL_INDEX} nor {CONFIG}: give the folder of a pipeline or of an autoencoder of "
            "diffusers"
        )
    found = read_class_config(folder / CONFIG)
    if found["_class_name"] not in AUTOENCODER_CLASSES:
        raise CheckpointError(
            f"{folder / CONFIG}: _class_name={found['_class_name']!r}: alone, only {' and '.join(AUTOENCODER_CLASSES)} "
            "can be imported; give the folder of the whole pipeline, whose other parts say what it computes with"
        )
    return _autoencoder(folder, found, None)


def _read_pipeline(folder: Path) -> DiffusionArtifact:
    index = read_class_config(folder / MODEL_INDEX)
    pipeline = PIPELINES.get(index["_class_name"])
    if pipeline is None:
        raise CheckpointError(
            f"{folder / MODEL_INDEX}: _class_name={index['_class_name']!r}: pipelines that can be imported are "
            f"{', '.join(PIPELINES)}"
        )
    unet = read_foreign_unet(_part(folder, index, "unet")[0])
    diffusion, sampling = read_scheduler(_part(folder, index, "scheduler")[0])
    first = _first_stage(folder, index, pipeline, unet)
    text: TextConditioningConfig | None = None
    encoder_state = LazyTensors({})
    if pipeline.text_encoder is not None:
        encoder, encoder_class = _part(folder, index, pipeline.text_encoder)
        tokenizer, tokenizer_class = _part(folder, index, "tokenizer")
        text, encoder_state = read_foreign_text(encoder, encoder_class, tokenizer, tokenizer_class)
    _require_context(folder, unet, text)
    conditioning = _conditioning(folder, pipeline, unet, first.config, text)
    if conditioning.inpainting is not None:
        unet = unet._replace(state=our_input_order(unet.state, unet.latent_channels))
    state = renamed(unet.state, partial(add, UNET_PREFIX)) | renamed(encoder_state, partial(add, CONDITIONER_PREFIX))
    vocabulary = Path(text.vocabulary) if text is not None and text.vocabulary is not None else None
    if text is not None and vocabulary is not None:
        # Where the file lies is the artifact's to know: a path of this machine would go into its hash.
        conditioning = replace(conditioning, text=replace(text, vocabulary=vocabulary.name))
    side = unet.latent_side
    artifact = make_diffusion_artifact(
        state,
        first,
        unet=unet.config,
        conditioning=conditioning,
        diffusion=diffusion,
        sampling=replace(sampling, guidance_scale=1.0 if text is None else GUIDANCE_SCALES[text.encoder]),
        provenance=_provenance(
            index, first.provenance["resolution"] if side is None else side * first.config.downsampling_factor
        ),
    )
    return replace(artifact, vocabulary=vocabulary)


def _first_stage(folder: Path, index: Plain, pipeline: Pipeline, unet: ForeignUNet) -> Artifact:
    """The autoencoder of a pipeline, with the latents that the pipeline makes of it."""
    if pipeline.autoencoder is None:
        if unet.latent_channels != PIXELS.latent_channels:
            raise CheckpointError(
                f"{folder / 'unet' / CONFIG}: out_channels={unet.latent_channels}: pixels here have 3 channels; this "
                "model cannot be imported"
            )
        return make_artifact({}, PIXELS, LatentStatistics(), _provenance(index, _side(folder, unet.latent_side)))
    part, _ = _part(folder, index, pipeline.autoencoder)
    artifact = _autoencoder(part, read_class_config(part / CONFIG), pipeline, unet.latent_side)
    if artifact.config.latent_channels != unet.latent_channels:
        raise CheckpointError(
            f"{folder}: unet/{CONFIG} has out_channels={unet.latent_channels}, {pipeline.autoencoder}/{CONFIG} "
            f"latent_channels={artifact.config.latent_channels}: they are of different models; download it again"
        )
    return artifact


def _autoencoder(folder: Path, found: Plain, pipeline: Pipeline | None, latent_side: int | None = None) -> Artifact:
    first = read_foreign_autoencoder(folder)
    statistics = first.statistics
    if pipeline is not None and not pipeline.scales:
        statistics = LatentStatistics()
    elif pipeline is not None and statistics.shift != 0.0:
        raise CheckpointError(
            f"{folder / CONFIG}: shift_factor={statistics.shift}: {pipeline.name} does not shift latents; its UNet and "
            "autoencoder cannot belong together"
        )
    resolution = first.resolution
    if resolution is None and latent_side is not None:
        resolution = latent_side * first.config.downsampling_factor
    return make_artifact(
        first.state,
        first.config,
        statistics,
        _provenance(found, _side(folder, resolution, first.config.downsampling_factor)),
    )


def _conditioning(
    folder: Path,
    pipeline: Pipeline,
    unet: ForeignUNet,
    first: AutoencoderConfig,
    text: TextConditioningConfig | None,
) -> ConditioningConfig:
    """What the channels beside the latents are in that pipeline."""
    channels = {"inpainting": unet.latent_channels + 1, "low_resolution": 3, None: 0}
    expected = channels[pipeline.spatial]
    if unet.spatial_channels != expected:
        raise CheckpointError(
            f"{folder / 'unet' / CONFIG}: in_channels={unet.latent_channels + unet.spatial_channels} with out_channels="
            f"{unet.latent_channels}: {pipeline.name} gives its UNet {unet.latent_channels + expected}; what the "
            "others are is not known here (depth, an image to edit?)"
        )
    config = ConditioningConfig(text=text)
    if pipeline.spatial == "inpainting":
        return replace(config, inpainting=InpaintingConditioningConfig())
    if pipeline.spatial == "low_resolution":
        return replace(config, low_resolution=LowResolutionConditioningConfig(factor=first.downsampling_factor))
    return config


def _require_context(folder: Path, unet: ForeignUNet, text: TextConditioningConfig | None) -> None:
    if unet.context_dim != (None if text is None else text.width):
        raise CheckpointError(
            f"{folder / 'unet' / CONFIG}: cross_attention_dim={unet.context_dim}: the pipeline's text encoder gives "
            f"{'nothing' if text is None else text.width}; they are of different models"
        )


class _Part(NamedTuple):
    folder: Path
    class_name: str


def _part(folder: Path, index: Plain, name: str) -> _Part:
    """A part of a pipeline, and the name of its class."""
    found: Any = index.get(name)
    if not isinstance(found, list) or len(found) != 2 or not isinstance(found[1], str):
        raise CheckpointError(
            f"{folder / MODEL_INDEX}: {name}={found!r}: the pipeline has no such part; give a whole one"
        )
    if not (folder / name).is_dir():
        raise CheckpointError(f"{folder / name} is missing: the folder is incomplete; download it again")
    return _Part(folder / name, found[1])


def _side(folder: Path, side: int | None, f: int = 1) -> int:
    """Pixels a side in training, of `side` pixels or latents of factor f."""
    if side is None:
        raise CheckpointError(
            f"{folder / CONFIG}: sample_size=None: it says at which resolution the model was trained; write it there, "
            "in pixels of an autoencoder or latents of a UNet"
        )
    if side % f:
        raise CheckpointError(
            f"{folder / CONFIG}: sample_size={side} does not divide by the autoencoder's f={f}; write the resolution "
            "of training there"
        )
    return side


def _provenance(config: Plain, resolution: int) -> dict[str, Any]:
    return {
        "weights": "imported",
        "imported": {
            "from": config["_class_name"],
            "layout": f"diffusers {config.get('_diffusers_version', '')}".rstrip(),
        },
        "resolution": resolution,
    }
