"""Our models as CompVis and Stability keep theirs: one checkpoint and its YAML.

    model.ckpt       {"state_dict": tensors, "global_step": 0}, which torch opens with weights_only=True
    config.yaml      model.target and model.params, as in their configs/
    ldm_scale.json   our own description, from which the folder is an artifact of ours again
    text_encoder/    configuration and weights of a text tower that their code could not download
    vocab.txt        of a text encoder that reads WordPieces

A .ckpt, because the scripts of both repositories open nothing else; what reads safetensors there reads it too.
Per-channel latent statistics are folded into the weights (folding.py) where a diffusion model is written: their code
has one scale. An autoencoder alone keeps its weights: their class has no scale at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from ldm_scale.conditioning.frozen_text import FrozenTextEncoder
from ldm_scale.config.schema import AutoencoderConfig, DiffusionConfig, TextConditioningConfig, UNetConfig
from ldm_scale.diffusion.schedule import alphas_cumprod
from ldm_scale.engine.lazy_tensors import LazyTensors, renamed
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import DESCRIPTION, VOCABULARY, Artifact, DiffusionArtifact
from ldm_scale.interchange.compvis_conditioning import (
    ELSEWHERE,
    TEXT_FOLDER,
    conditioner_places,
    conditioning_there,
    conv_in_form,
    needs_text_folder,
)
from ldm_scale.interchange.compvis_names import (
    COND_STAGE,
    FIRST_STAGE,
    Places,
    autoencoder_places,
    to_theirs,
    unet_places,
)
from ldm_scale.interchange.folding import FOLDED, fold
from ldm_scale.interchange.safetensors_io import passing, write_json, write_tensors
from ldm_scale.interchange.sources import require_diffusers

CHECKPOINT, CONFIG_YAML = "model.ckpt", "config.yaml"
ORIGINALS = "ldm_scale.safetensors"  # tensors of the autoencoder as they were before statistics were folded into them
LAYOUT = {"layout": "compvis"}  # in ldm_scale.json
NORM_GROUPS = 32  # of every norm in their code
PREDICTIONS: dict[str, Literal["eps", "x0", "v"]] = {"eps": "eps", "x0": "x0", "v": "v"}


def fill_compvis_folder(folder: Path, artifact: Artifact | DiffusionArtifact) -> None:
    """Nothing; the empty `folder` holds the model as their code opens it.

    Raises: CheckpointError if their code cannot compute it; it names the part.
    """
    if isinstance(artifact, Artifact):
        config: dict[str, Any] = {"model": _autoencoder_model(artifact.config, artifact.provenance["resolution"])}
        tensors = to_theirs(artifact.state, autoencoder_places(artifact.config))
        description: dict[str, Any] = {"autoencoder": artifact.content}
    else:
        config = {"model": _diffusion_model(artifact)}
        tensors = _diffusion_tensors(artifact)
        description = {"diffusion": artifact.content, "autoencoder": artifact.autoencoder.content}
        _fill_beside(folder, artifact)
    _save(folder / CHECKPOINT, tensors)
    (folder / CONFIG_YAML).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    write_json(folder / DESCRIPTION, LAYOUT | description)


def diffusion_places(artifact: DiffusionArtifact) -> Places:
    """Tensors of the UNet and the conditioner in their checkpoint."""
    conv_in = conv_in_form(artifact.conditioning, artifact.autoencoder.config.latent_channels)
    return unet_places(written_unet(artifact.unet), conv_in=conv_in) | conditioner_places(artifact.conditioning)


def written_unet(config: UNetConfig) -> UNetConfig:
    """The UNet as it is written: of deeper transformers their code runs those with convolutions around them alone."""
    return replace(config, linear_projection=False) if config.transformer_depth > 1 else config


def _diffusion_tensors(artifact: DiffusionArtifact) -> LazyTensors:
    first = artifact.autoencoder
    tensors = to_theirs(artifact.state, diffusion_places(artifact))
    tensors |= to_theirs(fold(first.state, first.statistics), autoencoder_places(first.config, FIRST_STAGE))
    text = artifact.conditioning.text
    if text is not None and text.padding == "zero":
        tensors |= _unread_block(tensors, text)
    frozen = artifact.conditioning.frozen_text
    if frozen is not None:
        # Ours keeps the tower beside the model, their checkpoints hold it.
        tower = FrozenTextEncoder(frozen).tower.state_dict()
        tensors |= {f"{COND_STAGE}model.{name}": tensor for name, tensor in tower.items()}
    products = alphas_cumprod(artifact.diffusion)
    before = torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
    return tensors | {"betas": (1 - products / before).float(), "alphas_cumprod": products.float()}


def _unread_block(tensors: Mapping[str, Tensor], text: TextConditioningConfig) -> dict[str, Tensor]:
    """The block behind the penultimate layer that their tower has and does not run: zeros, which change nothing."""
    from ldm_scale.interchange.compvis_conditioning import open_clip_architectures

    if open_clip_architectures(text)[0][1] == "last":
        return {}
    prefix = f"{COND_STAGE}model.transformer.resblocks."
    last, beyond = f"{prefix}{text.depth - 1}.", f"{prefix}{text.depth}."
    return {
        beyond + name.removeprefix(last): torch.zeros_like(tensor)
        for name, tensor in renamed(tensors, lambda name: name if name.startswith(last) else None).items()
    }


def _fill_beside(folder: Path, artifact: DiffusionArtifact) -> None:
    text = artifact.conditioning.text
    if needs_text_folder(text) and text is not None:
        require_diffusers()
        # transformers takes seconds to import, and few models need it.
        from ldm_scale.interchange.text_encoder import fill_text_encoder, fill_tokenizer

        prefix = "conditioner.text."
        state = renamed(artifact.state, lambda n: n.removeprefix(prefix) if n.startswith(prefix) else None)
        (folder / TEXT_FOLDER).mkdir()
        fill_text_encoder(folder / TEXT_FOLDER, text, state)
        fill_tokenizer(folder / TEXT_FOLDER, text)
    if text is not None and text.vocabulary is not None:
        shutil.copyfile(text.vocabulary, folder / VOCABULARY)
    if artifact.autoencoder.statistics.channel_mean:
        write_tensors(folder / ORIGINALS, {name: artifact.autoencoder.state[name] for name in FOLDED})


def _diffusion_model(artifact: DiffusionArtifact) -> dict[str, Any]:
    first, unet = artifact.autoencoder, written_unet(artifact.unet)
    resolution = artifact.provenance["resolution"]
    if first.statistics.shift:
        raise CheckpointError(
            f"latent_statistics.shift={first.statistics.shift}: their code has a scale_factor and no shift; {ELSEWHERE}"
        )
    there = conditioning_there(artifact)
    channels = first.config.latent_channels
    in_channels = artifact.state["unet.conv_in.weight"].shape[1]
    side = resolution // first.config.downsampling_factor
    params = {
        **_process_params(artifact.diffusion),
        "image_size": side,
        "channels": channels,
        "first_stage_key": "image",
        "scale_by_std": False,
        "scale_factor": first.statistics.scale,
        "monitor": "val/loss_simple_ema",
        "use_ema": False,
        **there.params,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": _unet_params(unet, in_channels, channels, side, _context_dim(artifact)),
        },
        "first_stage_config": _first_stage(first),
        "cond_stage_config": there.cond_stage_config,
    }
    return {"base_learning_rate": 1.0e-4, "target": there.target, "params": params}


def _process_params(diffusion: DiffusionConfig) -> dict[str, Any]:
    if diffusion.prediction not in PREDICTIONS:
        raise CheckpointError(
            f"diffusion.prediction={diffusion.prediction}: their code predicts eps, x0 or v; {ELSEWHERE}"
        )
    if diffusion.zero_terminal_snr:
        raise CheckpointError(
            "diffusion.zero_terminal_snr=true: their schedules end with some signal left, and their samplers divide by "
            f"it; {ELSEWHERE}"
        )
    schedule: dict[str, Any] = {"beta_schedule": diffusion.schedule}
    if diffusion.schedule == "linear":
        schedule |= {"linear_start": diffusion.beta_start, "linear_end": diffusion.beta_end}
    rest = {"timesteps": diffusion.num_timesteps, "num_timesteps_cond": 1, "loss_type": diffusion.loss}
    return {"parameterization": PREDICTIONS[diffusion.prediction]} | schedule | rest


def _unet_params(
    config: UNetConfig, in_channels: int, out_channels: int, side: int, context_dim: int | None
) -> dict[str, Any]:
    _require_norm_groups("unet", config)
    if config.channel_multipliers[0] != 1:
        raise CheckpointError(
            f"unet.channel_multipliers[0]={config.channel_multipliers[0]}: their first and last convolutions are as "
            f"wide as the timestep embedding asks (model_channels); {ELSEWHERE}"
        )
    heads = {"num_heads": config.num_heads} if config.num_heads else {"num_head_channels": config.head_dim}
    params: dict[str, Any] = {
        "image_size": side,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "model_channels": config.base_channels,
        "attention_resolutions": [2**level for level in config.attention_levels],
        "num_res_blocks": config.num_res_blocks,
        "channel_mult": list(config.channel_multipliers),
        "dropout": config.dropout,
        **heads,
        "legacy": False,
    }
    if config.scale_shift_norm:
        params["use_scale_shift_norm"] = True
    if config.residual_resampling:
        params["resblock_updown"] = True
    if config.attention == "transformer":
        params |= {"use_spatial_transformer": True, "transformer_depth": config.transformer_depth}
        params["context_dim"] = context_dim
        if config.linear_projection:  # a parameter that the older code does not know
            params["use_linear_in_transformer"] = True
    return params


def _context_dim(artifact: DiffusionArtifact) -> int | None:
    projection = artifact.state.get("unet.context_projection.to_kv.weight")
    return None if projection is None else projection.shape[1]


def _first_stage(artifact: Artifact) -> dict[str, Any]:
    if artifact.config.kind == "identity":
        return {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    stage = _autoencoder_model(artifact.config, artifact.provenance["resolution"])
    if artifact.config.kind == "vq":
        stage["target"] = "ldm.models.autoencoder.VQModelInterface"
    del stage["base_learning_rate"]
    return stage


def _autoencoder_model(config: AutoencoderConfig, resolution: int) -> dict[str, Any]:
    if config.kind == "identity":
        raise CheckpointError(
            f"autoencoder.kind=identity: their IdentityFirstStage has no weights to write alone; {ELSEWHERE}"
        )
    _require_norm_groups("autoencoder", config)
    if config.attention_levels and not config.mid_attention:
        raise CheckpointError(
            f"autoencoder.mid_attention=false with attention_levels={list(config.attention_levels)}: their attn_type "
            f"is one for the levels and the middle; {ELSEWHERE}"
        )
    if resolution % config.downsampling_factor:
        raise CheckpointError(
            f"resolution {resolution}: their attention levels are resolutions, and f={config.downsampling_factor} does "
            f"not divide it; {ELSEWHERE}"
        )
    params: dict[str, Any] = {"embed_dim": config.latent_channels, "monitor": "val/rec_loss"}
    if config.kind == "vq":
        params["n_embed"] = config.codebook_size
    params["ddconfig"] = {
        **({} if config.mid_attention else {"attn_type": "none"}),
        "double_z": config.kind == "kl",
        "z_channels": config.latent_channels,
        "resolution": resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.base_channels,
        "ch_mult": list(config.channel_multipliers),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [resolution // 2**level for level in config.attention_levels],
        "dropout": 0.0,
    }
    params["lossconfig"] = {"target": "torch.nn.Identity"}
    name = "VQModel" if config.kind == "vq" else "AutoencoderKL"
    return {"base_learning_rate": 4.5e-6, "target": f"ldm.models.autoencoder.{name}", "params": params}


def _require_norm_groups(section: str, config: AutoencoderConfig | UNetConfig) -> None:
    if config.norm_groups != NORM_GROUPS:
        raise CheckpointError(
            f"{section}.norm_groups={config.norm_groups}: every norm in their code has {NORM_GROUPS} groups; "
            f"{ELSEWHERE}"
        )


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Nothing; `path` holds the tensors and is on the disk before this returns."""
    try:
        with path.open("wb") as file:
            state = {name: _own(tensor) for name, tensor in passing(tensors, "gathering")}
            torch.save({"state_dict": state, "global_step": 0}, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch's writer says so of a disk that takes no more
        raise CheckpointError(f"{path.name} not written ({error}); free space there, or fix its permissions") from error


def _own(tensor: Tensor) -> Tensor:
    """The tensor with memory of its own: a file holds whole memories, of which a view may be a small part."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
