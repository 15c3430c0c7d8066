"""Our models as folders that diffusers and transformers open, and back.

    autoencoder    config.json, diffusion_pytorch_model.safetensors: an `AutoencoderKL` or a `VQModel`
    diffusion      model_index.json and one folder per part: a `StableDiffusionPipeline`

Every folder also holds ldm_scale.json (our own description), from which `read_diffusers` makes an artifact again.
Configurations are translated here and in diffusers_autoencoder.py, tensor names in name_maps.py. A model that the
other side cannot hold is refused with the part that does not fit: a nearly equal model is worse than none.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers import __version__ as diffusers_version
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm_scale.config.schema import DiffusionConfig, TextConditioningConfig, UNetConfig
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import (
    DESCRIPTION,
    Artifact,
    DiffusionArtifact,
    check_autoencoder_content,
    check_diffusion_content,
    expected_diffusion_tensors,
)
from ldm_scale.interchange.clip_tokenizer import VOCABULARY_SIZE, write_clip_tokenizer
from ldm_scale.interchange.diffusers_autoencoder import (
    WEIGHTS,
    fill_autoencoder,
    fill_model,
    read_autoencoder,
    require_plain_first_level,
)
from ldm_scale.interchange.name_maps import (
    restore,
    text_encoder_names,
    translate,
    unet_names,
)
from ldm_scale.interchange.safetensors_io import (
    read_json,
    read_tensors,
    tensors_sha256,
    write_json,
    write_tensors,
)
from ldm_scale.models.unet import num_heads

# diffusers ships no types for its constructors.
_UNet2DConditionModel: Any = UNet2DConditionModel
_DDIMScheduler: Any = DDIMScheduler

TEXT_WEIGHTS = "model.safetensors"
UNET_PREFIX, CONDITIONER_PREFIX = "unet.", "conditioner."
CLIP_PREFIX = "text_model."


def fill_diffusers_folder(folder: Path, artifact: Artifact | DiffusionArtifact) -> None:
    """Nothing; the empty `folder` is a model (an autoencoder) or a pipeline (a diffusion model) of diffusers.

    Raises: CheckpointError if diffusers has no model that computes the same; it names the part.
    """
    if isinstance(artifact, Artifact):
        fill_autoencoder(folder, artifact)
        write_json(folder / DESCRIPTION, {"autoencoder": artifact.content})
        return
    _require_pipeline(artifact.autoencoder)
    parts = {name: folder / name for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")}
    for part in parts.values():
        part.mkdir()
    fill_autoencoder(parts["vae"], artifact.autoencoder)
    first_stage = artifact.autoencoder.config
    side = artifact.provenance["resolution"] // first_stage.downsampling_factor
    unet = empty_unet(artifact.unet, first_stage.latent_channels, artifact.conditioning.width, side)
    fill_model(parts["unet"], unet, unet_state(artifact.state), unet_names(artifact.unet), "the UNet")
    _fill_text_encoder(parts["text_encoder"], artifact)
    write_clip_tokenizer(parts["tokenizer"], artifact.conditioning.max_tokens)
    make_scheduler(artifact.diffusion).save_config(parts["scheduler"])
    write_json(folder / "model_index.json", _model_index())
    write_json(folder / DESCRIPTION, {"diffusion": artifact.content, "autoencoder": artifact.autoencoder.content})


def read_diffusers(folder: Path) -> Artifact | DiffusionArtifact:
    """The artifact that a diffusers folder of ours was written from.

    Weights that other software has changed since are taken as they are; the content hash follows them.
    Raises: CheckpointError if the folder is incomplete or does not fit its description.
    """
    description = read_json(folder / DESCRIPTION)
    is_pipeline = "diffusion" in description
    autoencoder = read_autoencoder(folder / "vae" if is_pipeline else folder, description["autoencoder"])
    check_autoencoder_content(autoencoder, folder)
    if not is_pipeline:
        return autoencoder
    described = DiffusionArtifact(description["diffusion"], {}, autoencoder)
    target = expected_diffusion_tensors(described.unet, described.conditioning, autoencoder.config.latent_channels)
    sides = (
        (UNET_PREFIX, folder / "unet" / WEIGHTS, unet_names(described.unet)),
        (CONDITIONER_PREFIX, folder / "text_encoder" / TEXT_WEIGHTS, text_encoder_names(described.conditioning)),
    )
    state: dict[str, Tensor] = {}
    for prefix, path, names in sides:
        theirs = read_tensors(path)
        if prefix == CONDITIONER_PREFIX:
            theirs = with_clip_prefix(theirs)
        part = restore(theirs, names, _without_prefix(target, prefix), str(path))
        state |= {f"{prefix}{name}": tensor for name, tensor in part.items()}
    artifact = replace(described, content=described.content | {"weights_sha256": tensors_sha256(state)}, state=state)
    check_diffusion_content(artifact, folder)
    return artifact


def empty_unet(config: UNetConfig, latent_channels: int, context_dim: int, latent_side: int) -> nn.Module:
    """The `UNet2DConditionModel` of a configuration of ours, without memory behind its weights.

    diffusers calls the number of heads `attention_head_dim`, a misnomer that it keeps because published models have it.
    Raises: CheckpointError if there is none.
    """
    require_plain_first_level("unet", config)
    levels = range(len(config.channel_multipliers))
    widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
    has_attention = [level in config.attention_levels for level in levels]
    # A level without attention (and not beside the middle) has no heads; the number there is never used.
    heads = [
        num_heads(config, widths[level]) if has_attention[level] or level == levels[-1] else config.num_heads or 1
        for level in levels
    ]
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in has_attention]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(has_attention)]
    with torch.device("meta"):
        return _UNet2DConditionModel(  # type: ignore[no-any-return]
            sample_size=latent_side,
            in_channels=latent_channels,
            out_channels=latent_channels,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            block_out_channels=tuple(widths),
            layers_per_block=config.num_res_blocks,
            dropout=config.dropout,
            norm_num_groups=config.norm_groups,
            cross_attention_dim=context_dim,
            transformer_layers_per_block=config.transformer_depth,
            attention_head_dim=heads[0] if len(set(heads)) == 1 else tuple(heads),
            use_linear_projection=config.linear_projection,
        )


def clip_text_config(config: TextConditioningConfig) -> CLIPTextConfig:
    """Configuration of the `CLIPTextModel` of a text encoder of ours.

    Raises: CheckpointError if its vocabulary is not the tokenizer's.
    """
    if config.vocab_size != VOCABULARY_SIZE:
        raise CheckpointError(
            f"conditioning.vocab_size={config.vocab_size}: the exported CLIPTokenizer has {VOCABULARY_SIZE} tokens; "
            f"train with conditioning.vocab_size={VOCABULARY_SIZE}, or export with --to safetensors"
        )
    return CLIPTextConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_tokens,
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        projection_dim=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        hidden_act=config.activation,
        bos_token_id=49406,
        eos_token_id=49407,
        architectures=["CLIPTextModel"],
    )


def make_scheduler(config: DiffusionConfig) -> Any:
    """The `DDIMScheduler` that takes the steps of `diffusion.sampler` with sampler ddim."""
    assert (config.schedule, config.prediction) == ("linear", "eps"), f"no scheduler for {config}"
    return _DDIMScheduler(
        num_train_timesteps=config.num_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def unet_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's share of a diffusion model's tensors, under its own names."""
    return _without_prefix(state, UNET_PREFIX)


def conditioner_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder's share of a diffusion model's tensors, under its own names."""
    return _without_prefix(state, CONDITIONER_PREFIX)


def with_clip_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A `CLIPTextModel`'s tensors under their published names: transformers 5 dropped the prefix in memory."""
    return {CLIP_PREFIX + name.removeprefix(CLIP_PREFIX): tensor for name, tensor in state.items()}


def _fill_text_encoder(folder: Path, artifact: DiffusionArtifact) -> None:
    config = clip_text_config(artifact.conditioning)
    with torch.device("meta"):
        model: nn.Module = CLIPTextModel(config)
    target = with_clip_prefix(model.state_dict())
    names = text_encoder_names(artifact.conditioning)
    translated = translate(conditioner_state(artifact.state), names, target, "the text encoder")
    write_tensors(folder / TEXT_WEIGHTS, translated)
    config.save_pretrained(folder)


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers_version,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _require_pipeline(autoencoder: Artifact) -> None:
    """StableDiffusionPipeline can decode with the autoencoder."""
    if autoencoder.config.kind == "vq":
        raise CheckpointError(
            "autoencoder.kind=vq: StableDiffusionPipeline hands its decoder a generator, which VQModel does not take; "
            "LDMTextToImagePipeline fixes f = 8 and 77 tokens; export with --to safetensors, or the autoencoder alone"
        )
    if autoencoder.statistics.shift != 0.0:
        raise CheckpointError(
            f"latent_statistics.shift={autoencoder.statistics.shift}: StableDiffusionPipeline only scales latents and "
            "would decode shifted ones wrongly; export with --to safetensors"
        )


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
