"""Our models as folders that diffusers and transformers open, and back.

    autoencoder    config.json, diffusion_pytorch_model.safetensors: an `AutoencoderKL` or a `VQModel`
    diffusion      one folder per part and, where diffusers has a pipeline that computes the same, model_index.json

diffusers_layout.py says which pipeline that is. Every folder also holds ldm_scale.json (our own description), from
which `read_diffusers` makes an artifact again; folders without it are diffusers_import.py's.
Configurations are translated in diffusers_autoencoder.py, diffusers_unet.py, diffusers_scheduler.py and
text_encoder.py, tensor names in name_maps.py. A model that the other side cannot hold is refused with the part that
does not fit: a nearly equal model is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from operator import add
from pathlib import Path
from typing import Any

import torch
from diffusers import __version__ as diffusers_version
from torch import Tensor

from ldm_scale.conditioning.build import build_conditioner
from ldm_scale.config.schema import TextConditioningConfig
from ldm_scale.engine.lazy_tensors import LazyTensors, renamed
from ldm_scale.interchange.artifact import (
    DESCRIPTION,
    VOCABULARY,
    Artifact,
    DiffusionArtifact,
    check_autoencoder_content,
    check_diffusion_content,
    expected_diffusion_tensors,
    read_description,
)
from ldm_scale.interchange.diffusers_autoencoder import (
    WEIGHTS,
    autoencoder_class,
    fill_autoencoder,
    fill_model,
    read_autoencoder,
)
from ldm_scale.interchange.diffusers_layout import (
    CONDITIONER,
    CONDITIONER_PREFIX,
    UNET_PREFIX,
    Layout,
    layout_of,
)
from ldm_scale.interchange.diffusers_scheduler import make_scheduler
from ldm_scale.interchange.diffusers_unet import empty_unet, our_input_order, their_input_order, unet_class
from ldm_scale.interchange.frozen_tower import tower_as_text
from ldm_scale.interchange.name_maps import restore, text_encoder_names, unet_names
from ldm_scale.interchange.safetensors_io import read_tensors, tensors_sha256, write_json, write_tensors
from ldm_scale.interchange.text_encoder import (
    TEXT_WEIGHTS,
    fill_text_encoder,
    fill_tokenizer,
    published,
    text_library,
    text_model_class,
    tokenizer_class,
)

CONDITIONER_WEIGHTS = "model.safetensors"


def fill_diffusers_folder(folder: Path, artifact: Artifact | DiffusionArtifact) -> None:
    """Nothing; the empty `folder` is a model (an autoencoder), a pipeline or the parts of a model of diffusers.

    Raises: CheckpointError if diffusers has no model that computes the same; it names the part.
    """
    if isinstance(artifact, Artifact):
        fill_autoencoder(folder, artifact)
        write_json(folder / DESCRIPTION, {"autoencoder": artifact.content})
        return
    layout = layout_of(artifact)
    text, text_state = text_part(artifact, layout)
    scheduler = make_scheduler(artifact.diffusion, layout.pipeline.name if layout.pipeline else None)
    tokenizer = "tokenizer" if text is not None else None
    for part in (layout.autoencoder, "unet", layout.text_encoder, tokenizer, "scheduler"):
        if part is not None:
            (folder / part).mkdir()
    if layout.autoencoder is not None:
        fill_autoencoder(folder / layout.autoencoder, artifact.autoencoder)
    _fill_unet(folder / "unet", artifact, layout)
    if text is not None and layout.text_encoder is not None:
        fill_text_encoder(folder / layout.text_encoder, text, text_state)
        fill_tokenizer(folder / "tokenizer", text)
    others = other_state(artifact.state)
    if others:
        (folder / CONDITIONER).mkdir()
        write_tensors(folder / CONDITIONER / CONDITIONER_WEIGHTS, others)
    scheduler.save_config(folder / "scheduler")
    if layout.pipeline is not None:
        write_json(folder / "model_index.json", _model_index(artifact, layout, text, type(scheduler).__name__))
    write_json(folder / DESCRIPTION, {"diffusion": artifact.content, "autoencoder": artifact.autoencoder.content})


def read_diffusers(folder: Path) -> Artifact | DiffusionArtifact:
    """The artifact that a diffusers folder of ours was written from.

    Weights that other software has changed since are taken as they are; the content hash follows them.
    Raises: CheckpointError if the folder is incomplete or does not fit its description.
    """
    first, described = read_description(folder)
    if described is None:
        autoencoder = read_autoencoder(folder, first.content)
        check_autoencoder_content(autoencoder, folder)
        return autoencoder
    text, layout = described.conditioning.text, layout_of(described)
    if text is not None and text.tokenizer == "wordpiece":
        described = replace(described, vocabulary=folder / "tokenizer" / VOCABULARY)
    if layout.autoencoder is not None:
        first = read_autoencoder(folder / layout.autoencoder, first.content)
        check_autoencoder_content(first, folder)
        described = replace(described, autoencoder=first)
    target = expected_diffusion_tensors(described.unet, described.conditioning, first.config.latent_channels)
    state = _read_unet(folder / "unet" / WEIGHTS, described, layout, _without_prefix(target, UNET_PREFIX))
    if text is not None and layout.text_encoder is not None:
        path = folder / layout.text_encoder / TEXT_WEIGHTS
        theirs = published(read_tensors(path), text_model_class(text))
        part = restore(theirs, text_encoder_names(text), _without_prefix(target, CONDITIONER_PREFIX), str(path))
        state |= renamed(part, partial(add, CONDITIONER_PREFIX))
    if other_state(target):
        state |= read_tensors(folder / CONDITIONER / CONDITIONER_WEIGHTS)
    content = described.content | {"weights_sha256": tensors_sha256(state)}
    artifact = replace(described, content=content, state=state)
    check_diffusion_content(artifact, folder)
    return artifact


def unet_state(state: Mapping[str, Tensor]) -> LazyTensors:
    """The UNet's share of a diffusion model's tensors, under its own names."""
    return _without_prefix(state, UNET_PREFIX)


def conditioner_state(state: Mapping[str, Tensor]) -> LazyTensors:
    """The text encoder's share of a diffusion model's tensors, under its own names."""
    return _without_prefix(state, CONDITIONER_PREFIX)


def text_part(
    artifact: DiffusionArtifact, layout: Layout
) -> tuple[TextConditioningConfig | None, Mapping[str, Tensor]]:
    """The section and the tensors of the text encoder in an export: the trained one, or the frozen tower.

    Raises: ConfigError if the tower cannot be had.
    """
    frozen = artifact.conditioning.frozen_text
    if frozen is not None and layout.text_encoder is not None and artifact.conditioning.text is None:
        return tower_as_text(frozen)
    return artifact.conditioning.text, conditioner_state(artifact.state)


def other_state(state: Mapping[str, Tensor]) -> LazyTensors:
    """The tensors of a diffusion model that belong to no model of diffusers."""
    return renamed(state, lambda name: None if name.startswith((UNET_PREFIX, CONDITIONER_PREFIX)) else name)


def unet_inputs(artifact: DiffusionArtifact) -> tuple[int, int | None]:
    """Channels that the UNet takes beside the latents, and the context's width."""
    with torch.device("meta"):
        conditioner = build_conditioner(artifact.conditioning, artifact.autoencoder.config.latent_channels)
    return conditioner.spatial_channels, conditioner.context_dim


def exported_unet_state(
    state: Mapping[str, Tensor], artifact: DiffusionArtifact, layout: Layout
) -> Mapping[str, Tensor]:
    """A UNet's tensors with the input channels in the order in which the pipeline gives them."""
    channels = artifact.autoencoder.config.latent_channels
    return their_input_order(state, channels) if layout.swaps_mask else state


def _fill_unet(folder: Path, artifact: DiffusionArtifact, layout: Layout) -> None:
    first = artifact.autoencoder.config
    spatial_channels, context_dim = unet_inputs(artifact)
    side = artifact.provenance["resolution"] // first.downsampling_factor
    unet = empty_unet(artifact.unet, first.latent_channels, context_dim, side, spatial_channels)
    state = exported_unet_state(unet_state(artifact.state), artifact, layout)
    fill_model(folder, unet, state, unet_names(artifact.unet), "the UNet")


def _read_unet(path: Path, described: DiffusionArtifact, layout: Layout, target: Mapping[str, Tensor]) -> LazyTensors:
    state = restore(read_tensors(path), unet_names(described.unet), target, str(path))
    if layout.swaps_mask:
        state = our_input_order(state, described.autoencoder.config.latent_channels)
    return renamed(state, partial(add, UNET_PREFIX))


def _model_index(
    artifact: DiffusionArtifact, layout: Layout, text: TextConditioningConfig | None, scheduler: str
) -> dict[str, Any]:
    pipeline = layout.pipeline
    assert pipeline is not None, "a folder of parts has no index"
    index: dict[str, Any] = {"_class_name": pipeline.name, "_diffusers_version": diffusers_version}
    if pipeline.name.startswith("StableDiffusion"):
        index |= {part: [None, None] for part in ("feature_extractor", "image_encoder", "safety_checker")}
        index["requires_safety_checker"] = False
    index["scheduler"] = ["diffusers", scheduler]
    if text is not None and pipeline.text_encoder is not None:
        index[pipeline.text_encoder] = [text_library(text), text_model_class(text).__name__]
        index["tokenizer"] = ["transformers", tokenizer_class(text).__name__]
    index["unet"] = ["diffusers", unet_class(artifact.unet).__name__]
    if pipeline.autoencoder is not None:
        index[pipeline.autoencoder] = ["diffusers", autoencoder_class(artifact.autoencoder.config).__name__]
    return index


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> LazyTensors:
    return renamed(state, lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)
