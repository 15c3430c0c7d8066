"""The paper's text encoder with WordPiece as diffusers' LDMTextToImagePipeline: there, drawn with, and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LDMTextToImagePipeline
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import BertTokenizer

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.conditioning.text import TextCondition
from ldm_scale.config.schema import (
    AutoencoderConfig,
    ConditioningConfig,
    DiffusionConfig,
    SamplingConfig,
    TextConditioningConfig,
    UNetConfig,
)
from ldm_scale.diffusion.sampler import ImageNoise
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.artifact import DiffusionArtifact, make_artifact, make_diffusion_artifact
from ldm_scale.interchange.diffusers import fill_diffusers_folder
from ldm_scale.interchange.load import LoadedDiffusion, read_source
from ldm_scale.interchange.name_maps import text_encoder_names, translate
from ldm_scale.interchange.publish import publish
from ldm_scale.interchange.text_encoder import published as published_names
from ldm_scale.models.autoencoder import Autoencoder, LatentStatistics
from tests.helpers.weights import random_state

# The pipeline fixes f = 8, so four levels.
KL = AutoencoderConfig(
    base_channels=4, channel_multipliers=(1, 1, 1, 2), num_res_blocks=1, latent_channels=3, norm_groups=2
)
VQ = dataclasses.replace(KL, kind="vq", codebook_size=20)
UNET = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), head_dim=8, norm_groups=4
)
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "##s", "!", "on", "grinning", "face")
CAPTIONS = ["A red apple!", "grinning apples on a table", ""]


@pytest.fixture
def text(tmp_path: Path) -> TextConditioningConfig:
    (tmp_path / "words.txt").write_text("\n".join(WORDS) + "\n")
    return TextConditioningConfig(
        encoder="bert",
        tokenizer="wordpiece",
        vocabulary=str(tmp_path / "words.txt"),
        vocab_size=len(WORDS),
        width=16,
        depth=2,
        num_heads=2,
        head_dim=6,
    )


def make_model(
    text: TextConditioningConfig,
    autoencoder: AutoencoderConfig = KL,
    statistics: LatentStatistics = LatentStatistics(scale=0.7, num_images=4),  # noqa: B008 (frozen)
) -> DiffusionArtifact:
    conditioning = ConditioningConfig(text=text)
    first = make_artifact(random_state(Autoencoder(autoencoder)), autoencoder, statistics, {"resolution": 32})
    return make_diffusion_artifact(
        random_state(LatentDiffusion(UNET, conditioning, autoencoder.latent_channels)),
        first,
        unet=UNET,
        conditioning=conditioning,
        diffusion=DiffusionConfig(),
        sampling=SamplingConfig(num_steps=10, guidance_scale=3.0, sampler="ddim", eta=0.0),
        provenance={"resolution": 32},
    )


def test_the_export_is_verified_and_comes_back(tmp_path: Path, text: TextConditioningConfig) -> None:
    artifact = make_model(text)
    published = publish(artifact, "diffusers", tmp_path / "out")
    assert published.differences["text encoder"] < 1e-4
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "LDMTextToImagePipeline"
    assert index["bert"] == ["latent_diffusion", "LDMBertModel"]
    back = read_source(tmp_path / "out")
    assert back.content_hash == artifact.content_hash
    assert all(torch.equal(back.state[name], tensor) for name, tensor in artifact.state.items())


def test_ldm_bert_gives_our_context(tmp_path: Path, text: TextConditioningConfig) -> None:
    artifact = make_model(text)
    fill_diffusers_folder(tmp_path, artifact)
    model: Any = LDMBertModel.from_pretrained(tmp_path / "bert").eval()
    tokenizer: Any = BertTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = model(ids)[0]
    ours = LoadedDiffusion(artifact).encode_conditioning(CAPTIONS)
    assert isinstance(ours, torch.Tensor)
    assert (theirs - ours).norm() < 1e-5 * ours.norm()


def test_the_papers_encoder_fills_the_released_models_layout() -> None:
    paper = TextConditioningConfig(encoder="bert", vocab_size=30522, width=1280, depth=32, num_heads=8, head_dim=64)
    with torch.device("meta"):
        ours, theirs = TextCondition(paper).state_dict(), LDMBertModel(LDMBertConfig())
    target = published_names(theirs.state_dict(), LDMBertModel)
    assert translate(ours, text_encoder_names(paper), target, "x").keys() == target.keys()
    assert theirs.state_dict().keys() - target.keys() == {"to_logits.weight", "to_logits.bias"}


@pytest.mark.parametrize("autoencoder", [KL, VQ], ids=["kl", "vq"])
def test_the_pipeline_draws_our_images(
    tmp_path: Path, text: TextConditioningConfig, autoencoder: AutoencoderConfig
) -> None:
    artifact = make_model(text, autoencoder)
    fill_diffusers_folder(tmp_path, artifact)
    pipeline: Any = LDMTextToImagePipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    seeds = (5, 6, 7)
    theirs = pipeline(
        CAPTIONS,
        num_inference_steps=10,
        guidance_scale=3.0,
        latents=ImageNoise(seeds, (3, 4, 4)).initial(),
        output_type="pt",
    ).images
    ours = LoadedDiffusion(artifact).sample(CAPTIONS, seeds)
    assert theirs.std() > 0.01
    assert torch.allclose(theirs * 2 - 1, ours, atol=1e-3)


@pytest.mark.parametrize("encoder", ["clip", "bert"])
@pytest.mark.parametrize("tokenizer", ["clip", "wordpiece"])
def test_either_tokenizer_goes_with_either_encoder(
    tmp_path: Path, text: TextConditioningConfig, encoder: Any, tokenizer: Any
) -> None:
    changes: dict[str, Any] = {"encoder": encoder, "tokenizer": tokenizer}
    if encoder == "clip":
        changes["head_dim"] = None
    if tokenizer == "clip":
        changes |= {"vocab_size": 49408, "vocabulary": None}
    published = publish(make_model(dataclasses.replace(text, **changes)), "diffusers", tmp_path / "out")
    assert published.differences["text encoder"] < 1e-4


@pytest.mark.parametrize(
    ("changes", "autoencoder", "statistics", "message"),
    [
        ({"max_tokens": 12}, KL, LatentStatistics(), r"conditioning\.text\.max_tokens=12: LDMTextToImagePipeline.*77"),
        (
            {},
            dataclasses.replace(KL, channel_multipliers=(1, 1, 2)),
            LatentStatistics(),
            r"the autoencoder's f=4: LDMTextToImagePipeline.*fixes it at 8",
        ),
        ({}, KL, LatentStatistics(shift=0.1), r"latent_statistics\.shift=0\.1: LDMTextToImagePipeline only scales"),
        ({"encoder": "clip", "head_dim": None}, VQ, LatentStatistics(), r"autoencoder\.kind=vq: StableDiffusion"),
    ],
)
def test_what_the_pipelines_fix_is_refused(
    tmp_path: Path,
    text: TextConditioningConfig,
    changes: dict[str, Any],
    autoencoder: AutoencoderConfig,
    statistics: LatentStatistics,
    message: str,
) -> None:
    artifact = make_model(dataclasses.replace(text, **changes), autoencoder, statistics)
    with pytest.raises(CheckpointError, match=message):
        publish(artifact, "diffusers", tmp_path / "out")


@pytest.mark.parametrize("target", ["diffusers", "safetensors"])
def test_a_model_takes_its_vocabulary_along(tmp_path: Path, text: TextConditioningConfig, target: Any) -> None:
    artifact = make_model(text)
    publish(artifact, target, tmp_path / "out")
    expected = LoadedDiffusion(artifact).encode_conditioning(CAPTIONS)
    (tmp_path / "words.txt").unlink()
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    back = read_source(tmp_path / "elsewhere")
    assert isinstance(back, DiffusionArtifact)
    assert back.content_hash == artifact.content_hash
    found = LoadedDiffusion(back).encode_conditioning(CAPTIONS)
    assert isinstance(found, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    assert torch.equal(found, expected)
    publish(back, "safetensors", tmp_path / "again")
    assert (tmp_path / "again" / "vocab.txt").read_text().split() == list(WORDS)


def test_a_lost_vocabulary_is_one_line(tmp_path: Path, text: TextConditioningConfig) -> None:
    artifact = make_model(text)
    (tmp_path / "words.txt").unlink()
    with pytest.raises(ConfigError, match=r"words\.txt: conditioning\.text\.tokenizer=wordpiece needs the vocab\.txt"):
        publish(artifact, "diffusers", tmp_path / "out")
