"""Strangers' configurations in CompVis' layout: what their YAML says is used or refused, and what does without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.compose import load_config
from ldm_scale.config.schema import AutoencoderConfig, ConditioningConfig
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact
from ldm_scale.interchange.compvis import ImportOptions, read_compvis
from ldm_scale.interchange.compvis_conditioning import conditioner_places
from ldm_scale.interchange.compvis_infer import inferred_model
from ldm_scale.interchange.compvis_names import FIRST_STAGE, autoencoder_places, to_theirs, unet_places
from ldm_scale.interchange.compvis_read import diffusion_config, unet_config
from ldm_scale.interchange.compvis_write import fill_compvis_folder, written_unet
from ldm_scale.interchange.foreign_section import Section
from ldm_scale.models.autoencoder import Autoencoder
from tests.helpers.compvis import (
    AUTOENCODER,
    KINDS,
    SELF,
    TEXT_KINDS,
    VQ,
    changed,
    first_stage,
    reconfigured,
    second_stage,
    strangers_folder,
)

NONE = ImportOptions()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return strangers_folder(tmp_path, second_stage(SELF, ConditioningConfig()))


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    return strangers_folder(tmp_path, second_stage(*TEXT_KINDS["text"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "is no YAML of plain values"),
        ("model: !!python/object/apply:os.system ['true']", "is no YAML of plain values"),
        ("data: {}", r"has no model\.params"),
        ("model: {target: ldm.models.diffusion.ddpm.DDPM, params: {}}", r"ddpm\.DDPM: known are LatentDiffusion"),
        ("model: {params: {}}", r"model\.target=None: must name a class"),
    ],
)
def test_yaml_that_cannot_be_used(folder: Path, content: str, message: str) -> None:
    (folder / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_compvis(folder, NONE)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("unet_config.params.num_classes", 1000, r"num_classes=1000: our models have no such part"),
        ("unet_config.params.spatial_magic", True, r"unet_config\.params has spatial_magic: not a part that is known"),
        ("unet_config.params.channel_mult", "1, 2", r"channel_mult='1, 2': must be a list of whole numbers"),
        ("unet_config.params.num_heads", -1, "neither num_heads nor num_head_channels"),
        ("unet_config.params.num_res_blocks", [1, 2], r"num_res_blocks=\[1, 2\]: our models have one number"),
        ("unet_config.params.model_channels", None, r"model_channels=None: must be a whole number"),
        ("unet_config.target", "ldm.modules.UNetModelWithControl", "known is UNetModel"),
        ("first_stage_config.params.ddconfig.attn_type", "linear", "attn_type='linear': ours is plain attention"),
        ("first_stage_config.params.ddconfig.tanh_out", True, "tanh_out=True: our models have no such part"),
        ("first_stage_config.params.ddconfig.z_channels", 8, "z_channels=8 and embed_dim=4"),
        ("first_stage_config.target", "sgm.models.AutoencodingEngine", "known are AutoencoderKL, VQModel"),
        ("parameterization", "mu", r"parameterization='mu': known are eps, x0, v"),
        ("beta_schedule", "sqrt", "beta_schedule='sqrt': ours are linear"),
        ("linear_end", 0.02, r"another noise schedule than its configuration says \(alphas_cumprod ends with"),
        ("scale_factor", -3.0, r"scale_factor=-3\.0: must be a number, above 0; correct the YAML"),
        ("scale_factor", 0, r"scale_factor=0: must be a number, above 0"),
        ("scale_factor", float("nan"), r"scale_factor=nan: must be a number, above 0"),
        ("scale_factor", True, r"scale_factor=True: must be a number"),
        ("scale_by_std", "no", r"scale_by_std='no': must be true or false"),
        ("loss_type", "huber", r"loss_type='huber': known are l1, l2; not imported"),
        ("image_size", -16, r"image_size=-16: must be a whole number, at least 0"),
        ("timesteps", 10**12, r"timesteps=1000000000000: must be a whole number, at least 1"),
        ("linear_start", 0.5, r"must satisfy 0 < beta_start <= beta_end"),
        ("unet_config.params.spatial_transformer_attn_type", "linear", r"attn_type='linear': known are softmax"),
        ("unet_config.params.model_channels", 0, r"model_channels=0: must be a whole number, at least 1"),
        ("unet_config.params.model_channels", 33, r"norm_groups=32 does not divide the 33 channels"),
        (
            "unet_config.params.channel_mult",
            [0, 32],
            r"channel_mult=\[0, 32\]: must be a list of whole numbers, at least",
        ),
        ("unet_config.params.use_spatial_transformer", "yes", "use_spatial_transformer='yes': must be true or false"),
        ("first_stage_config.params.ddconfig.resolution", 0, "resolution=0: must be a whole number, at least 1"),
        ("linear_end", "many", r"linear_end='many': must be a number"),
        ("image_size", 0, "for which resolution the model was trained; give --resolution"),
        ("cond_stage_config", "__is_first_stage__", "take masks of -1 and 1 and black holes"),
        ("cond_stage_config", {"target": "ldm.modules.encoders.modules.FrozenT5Embedder"}, "expected crossattn"),
        ("cond_stage_config", {"target": "torch.nn.Identity"}, "the UNet takes 4 channels, 4 of the latents"),
    ],
)
def test_configurations_that_ours_are_not(folder: Path, path: str, value: Any, message: str) -> None:
    reconfigured(folder, path, value)
    with pytest.raises(CheckpointError, match=message):
        read_compvis(folder, NONE)


def test_numbers_that_yaml_reads_as_text(folder: Path) -> None:
    reconfigured(folder, "linear_start", "85e-5")
    artifact = read_compvis(folder, NONE).artifact
    assert isinstance(artifact, DiffusionArtifact)
    assert artifact.diffusion.beta_start == 0.00085


def test_the_users_word_stands_above_the_yaml(folder: Path) -> None:
    artifact = read_compvis(folder, ImportOptions(prediction="v", resolution=64)).artifact
    assert isinstance(artifact, DiffusionArtifact)
    assert (artifact.diffusion.prediction, artifact.provenance["resolution"]) == ("v", 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ImportOptions(num_classes=3), "--num-classes 3: this model has no use for it"),
        (ImportOptions(vocabulary=Path("vocab.txt")), r"--vocabulary vocab\.txt: this model has no use for it"),
    ],
)
def test_options_without_a_use_are_refused(folder: Path, options: ImportOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_compvis(folder, options)


def test_a_resolution_that_latents_do_not_divide(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="a resolution of 33 does not divide by the autoencoder's f=2"):
        read_compvis(folder, ImportOptions(resolution=33))


def exported(folder: Path, kind: str) -> Path:
    fill_compvis_folder(folder, second_stage(*KINDS[kind]))
    (folder / "ldm_scale.json").unlink()
    return folder


def test_classes_without_a_row_for_none(tmp_path: Path) -> None:
    folder = exported(tmp_path, "classes")
    with pytest.raises(CheckpointError, match=r"has 8 rows.* give --num-classes 7 if it does, 8 if not"):
        read_compvis(folder, NONE)
    with pytest.raises(CheckpointError, match=r"--num-classes 5: .* has 8 rows"):
        read_compvis(folder, ImportOptions(num_classes=5))
    artifact = read_compvis(folder, ImportOptions(num_classes=8)).artifact
    assert isinstance(artifact, DiffusionArtifact)
    assert artifact.conditioning.classes is not None
    # "No class" was never trained: no guidance from it.
    assert artifact.conditioning.classes.drop_probability == 0.0
    table = artifact.state["conditioner.classes.embedding.weight"]
    assert table.shape == (9, 16)
    assert not table[-1].any()


def test_conditioning_that_has_to_be_said_or_differs(tmp_path: Path) -> None:
    folder = exported(tmp_path, "layout")
    with pytest.raises(CheckpointError, match="how many of the 30 they are; give --num-classes"):
        read_compvis(folder, NONE)
    folder = exported(tmp_path, "semantic map")
    reconfigured(folder, "cond_stage_config.params.n_stages", 2)
    with pytest.raises(CheckpointError, match=r"1 bilinear halvings at f=2, not 2 by bilinear"):
        read_compvis(folder, NONE)
    reconfigured(folder, "conditioning_key", "crossattn")
    with pytest.raises(CheckpointError, match="conditioning_key='crossattn' with SpatialRescaler: expected concat"):
        read_compvis(folder, NONE)


def alone(folder: Path, config: AutoencoderConfig) -> Path:
    fill_compvis_folder(folder, first_stage(config))
    (folder / "config.yaml").unlink()
    return folder / "model.ckpt"


@pytest.mark.parametrize("config", [AUTOENCODER, VQ])
def test_an_autoencoder_shows_what_it_is(tmp_path: Path, config: AutoencoderConfig) -> None:
    path = alone(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"has no YAML beside it, .* --resolution PIXELS"):
        read_compvis(path, NONE)
    with pytest.raises(ConfigError, match="--prediction v: an autoencoder has no use for it"):
        read_compvis(path, ImportOptions(resolution=32, prediction="v"))
    artifact = read_compvis(path, ImportOptions(resolution=32)).artifact
    assert isinstance(artifact, Artifact)
    assert artifact.config == config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoder.down.0.block.0.conv2.weight", None, r"conv2\.weight is missing in .*model\.ckpt, though"),
        ("encoder.conv_in.weight", torch.zeros(3), r"conv_in\.weight has the shape \(3,\) .* must have 4 dimensions"),
        ("encoder.conv_in.weight", torch.zeros(0, 3, 3, 3), r"has the shape \(0, 3, 3, 3\)"),
        ("decoder.conv_out.weight", None, r"decoder\.conv_out\.weight is missing"),
        ("quantize.embedding.weight", torch.zeros(()), r"embedding\.weight has the shape \(\)"),
    ],
)
def test_an_autoencoder_that_does_not_show_what_it_is(
    tmp_path: Path, name: str, value: Tensor | None, message: str
) -> None:
    alone(tmp_path, AUTOENCODER)
    with pytest.raises(CheckpointError, match=message):
        read_compvis(changed(tmp_path, {name: value}), ImportOptions(resolution=32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, r"config\.json: hidden_act='relu': text encoders here have gelu, quick_gelu"),
        ({"layer_norm_eps": 1e-6}, r"layer_norm_eps=1e-06: text encoders here have 1e-05"),
        ({"intermediate_size": 48}, r"intermediate_size=48: text encoders here have 64"),
        ({"num_attention_heads": 0}, r"num_attention_heads=0: must be a whole number, at least 1"),
        ({"text_config": {"hidden_act": "tanh"}}, r"hidden_act='tanh': text encoders here have"),
    ],
)
def test_a_text_tower_that_ours_is_not(text_folder: Path, change: dict[str, Any], message: str) -> None:
    path = text_folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        read_compvis(text_folder, NONE)


def test_captions_of_another_length_are_refused(text_folder: Path) -> None:
    reconfigured(text_folder, "cond_stage_config.params.max_length", 50)
    with pytest.raises(CheckpointError, match=r"max_length=50: the checkpoint has 77 positions"):
        read_compvis(text_folder, NONE)
    reconfigured(text_folder, "cond_stage_config.params.max_length", 77)
    assert isinstance(read_compvis(text_folder, NONE).artifact, DiffusionArtifact)


def test_other_models_need_their_yaml(folder: Path) -> None:
    (folder / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match="no tensor shows the attention heads of other models; give --config"):
        read_compvis(folder, NONE)
    torch.save({"weight": torch.zeros(1)}, folder / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"holds neither a UNet .* nor an autoencoder"):
        read_compvis(folder, NONE)


@pytest.mark.parametrize("experiment", ["sd1", "sd2"])
def test_stable_diffusion_is_recognised_by_its_tensors(experiment: str) -> None:
    """On the meta device; the text encoder of the second with the block that is not read."""
    config = load_config([f"experiment={experiment}"])
    with torch.device("meta"):
        network = LatentDiffusion(config.unet, config.conditioning, 4)
        first = Autoencoder(config.autoencoder)
    state = dict(
        to_theirs(
            network.state_dict(), unet_places(written_unet(config.unet)) | conditioner_places(config.conditioning)
        )
    )
    if experiment == "sd2":
        state["cond_stage_model.model.token_embedding.weight"] = torch.empty(49408, 1024)
        state.pop("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight")
        with pytest.raises(CheckpointError, match=r"of Stable Diffusion 2, whose checkpoints predict eps .* or v"):
            inferred_model(state, "x.ckpt", None, 768)
    state |= to_theirs(first.state_dict(), autoencoder_places(config.autoencoder, FIRST_STAGE))
    prediction, resolution = ("v", 768) if experiment == "sd2" else (None, None)
    params = Section(inferred_model(state, "x.ckpt", prediction, resolution), "model").section("params")
    assert unet_config(params.section("unet_config")) == config.unet
    diffusion = diffusion_config(params)
    assert (diffusion.beta_start, diffusion.beta_end) == (0.00085, 0.012)
    assert diffusion.prediction == (prediction or "eps")
    assert params.get("image_size") * 8 == (resolution or 512)
