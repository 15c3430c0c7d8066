"""Configurations in diffusers' layout: each key is used, told or refused by its name; published networks fit."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ldm_scale.config.schema import AutoencoderConfig
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import expected_autoencoder_tensors
from ldm_scale.interchange.diffusers_import import read_foreign_diffusers
from ldm_scale.interchange.diffusers_scheduler import read_scheduler
from ldm_scale.interchange.diffusers_unet import empty_unet
from ldm_scale.interchange.foreign_autoencoder import autoencoder_config_of, read_foreign_autoencoder
from ldm_scale.interchange.foreign_config import empty_model, filled
from ldm_scale.interchange.foreign_text import read_foreign_text
from ldm_scale.interchange.foreign_unet import read_foreign_unet, unet_config_of
from ldm_scale.interchange.name_maps import autoencoder_names, restore, unet_names
from ldm_scale.models.build import build_unet
from tests.helpers.foreign import (
    DDIM,
    OURS,
    SCALED_LINEAR,
    byte_pairs,
    conditional_unet,
    edit,
    save,
)

_diffusers: Any = diffusers
JUNK: tuple[Any, ...] = (None, -1, 0, "x", [], {}, True, float("nan"), [[]], 10**30, [0, 32])


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("sd1", tmp_path_factory.mktemp("sd1"))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "pipeline": (
        "model_index.json",
        {"_class_name": "StableDiffusionXLPipeline"},
        "'StableDiffusionXLPipeline': pipel",
    ),
    "part": ("model_index.json", {"unet": [None, None]}, r"unet=\[None, None\]: the pipeline has no such part"),
    "text class": ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "encoder T5EncoderModel"),
    "unet class": ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "'UNet3DConditionModel': UNets here"),
    "heads": (
        "unet/config.json",
        {"attention_head_dim": [8, 4, 8, 8]},
        r"attention_head_dim=\[8, 4, 8, 8\] with block",
    ),
    "depths": ("unet/config.json", {"transformer_layers_per_block": [1, 2, 1, 1]}, "transformer_layers_per_block="),
    "classes": ("unet/config.json", {"num_class_embeds": 10}, "num_class_embeds=10: the networks"),
    "kernel": ("unet/config.json", {"conv_in_kernel": 5}, "conv_in_kernel=5"),
    "cross": ("unet/config.json", {"only_cross_attention": True}, "only_cross_attention=True"),
    "eps": ("unet/config.json", {"norm_eps": 1e-6}, "norm_eps=1e-06: the networks here compute what norm_eps=1e-05"),
    "variances": ("unet/config.json", {"out_channels": 8}, "out_channels=8 with in_channels=4"),
    "middle": ("unet/config.json", {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type='UNetMidBlock2D'"),
    "betas": ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule='linear': the processes"),
    "table": ("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 1000}, "trained_betas=a list of 1000"),
    "flow": (
        "scheduler/scheduler_config.json",
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
        "use_flow_sigmas=True: the processes here have use_flow_sigmas=False",
    ),
    "variances of its own": (
        "scheduler/scheduler_config.json",
        {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
        "variance_type='learned_range': the processes here have",
    ),
    "times of another kind": (
        "scheduler/scheduler_config.json",
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
        "timestep_type='continuous': the processes here have timestep_type='discrete'",
    ),
    "edm of v": (
        "scheduler/scheduler_config.json",
        {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"},
        "prediction_type='v_prediction': the processes here have epsilon",
    ),
    "text for a number": ("scheduler/scheduler_config.json", {"num_train_timesteps": 10.5}, "num_train_timesteps=10.5"),
    "scheduler": ("scheduler/scheduler_config.json", {"_class_name": "DDIMInverseScheduler"}, "DDIMInverseScheduler"),
    "no betas": ("scheduler/scheduler_config.json", {"beta_start": 0.5}, "must satisfy 0 < beta_start <= beta_end"),
    "activation": ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act='relu': text encoders here have"),
    "mask": ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask=True"),
    "feed-forward": ("text_encoder/config.json", {"intermediate_size": 48}, "intermediate_size=48"),
    "shift": ("vae/config.json", {"shift_factor": 0.1}, r"shift_factor=0\.1: StableDiffusionPipeline does not shift"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_networks_cannot_hold_is_refused_by_its_key(sd1: Path, name: str) -> None:
    file, changes, message = REFUSED[name]
    before = (sd1 / file).read_text()
    edit(sd1 / file, **changes)
    try:
        with pytest.raises(CheckpointError, match=message) as raised:
            read_foreign_diffusers(sd1)
    finally:
        (sd1 / file).write_text(before)
    assert str(sd1) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_channels_that_no_pipeline_of_ours_gives_are_refused(sd1: Path, tmp_path: Path) -> None:
    shutil.copytree(sd1, tmp_path / "sd1")
    conditional_unet(5, attention_head_dim=8).save_pretrained(tmp_path / "sd1" / "unet")
    with pytest.raises(
        CheckpointError, match=r"in_channels=5 with out_channels=4: .* gives its UNet 4; what the others"
    ):
        read_foreign_diffusers(tmp_path / "sd1")


def test_a_tokenizer_without_its_vocabulary_says_what_it_needs(tmp_path: Path) -> None:
    folder = save("text_to_image", tmp_path)
    (folder / "tokenizer" / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer holds no vocab\.txt: save the tokenizer's vocabulary there"):
        read_foreign_diffusers(folder)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    folder = save("celebahq", tmp_path)
    (folder / "scheduler").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"scheduler is missing: the folder is incomplete"):
        read_foreign_diffusers(folder)
    with pytest.raises(CheckpointError, match="'UNet2DModel': alone, only AutoencoderKL and VQModel"):
        read_foreign_diffusers(folder / "unet")


def test_another_tokenizer_is_refused(sd1: Path) -> None:
    tokenizer = copy.deepcopy(byte_pairs("zero"))
    tokenizer.pad_token = "a</w>"
    saved = {path.name: path.read_bytes() for path in (sd1 / "tokenizer").iterdir()}
    tokenizer.save_pretrained(sd1 / "tokenizer")
    try:
        with pytest.raises(CheckpointError, match=r"tokenizer numbers '' as .*, the tokenizer here as"):
            read_foreign_diffusers(sd1)
    finally:
        for name, content in saved.items():
            (sd1 / "tokenizer" / name).write_bytes(content)


DRAWN_OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "DDIMScheduler": (
        {"steps_offset": 0, "timestep_spacing": "trailing"},
        "steps_offset=0 (here 1), timestep_spacing='trailing' (here 'leading')",
    ),
    "DPMSolverMultistepScheduler": (
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "use_karras_sigmas": True},
        "algorithm_type='sde-dpmsolver++' (here 'dpmsolver++'), solver_order=3 (here 2), timestep_spacing='linspace' "
        "(here 'leading'), use_karras_sigmas=True (here False)",
    ),
    "EulerAncestralDiscreteScheduler": (
        {"timestep_spacing": "leading"},
        "samples will differ from its own pipeline's by _class_name='EulerAncestralDiscreteScheduler' (here 'ddim', "
        "the nearest)",
    ),
    "DDPMScheduler": (
        {"clip_sample": False, "variance_type": "fixed_large", "clip_sample_range": 2.0},
        "by variance_type='fixed_large' (here 'fixed_small')",
    ),
    "EDMEulerScheduler": (
        {"prediction_type": "epsilon", "sigma_schedule": "exponential"},
        "by sigma_schedule='exponential' (here 'karras')",
    ),
}


@pytest.mark.parametrize("name", DRAWN_OTHERWISE)
def test_a_scheduler_that_draws_otherwise_is_said(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log = type("Log", (), {"warning": lambda self, message: said.append(message)})()
    monkeypatch.setattr("ldm_scale.interchange.diffusers_scheduler.get_logger", lambda: log)
    scheduler = getattr(_diffusers, name)
    known = scheduler.__init__.__wrapped__.__code__.co_varnames
    common = {key: value for key, value in (SCALED_LINEAR | OURS).items() if key in known}
    changes, message = DRAWN_OTHERWISE[name]
    scheduler(**(common | changes)).save_pretrained(tmp_path)
    read_scheduler(tmp_path)
    assert len(said) == 1
    assert message in said[0]


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_a_scheduler_that_draws_as_ours_is_silent(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_scale.interchange.diffusers_scheduler.get_logger", lambda: pytest.fail("said something"))
    options = {
        "DDIMScheduler": DDIM,
        "PNDMScheduler": OURS | {"skip_prk_steps": True},
        "EulerDiscreteScheduler": {"steps_offset": 1, "timestep_spacing": "leading"},
    }
    getattr(_diffusers, name)(**SCALED_LINEAR, **options[name]).save_pretrained(tmp_path)
    assert read_scheduler(tmp_path)[1].sampler == {"PNDMScheduler": "plms"}.get(name, "ddim")


@pytest.mark.parametrize("part", ["vae", "unet", "scheduler", "text_encoder"])
def test_whatever_a_configuration_says_is_used_or_refused(sd1: Path, part: str) -> None:
    """Each key with things that it may not hold; of the UNet, which takes longest to build, one a key."""
    path = sd1 / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    readers: dict[str, Callable[[Path], object]] = {
        "vae": read_foreign_autoencoder,
        "unet": read_foreign_unet,
        "scheduler": read_scheduler,
        "text_encoder": lambda folder: read_foreign_text(
            folder, "CLIPTextModel", sd1 / "nowhere", "CLIPTokenizer"
        ),  # refused there at the latest: opening a tokenizer takes a second
    }
    before, escaped, number = path.read_text(), {}, 0
    try:
        for key in json.loads(before):
            for _ in range(1 if part == "unet" else 3):
                number += 1
                path.write_text(json.dumps(json.loads(before) | {key: JUNK[number % len(JUNK)]}))
                try:
                    readers[part](path.parent)
                except CheckpointError:
                    continue
                except Exception as error:
                    escaped[key, repr(JUNK[number % len(JUNK)])] = f"{type(error).__name__}: {error}"
    finally:
        path.write_text(before)
    assert escaped == {}


# The published configurations of the UNets of Stable Diffusion 1.5 and 2.1.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "sd-1.5": ({"attention_head_dim": 8, "cross_attention_dim": 768}, 859_520_964),
    "sd-2.1": (
        {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "upcast_attention": True,
            "dual_cross_attention": False,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "sample_size": 96,
        },
        865_910_724,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_published_unets_has_a_place(tmp_path: Path, name: str) -> None:
    own, parameters = PUBLISHED[name]
    common = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(common | own))
    theirs, model = empty_model(_diffusers.UNet2DConditionModel, tmp_path)
    config = unet_config_of(tmp_path / "config.json", theirs, is_conditional=True)
    with torch.device("meta"):
        target = build_unet(config, 4, 4, own["cross_attention_dim"]).state_dict()
    ours = restore(model.state_dict(), unet_names(config), target, name)
    assert sum(x.numel() for x in ours.values()) == sum(x.numel() for x in target.values()) == parameters
    held: Any = empty_unet(config, 4, own["cross_attention_dim"], 64)
    assert filled(held, {}, tmp_path)["attention_head_dim"] in (8, (5, 10, 20, 20))


def test_the_published_autoencoder_and_celebahqs_unet_are_ours(tmp_path: Path) -> None:
    """Configurations in the old files of SD-1.5 (its vae) and of CompVis' ldm-celebahq-256 (its unet)."""
    vae = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(vae))
    theirs, model = empty_model(_diffusers.AutoencoderKL, tmp_path)
    config = autoencoder_config_of(tmp_path / "config.json", theirs, "AutoencoderKL")
    assert config == AutoencoderConfig()
    target = expected_autoencoder_tensors(config)
    assert sum(x.numel() for x in target.values()) == 83_653_863
    assert restore(model.state_dict(), autoencoder_names(config), target, "vae").keys() == target.keys()

    unet = {
        "_class_name": "UNet2DModel",
        "attention_head_dim": 32,
        "block_out_channels": [224, 448, 672, 896],
        "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 64,
        "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
    }
    (tmp_path / "config.json").write_text(json.dumps(unet))
    theirs, model = empty_model(_diffusers.UNet2DModel, tmp_path)
    of_unet = unet_config_of(tmp_path / "config.json", theirs, is_conditional=False)
    with torch.device("meta"):
        target = build_unet(of_unet, 3, 3, None).state_dict()
    # The paper's 274M (arXiv:2112.10752, Table 12).
    assert round(sum(x.numel() for x in target.values()) / 1e6, 1) == 274.1
    assert restore(model.state_dict(), unet_names(of_unet), target, "unet").keys() == target.keys()
