"""Our models as folders that diffusers and transformers open, and back.

    autoencoder    config.json, diffusion_pytorch_model.safetensors: an `AutoencoderKL` or a `VQModel`
    diffusion      model_index.json and one folder per part: a `StableDiffusionPipeline`, or with the paper's text
                   encoder an `LDMTextToImagePipeline`

Every folder also holds ldm_scale.json (our own description), from which `read_diffusers` makes an artifact again.
Configurations are translated here, in diffusers_autoencoder.py, diffusers_unet.py and text_encoder.py, tensor names in
name_maps.py. A model that the other side cannot hold is refused with the part that does not fit: a nearly equal model
is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from operator import add
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, EDMEulerScheduler
from diffusers import __version__ as diffusers_version
from torch import Tensor

from ldm_scale.config.convert import section_from_dict
from ldm_scale.config.schema import ConditioningConfig, DiffusionConfig, TextConditioningConfig
from ldm_scale.engine.lazy_tensors import LazyTensors, renamed
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import (
    DESCRIPTION,
    VOCABULARY,
    Artifact,
    DiffusionArtifact,
    check_autoencoder_content,
    check_diffusion_content,
    expected_diffusion_tensors,
)
from ldm_scale.interchange.diffusers_autoencoder import (
    WEIGHTS,
    autoencoder_class,
    fill_autoencoder,
    fill_model,
    read_autoencoder,
)
from ldm_scale.interchange.diffusers_unet import empty_unet
from ldm_scale.interchange.name_maps import restore, text_encoder_names, unet_names
from ldm_scale.interchange.safetensors_io import (
    read_json,
    read_tensors,
    tensors_sha256,
    write_json,
)
from ldm_scale.interchange.text_encoder import (
    TEXT_WEIGHTS,
    fill_text_encoder,
    fill_tokenizer,
    pipeline_of,
    published,
    tokenizer_class,
)

# diffusers ships no types for its constructors.
_DDIMScheduler: Any = DDIMScheduler
_EDMEulerScheduler: Any = EDMEulerScheduler

UNET_PREFIX, CONDITIONER_PREFIX = "unet.", "conditioner.text."


def fill_diffusers_folder(folder: Path, artifact: Artifact | DiffusionArtifact) -> None:
    """Nothing; the empty `folder` is a model (an autoencoder) or a pipeline (a diffusion model) of diffusers.

    Raises: CheckpointError if diffusers has no model that computes the same; it names the part.
    """
    if isinstance(artifact, Artifact):
        fill_autoencoder(folder, artifact)
        write_json(folder / DESCRIPTION, {"autoencoder": artifact.content})
        return
    text = require_text_alone(artifact.conditioning)
    pipeline = pipeline_of(text)
    pipeline.require(text, artifact.autoencoder)
    scheduler = make_scheduler(artifact.diffusion, pipeline.name)
    parts = {
        name: folder / name for name in (pipeline.autoencoder, "unet", pipeline.text_encoder, "tokenizer", "scheduler")
    }
    for part in parts.values():
        part.mkdir()
    fill_autoencoder(parts[pipeline.autoencoder], artifact.autoencoder)
    first_stage = artifact.autoencoder.config
    side = artifact.provenance["resolution"] // first_stage.downsampling_factor
    unet = empty_unet(artifact.unet, first_stage.latent_channels, text.width, side)
    fill_model(parts["unet"], unet, unet_state(artifact.state), unet_names(artifact.unet), "the UNet")
    fill_text_encoder(parts[pipeline.text_encoder], text, conditioner_state(artifact.state))
    fill_tokenizer(parts["tokenizer"], text)
    scheduler.save_config(parts["scheduler"])
    model_index = _model_index(text, artifact.autoencoder, type(scheduler).__name__)
    write_json(folder / "model_index.json", model_index)
    write_json(folder / DESCRIPTION, {"diffusion": artifact.content, "autoencoder": artifact.autoencoder.content})


def read_diffusers(folder: Path) -> Artifact | DiffusionArtifact:
    """The artifact that a diffusers folder of ours was written from.

    Weights that other software has changed since are taken as they are; the content hash follows them.
    Raises: CheckpointError if the folder is incomplete or does not fit its description.
    """
    description = read_json(folder / DESCRIPTION)
    if "diffusion" not in description:
        autoencoder = read_autoencoder(folder, description["autoencoder"])
        check_autoencoder_content(autoencoder, folder)
        return autoencoder
    conditioning = section_from_dict(ConditioningConfig, description["diffusion"]["conditioning"], "conditioning")
    text = require_text_alone(conditioning)
    pipeline = pipeline_of(text)
    autoencoder = read_autoencoder(folder / pipeline.autoencoder, description["autoencoder"])
    check_autoencoder_content(autoencoder, folder)
    vocabulary = folder / "tokenizer" / VOCABULARY if text.tokenizer == "wordpiece" else None
    described = DiffusionArtifact(description["diffusion"], {}, autoencoder, vocabulary)
    target = expected_diffusion_tensors(described.unet, described.conditioning, autoencoder.config.latent_channels)
    sides = (
        (UNET_PREFIX, folder / "unet" / WEIGHTS, unet_names(described.unet)),
        (CONDITIONER_PREFIX, folder / pipeline.text_encoder / TEXT_WEIGHTS, text_encoder_names(text)),
    )
    state = LazyTensors({})
    for prefix, path, names in sides:
        theirs = read_tensors(path)
        if prefix == CONDITIONER_PREFIX:
            theirs = published(theirs, pipeline.text_model)
        part = restore(theirs, names, _without_prefix(target, prefix), str(path))
        state |= renamed(part, partial(add, prefix))
    artifact = replace(described, content=described.content | {"weights_sha256": tensors_sha256(state)}, state=state)
    check_diffusion_content(artifact, folder)
    return artifact


def make_scheduler(config: DiffusionConfig, pipeline: str = "StableDiffusionPipeline") -> Any:
    """The scheduler with which a pipeline takes the steps of `diffusion.sampler`: with sampler ddim, or euler for edm.

    `DDIMScheduler` steps from t to t - T // num_steps, which with zero_terminal_snr is the next visited timestep only
    where num_steps divides T.
    Raises: CheckpointError if the pipeline has none.
    """
    if config.prediction == "flow":
        raise CheckpointError(
            "diffusion.prediction=flow: FlowMatchEulerDiscreteScheduler has no init_noise_sigma, for which "
            "StableDiffusionPipeline asks, and visits other times by itself; export with --to safetensors"
        )
    if config.prediction == "edm":
        if pipeline != "StableDiffusionPipeline":
            raise CheckpointError(
                f"diffusion.prediction=edm: {pipeline} scales neither its noise nor the UNet's input, as "
                "EDMEulerScheduler needs; export with --to safetensors"
            )
        return _EDMEulerScheduler(
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
            sigma_data=config.sigma_data,
            sigma_schedule="karras",
            num_train_timesteps=config.num_timesteps,
            prediction_type="epsilon",
            rho=config.rho,
            final_sigmas_type="zero",
        )
    return _DDIMScheduler(
        num_train_timesteps=config.num_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="squaredcos_cap_v2" if config.schedule == "cosine" else "scaled_linear",
        prediction_type={"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[config.prediction],
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        rescale_betas_zero_snr=config.zero_terminal_snr,
        timestep_spacing="trailing" if config.zero_terminal_snr else "leading",
    )


def unet_state(state: Mapping[str, Tensor]) -> LazyTensors:
    """The UNet's share of a diffusion model's tensors, under its own names."""
    return _without_prefix(state, UNET_PREFIX)


def conditioner_state(state: Mapping[str, Tensor]) -> LazyTensors:
    """The text encoder's share of a diffusion model's tensors, under its own names."""
    return _without_prefix(state, CONDITIONER_PREFIX)


def _model_index(text: TextConditioningConfig, autoencoder: Artifact, scheduler: str) -> dict[str, Any]:
    pipeline = pipeline_of(text)
    safety_checker = {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }
    return {
        "_class_name": pipeline.name,
        "_diffusers_version": diffusers_version,
        **(safety_checker if text.encoder == "clip" else {}),
        "scheduler": ["diffusers", scheduler],
        pipeline.text_encoder: [pipeline.text_library, pipeline.text_model.__name__],
        "tokenizer": ["transformers", tokenizer_class(text).__name__],
        "unet": ["diffusers", "UNet2DConditionModel"],
        pipeline.autoencoder: ["diffusers", autoencoder_class(autoencoder.config).__name__],
    }


def require_text_alone(conditioning: ConditioningConfig) -> TextConditioningConfig:
    """The text encoder of a model that has no other conditioning.

    Raises: CheckpointError for every other model.
    """
    given = [field.name for field in fields(conditioning) if getattr(conditioning, field.name) is not None]
    if given != ["text"] or conditioning.text is None:
        raise CheckpointError(
            f"a model conditioned on {', '.join(given) or 'nothing'}: diffusers' text-to-image pipelines take captions "
            "and a text encoder of their own, alone; export with --to safetensors"
        )
    return conditioning.text


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> LazyTensors:
    return renamed(state, lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)
