"""Tiny models of every kind that CompVis' code knows (32 groups in every norm), none of their weights zero."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.schema import (
    AutoencoderConfig,
    ClassConditioningConfig,
    ConditioningConfig,
    DiffusionConfig,
    InpaintingConditioningConfig,
    LayoutConditioningConfig,
    LowResolutionConditioningConfig,
    SamplingConfig,
    SemanticMapConditioningConfig,
    TextConditioningConfig,
    UNetConfig,
)
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact, make_artifact, make_diffusion_artifact
from ldm_scale.interchange.compvis_write import fill_compvis_folder
from ldm_scale.models.autoencoder import Autoencoder, LatentStatistics
from tests.helpers.weights import random_state

RESOLUTION = 32
AUTOENCODER = AutoencoderConfig(base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1)
VQ = AutoencoderConfig(
    kind="vq",
    base_channels=32,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    latent_channels=3,
    attention_levels=(1,),
    codebook_size=20,
)
IDENTITY = AutoencoderConfig(
    kind="identity",
    base_channels=1,
    channel_multipliers=(1,),
    num_res_blocks=1,
    latent_channels=3,
    norm_groups=1,
    mid_attention=False,
)
UNET = UNetConfig(base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), head_dim=8)
SELF = dataclasses.replace(UNET, attention="self", head_dim=None, num_heads=4)
TEXT = TextConditioningConfig(width=16, depth=1, num_heads=2)
BERT = TextConditioningConfig(
    encoder="bert", tokenizer="wordpiece", vocab_size=30522, max_tokens=9, width=16, depth=2, num_heads=8, head_dim=64
)
SCALE = LatentStatistics(scale=0.3)
KINDS: dict[str, tuple[UNetConfig, ConditioningConfig]] = {
    "unconditional": (
        dataclasses.replace(SELF, scale_shift_norm=True, residual_resampling=True, attention_levels=(0, 1)),
        ConditioningConfig(),
    ),
    "attention in the middle alone": (dataclasses.replace(SELF, attention_levels=()), ConditioningConfig()),
    "classes": (UNET, ConditioningConfig(classes=ClassConditioningConfig(num_classes=7, width=16))),
    "layout": (
        dataclasses.replace(UNET, transformer_depth=2),
        ConditioningConfig(
            layout=LayoutConditioningConfig(num_classes=5, num_tokens=30, max_objects=3, width=16, depth=2)
        ),
    ),
    "semantic map": (SELF, ConditioningConfig(semantic_map=SemanticMapConditioningConfig(num_labels=5, channels=2))),
    "small image": (
        dataclasses.replace(SELF, head_dim=16, num_heads=None),
        ConditioningConfig(low_resolution=LowResolutionConditioningConfig(factor=2)),
    ),
}
TEXT_KINDS: dict[str, tuple[UNetConfig, ConditioningConfig]] = {
    "text": (dataclasses.replace(UNET, linear_projection=False), ConditioningConfig(text=TEXT)),
    "text and inpainting": (UNET, ConditioningConfig(text=TEXT, inpainting=InpaintingConditioningConfig())),
}


def first_stage(config: AutoencoderConfig = AUTOENCODER, statistics: LatentStatistics = SCALE) -> Artifact:
    return make_artifact(random_state(Autoencoder(config)), config, statistics, {"resolution": RESOLUTION})


def second_stage(
    unet: UNetConfig,
    conditioning: ConditioningConfig,
    first: Artifact | None = None,
    diffusion: DiffusionConfig | None = None,
) -> DiffusionArtifact:
    first = first or first_stage()
    state = random_state(LatentDiffusion(unet, conditioning, first.config.latent_channels))
    if conditioning.semantic_map is not None:
        state["conditioner.semantic_map.projection.weight"][-1] = 0  # as training leaves the row of unknown pixels
    return make_diffusion_artifact(
        state,
        first,
        unet=unet,
        conditioning=conditioning,
        diffusion=diffusion or DiffusionConfig(),
        sampling=SamplingConfig(),
        provenance={"resolution": RESOLUTION},
    )


def write_vocabulary(path: Path) -> str:
    """A vocabulary of the size of bert-base-uncased's, with the words in their places by which it is recognised."""
    words = [f"word{number}" for number in range(30522)]
    for number, word in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1996: "the"}.items():
        words[number] = word
    path.write_text("\n".join(words) + "\n")
    return str(path)


def theirs(checkpoint: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint as any program of today reads it."""
    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = content["state_dict"]
    return state


def strangers_folder(folder: Path, model: DiffusionArtifact) -> Path:
    """The folder, with a checkpoint as another program leaves it, and its YAML."""
    fill_compvis_folder(folder, model)
    (folder / "ldm_scale.json").unlink()
    return folder


def changed(folder: Path, change: dict[str, Tensor | None], **beside: Any) -> Path:
    """The checkpoint with other tensors (None: without one), and with other things beside them."""
    state: dict[str, Any] = {**theirs(folder / "model.ckpt"), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    torch.save({"state_dict": state, **beside}, folder / "model.ckpt")
    return folder / "model.ckpt"


def reconfigured(folder: Path, path: str, value: Any) -> None:
    """Nothing; the YAML has another value there."""
    content = yaml.safe_load((folder / "config.yaml").read_text())
    section = content["model"]["params"]
    *parts, last = path.split(".")
    for part in parts:
        section = section[part]
    section[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
