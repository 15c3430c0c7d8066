"""Checkpoints of CompVis and Stability as artifacts: Stable Diffusion 1 and 2, the LDM zoo, KL and VQ autoencoders.

`read_compvis` takes a stranger's file with its YAML; compvis_write.py is the way there, compvis_folder.py reads what it
wrote by our own description. Every tensor of a file is either taken or named: schedules that follow from the YAML,
discriminators and averages that were not asked for are left out and said so, anything else is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_scale.config.schema import AutoencoderConfig, ConditioningConfig, DiffusionConfig, SamplingConfig
from ldm_scale.diffusion.schedule import alphas_cumprod
from ldm_scale.engine.lazy_tensors import LazyTensors, renamed
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.artifact import (
    Artifact,
    DiffusionArtifact,
    expected_autoencoder_tensors,
    expected_diffusion_tensors,
    make_artifact,
    make_diffusion_artifact,
)
from ldm_scale.interchange.compvis_conditioning import conditioner_places, conv_in_form
from ldm_scale.interchange.compvis_file import ENDINGS, read_checkpoint, read_yaml, yaml_beside
from ldm_scale.interchange.compvis_infer import inferred_model
from ldm_scale.interchange.compvis_names import (
    COND_STAGE,
    FIRST_STAGE,
    Places,
    autoencoder_places,
    to_ours,
    to_theirs,
    unet_places,
)
from ldm_scale.interchange.compvis_read import (
    AUTOENCODER_TARGETS,
    DIFFUSION_TARGETS,
    autoencoder_config,
    autoencoder_resolution,
    class_name,
    diffusion_config,
    unet_config,
)
from ldm_scale.interchange.compvis_read_conditioning import (
    Given,
    has_null_class,
    read_conditioning,
    vocabulary_of,
)
from ldm_scale.interchange.compvis_write import CHECKPOINT
from ldm_scale.interchange.foreign_section import Section
from ldm_scale.interchange.foreign_tower import GUIDANCE_SCALES
from ldm_scale.models.autoencoder import LatentStatistics

_EMA = "model_ema."
# Beginnings of tensors that are no part of the model, and what they are. Tried in this order, on what nothing took.
_LEFT_OUT = (
    (_EMA, "averages of the weights (model_ema)"),
    ("loss.", "discriminator and losses"),
    (f"{FIRST_STAGE}loss.", "discriminator and losses"),
    (f"{FIRST_STAGE}{_EMA}", "averages of the first stage"),
    *((name, "the schedule, which the YAML gives") for name in ("betas", "alphas_cumprod", "sqrt_", "log_one_minus_")),
    *((name, "the schedule, which the YAML gives") for name in ("posterior_", "lvlb_weights", "cond_ids")),
    ("logvar", "the learned loss weights"),
    ("scale_factor", "the scale of the latents, which is in the statistics"),
    (f"{COND_STAGE}transformer.text_model.embeddings.position_ids", "numbers from 0 on"),
    (f"{COND_STAGE}transformer.to_logits.", "a head that is not run"),
    (f"{COND_STAGE}model.text_projection", "a projection that is not run"),
    (f"{COND_STAGE}model.logit_scale", "a projection that is not run"),
    (f"{COND_STAGE}model.attn_mask", "the causal mask"),
)
_BETA_TOLERANCE = 1e-3  # relative: some files hold them in half precision


@dataclass(frozen=True)
class ImportOptions:
    """What a user says beside the checkpoint."""

    config: Path | None = None
    weights: str | None = None  # raw or ema; None: ema where the checkpoint has it
    prediction: str | None = None
    resolution: int | None = None
    num_classes: int | None = None
    scale_factor: float | None = None
    vocabulary: Path | None = None


@dataclass(frozen=True)
class Imported:
    """What was read."""

    artifact: Artifact | DiffusionArtifact
    left_out: dict[str, int] = field(default_factory=dict)  # what -> number of tensors


def read_compvis(path: Path, options: ImportOptions) -> Imported:
    """The model in a checkpoint of theirs, or in a folder that holds one.

    Raises: CheckpointError if it cannot be read, is not whole, or is a model that ours are not.
    """
    path = _checkpoint_in(path)
    state = read_checkpoint(path)
    yaml_path = options.config or yaml_beside(path)
    if yaml_path is None:
        model = inferred_model(state, str(path), options.prediction, options.resolution)
        section = Section(model, "model")
    else:
        section = Section(read_yaml(yaml_path), f"{yaml_path}: model")
    target = class_name(section.get("target"), section.name)
    if target in AUTOENCODER_TARGETS:
        return _read_autoencoder(path, state, section, options)
    if target not in DIFFUSION_TARGETS:
        raise CheckpointError(
            f"{section.name}.target={section.get('target')}: known are {', '.join(DIFFUSION_TARGETS)}, AutoencoderKL "
            "and VQModel; not imported"
        )
    return _read_diffusion(path, state, section, options)


def _read_autoencoder(path: Path, state: LazyTensors, section: Section, options: ImportOptions) -> Imported:
    _require_used(options, "an autoencoder", prediction=True, num_classes=True, vocabulary=True)
    config = autoencoder_config(section)
    prefix = FIRST_STAGE if f"{FIRST_STAGE}quant_conv.weight" in state else ""
    places, target = autoencoder_places(config, prefix), expected_autoencoder_tensors(config)
    chosen, weights = _chosen(state, places, target, options.weights, path, without="")
    taken, left_out = _sorted_out(chosen, places, target)
    artifact = make_artifact(
        to_ours(taken, places, target, str(path)),
        config,
        LatentStatistics(scale=1.0 if options.scale_factor is None else options.scale_factor),
        _provenance(path, weights, options.resolution or autoencoder_resolution(section), config, left_out),
    )
    return Imported(artifact, left_out)


def _read_diffusion(path: Path, state: LazyTensors, section: Section, options: ImportOptions) -> Imported:
    params = section.section("params")
    stage = params.section("first_stage_config")
    first_config = autoencoder_config(stage)
    unet, unet_section = unet_config(params.section("unet_config")), params.section("unet_config").section("params")
    diffusion = diffusion_config(params, options.prediction)
    _check_betas(state, diffusion, path)
    given = Given(state, path.parent, options.num_classes, options.vocabulary)
    conditioning = read_conditioning(section, first_config, given)
    counted = conditioning.classes is None and conditioning.layout is None
    reads_words = vocabulary_of(conditioning, given) is not None
    _require_used(options, "this model", num_classes=counted, vocabulary=not reads_words)
    channels = first_config.latent_channels
    resolution = options.resolution or params.integer("image_size", 0, at_least=0) * first_config.downsampling_factor

    first_places = autoencoder_places(first_config, FIRST_STAGE)
    places = unet_places(
        unet,
        conv_in=conv_in_form(conditioning, channels),
        heads_first=not unet_section.boolean("use_new_attention_order", False),
    ) | conditioner_places(conditioning, has_null_class(state, conditioning))
    target = expected_diffusion_tensors(unet, conditioning, channels)
    first_target = expected_autoencoder_tensors(first_config)
    chosen, weights = _chosen(state, places, target, options.weights, path, without="model.")
    taken, left_out = _sorted_out(chosen, places | first_places, target | first_target)
    unread = _unread_blocks(taken, conditioning)
    if unread:
        left_out["the block behind the text encoder's penultimate layer"] = len(unread)
    first_taken = renamed(taken, lambda name: name if name.startswith(FIRST_STAGE) else None)
    taken = renamed(taken, lambda name: None if name.startswith(FIRST_STAGE) or name in unread else name)
    first = make_artifact(
        to_ours(first_taken, first_places, first_target, f"the first stage in {path}"),
        first_config,
        LatentStatistics(scale=_scale(state, params, options, path)),
        _provenance(path, "raw", autoencoder_resolution(stage) or resolution, first_config, {}),
    )
    text = conditioning.text
    artifact = make_diffusion_artifact(
        to_ours(taken, places, target, str(path)),
        first,
        unet=unet,
        conditioning=conditioning,
        diffusion=diffusion,
        sampling=SamplingConfig() if text is None else SamplingConfig(guidance_scale=GUIDANCE_SCALES[text.encoder]),
        provenance=_provenance(path, weights, resolution, first_config, left_out),
    )
    return Imported(replace(artifact, vocabulary=vocabulary_of(conditioning, given)), left_out)


def _checkpoint_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(file for file in path.iterdir() if file.suffix in ENDINGS)
    named = [file for file in found if file.name == CHECKPOINT] or found
    if len(named) != 1:
        raise CheckpointError(
            f"{path} holds {len(found)} checkpoints ({', '.join(file.name for file in found[:4])}): give the file "
            "itself"
        )
    return named[0]


def _require_used(options: ImportOptions, what: str, **unused: bool) -> None:
    """Nothing, if none of the options that are marked was given: they would do nothing.

    Raises: ConfigError that names it.
    """
    for name, is_unused in unused.items():
        if is_unused and getattr(options, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: {what} has no use for it; leave it out"
            )


def _provenance(
    path: Path, weights: str, resolution: int, first: AutoencoderConfig, left_out: Mapping[str, int]
) -> dict[str, Any]:
    if not resolution:
        raise CheckpointError(
            f"{path}: neither the YAML nor a tensor says for which resolution the model was trained; give --resolution"
        )
    if resolution % first.downsampling_factor:
        raise CheckpointError(
            f"{path}: a resolution of {resolution} does not divide by the autoencoder's f={first.downsampling_factor}; "
            "give --resolution"
        )
    imported = {"from": path.name, "layout": "compvis", "left_out": dict(left_out)}
    return {"resolution": resolution, "weights": weights, "imported": imported}


def _scale(state: Mapping[str, Tensor], params: Section, options: ImportOptions, path: Path) -> float:
    """What raw latents are multiplied by: the user's, the measured one in the checkpoint, or the YAML's."""
    if options.scale_factor is not None:
        return options.scale_factor
    if "scale_factor" in state:
        kept = state["scale_factor"]
        if kept.numel() != 1 or not 0 < float(kept) < math.inf:
            shown = f"{float(kept):g}" if kept.numel() == 1 else f"of shape {tuple(kept.shape)}"
            raise CheckpointError(
                f"{path}: the tensor scale_factor is {shown}: must be one finite number above 0; give the scale with "
                "--scale-factor"
            )
        return float(kept)
    if params.boolean("scale_by_std", False):
        raise CheckpointError(
            f"{path} lacks scale_factor, which scale_by_std=true has measured in training; give it with --scale-factor"
        )
    return params.number("scale_factor", 1.0, above=0)


def _check_betas(state: Mapping[str, Tensor], config: DiffusionConfig, path: Path) -> None:
    """Nothing, if the schedule that the checkpoint keeps is the one of its configuration."""
    kept = state.get("alphas_cumprod")
    expected = alphas_cumprod(config)
    if kept is None or (kept.shape == expected.shape and torch.allclose(kept.double(), expected, rtol=_BETA_TOLERANCE)):
        return
    ends = f"ends with {float(kept[-1]):.6g} after {len(kept)} steps" if kept.ndim == 1 and len(kept) else "is no row"
    raise CheckpointError(
        f"{path} was trained with another noise schedule than its configuration says (alphas_cumprod {ends}, the "
        f"configuration's ends with {float(expected[-1]):.6g} after {len(expected)}); give the YAML that belongs to it"
    )


def _chosen(
    state: LazyTensors,
    places: Places,
    target: Mapping[str, Tensor],
    weights: str | None,
    path: Path,
    *,
    without: str,
) -> tuple[LazyTensors, str]:
    """The tensors with the averages in the place of what they average, if these are chosen; and which were.

    Averages are kept under the names of what they average without the beginning `without`, and without dots.
    """
    averages = {
        f"{_EMA}{name.removeprefix(without).replace('.', '')}": name
        for name in to_theirs(target, places)
        if name.startswith(without)
    }
    has_any = any(average in state for average in averages)
    if weights == "raw" or (weights is None and not has_any):
        return state, "raw"
    missing = [average for average in averages if average not in state]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(averages)} averages ({', '.join(missing[:4])}): give --weights raw"
        )
    return state | renamed(state, averages.get), "ema"


def _sorted_out(state: LazyTensors, places: Places, target: Mapping[str, Tensor]) -> tuple[LazyTensors, dict[str, int]]:
    """Tensors that the model has, and those that nobody knows; and how many were left out, by what they are."""
    wanted = {name for ours in target for name in places[ours].names}
    reasons = {name: _reason(name) for name in state if name not in wanted}
    left_out: dict[str, int] = {}
    for reason in reasons.values():
        if reason is not None:
            left_out[reason] = left_out.get(reason, 0) + 1
    return renamed(state, lambda name: name if reasons.get(name) is None else None), left_out


def _reason(name: str) -> str | None:
    """What a tensor is that is no part of the model; None of one that nobody knows."""
    return next((why for beginning, why in _LEFT_OUT if name.startswith(beginning)), None)


def _unread_blocks(taken: LazyTensors, conditioning: ConditioningConfig) -> set[str]:
    """Tensors of the block behind the penultimate layer, where that layer is read."""
    text = conditioning.text
    if text is None or text.padding != "zero":
        return set()
    beyond = f"{COND_STAGE}model.transformer.resblocks.{text.depth}."
    return {name for name in taken if name.startswith(beyond)}
