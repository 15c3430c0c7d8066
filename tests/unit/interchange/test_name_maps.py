"""Name and configuration maps: the published models' layouts at full size, strictness, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from ldm_scale.config.schema import AutoencoderConfig, DiffusionConfig, TextConditioningConfig, UNetConfig
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import (
    Artifact,
    DiffusionArtifact,
    expected_autoencoder_tensors,
    make_artifact,
    make_diffusion_artifact,
)
from ldm_scale.interchange.diffusers import fill_diffusers_folder
from ldm_scale.interchange.diffusers_autoencoder import empty_autoencoder
from ldm_scale.interchange.diffusers_scheduler import make_scheduler
from ldm_scale.interchange.diffusers_unet import empty_unet
from ldm_scale.interchange.name_maps import autoencoder_names, restore, translate, unet_names
from ldm_scale.interchange.text_encoder import text_model_config
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.models.build import build_unet

SD1 = UNetConfig(head_dim=None, num_heads=8, linear_projection=False)
SD2 = UNetConfig(head_dim=64, num_heads=None, linear_projection=True)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "context_dim", "heads", "linear", "parameters"),
    [(SD1, 768, 8, False, 859_520_964), (SD2, 1024, (5, 10, 20, 20), True, 865_910_724)],
)
def test_stable_diffusion_unets_have_their_published_layout(
    config: UNetConfig, context_dim: int, heads: object, linear: bool, parameters: int
) -> None:
    theirs: Any = empty_unet(config, 4, context_dim, 64)
    published = {
        "attention_head_dim": heads,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": context_dim,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "sample_size": 64,
        "use_linear_projection": linear,
    }
    assert {name: theirs.config[name] for name in published} == published
    assert num_parameters(theirs) == parameters
    with torch.device("meta"):
        ours = build_unet(config, 4, 4, context_dim).state_dict()
    translate(ours, unet_names(config), theirs.state_dict(), "the UNet")


def test_stable_diffusions_autoencoder_has_its_published_layout() -> None:
    config = AutoencoderConfig()
    theirs: Any = empty_autoencoder(config, LatentStatistics(scale=0.18215), 512)
    published = {
        "block_out_channels": (128, 256, 512, 512),
        "latent_channels": 4,
        "layers_per_block": 2,
        "sample_size": 512,
        "scaling_factor": 0.18215,
        "shift_factor": None,
    }
    assert {name: theirs.config[name] for name in published} == published
    assert num_parameters(theirs) == 83_653_863
    ours = expected_autoencoder_tensors(config)
    translate(ours, autoencoder_names(config), theirs.state_dict(), "the autoencoder")


def test_scheduler_has_stable_diffusions_settings() -> None:
    config = make_scheduler(DiffusionConfig()).config
    published = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    assert {name: config[name] for name in published} == published


def test_processes_without_an_equal_pipeline_have_no_scheduler() -> None:
    edm = DiffusionConfig(prediction="edm")
    assert type(make_scheduler(edm)).__name__ == "EDMEulerScheduler"
    with pytest.raises(CheckpointError, match=r"diffusion.prediction=edm: LDMTextToImagePipeline scales neither"):
        make_scheduler(edm, "LDMTextToImagePipeline")
    with pytest.raises(CheckpointError, match=r"diffusion.prediction=flow: FlowMatchEulerDiscreteScheduler"):
        make_scheduler(DiffusionConfig(prediction="flow"))
    # If diffusers' class gains it, the refusal can go.
    assert not hasattr(FlowMatchEulerDiscreteScheduler, "init_noise_sigma")


def test_translate_uses_every_tensor_once(autoencoder_artifact: Artifact) -> None:
    config = autoencoder_artifact.config
    names, state = autoencoder_names(config), autoencoder_artifact.state
    target = empty_autoencoder(config, autoencoder_artifact.statistics, 16).state_dict()
    theirs = translate(state, names, target, "x")
    assert theirs.keys() == target.keys()
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(tensor.numel() for tensor in state.values())

    qkv = state["encoder.middle.attention.attention.to_qkv.weight"]
    width = qkv.shape[1]
    for index, part in enumerate("qkv"):
        rows = qkv[index * width : (index + 1) * width]
        assert torch.equal(theirs[f"encoder.mid_block.attentions.0.to_{part}.weight"], rows)

    with pytest.raises(CheckpointError, match=r"no place .* encoder\.extra\.weight"):
        translate(state | {"encoder.extra.weight": torch.zeros(1)}, names, target, "x")
    incomplete = {name: tensor for name, tensor in state.items() if name != "quant_conv.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing \(quant_conv\.bias\)"):
        translate(incomplete, names, target, "x")
    reshaped = state | {"encoder.conv_in.bias": torch.zeros(9)}
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in\.bias \(9,\) instead of \(8,\)"):
        translate(reshaped, names, target, "x")


def test_restore_inverts_translate(autoencoder_artifact: Artifact) -> None:
    names, state = autoencoder_names(autoencoder_artifact.config), autoencoder_artifact.state
    target = empty_autoencoder(autoencoder_artifact.config, autoencoder_artifact.statistics, 16).state_dict()
    theirs = translate(state, names, target, "x")
    ours = restore(theirs, names, state, "x")
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name]) for name in state)
    with pytest.raises(CheckpointError, match=r"1 tensors missing \(quant_conv\.bias\), 1 not expected \(other\)"):
        restore({("other" if k == "quant_conv.bias" else k): v for k, v in theirs.items()}, names, state, "x")


def test_models_that_diffusers_cannot_hold_are_refused(tmp_path: Path, diffusion_artifact: DiffusionArtifact) -> None:
    with pytest.raises(CheckpointError, match=r"autoencoder\.channel_multipliers\[0\]=2.*base_channels=256"):
        empty_autoencoder(AutoencoderConfig(channel_multipliers=(2, 4)), LatentStatistics(), 64)
    with pytest.raises(CheckpointError, match=r"unet\.channel_multipliers\[0\]=2"):
        empty_unet(UNetConfig(channel_multipliers=(2, 4), attention_levels=()), 4, 768, 32)
    with pytest.raises(CheckpointError, match=r"conditioning\.text\.vocab_size=50000"):
        text_model_config(TextConditioningConfig(vocab_size=50_000))
    first = diffusion_artifact.autoencoder
    shifted = make_artifact(first.state, first.config, LatentStatistics(shift=0.1), first.provenance)
    model = make_diffusion_artifact(
        diffusion_artifact.state,
        shifted,
        unet=diffusion_artifact.unet,
        conditioning=diffusion_artifact.conditioning,
        diffusion=diffusion_artifact.diffusion,
        sampling=diffusion_artifact.sampling,
        provenance=diffusion_artifact.provenance,
    )
    with pytest.raises(CheckpointError, match=r"latent_statistics\.shift=0\.1"):
        fill_diffusers_folder(tmp_path, model)
