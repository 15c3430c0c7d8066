"""Our models, exported, compute in diffusers and transformers what they compute here (float32, random weights)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, VQModel
from torch import Tensor
from transformers import CLIPTextModel

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.conditioning.tokenizers import clip_tokenizer
from ldm_scale.config.schema import (
    AutoencoderConfig,
    ConditioningConfig,
    DiffusionConfig,
    SamplingConfig,
    TextConditioningConfig,
    UNetConfig,
)
from ldm_scale.diffusion.sampler import ImageNoise
from ldm_scale.interchange.artifact import DiffusionArtifact, make_artifact, make_diffusion_artifact
from ldm_scale.interchange.diffusers import fill_diffusers_folder
from ldm_scale.interchange.load import LoadedAutoencoder, LoadedDiffusion
from ldm_scale.models.autoencoder import Autoencoder, LatentStatistics
from tests.helpers.weights import random_state

TOLERANCE = 1e-4  # of the outputs' norm

TINY_AUTOENCODER = AutoencoderConfig(
    base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4, norm_groups=4
)
TINY_UNET = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), head_dim=8, norm_groups=4
)
TINY_TEXT = TextConditioningConfig(width=16, depth=1, num_heads=2)

UNETS = {
    "sd1": (UNetConfig(base_channels=64, head_dim=None, num_heads=8, linear_projection=False), 4),
    "sd2": (UNetConfig(base_channels=64, head_dim=64, linear_projection=True), 4),
    "three levels": (
        UNetConfig(
            base_channels=16,
            channel_multipliers=(1, 3, 2),
            num_res_blocks=1,
            attention_levels=(1,),
            transformer_depth=2,
            head_dim=8,
            linear_projection=False,
            norm_groups=4,
        ),
        5,
    ),
    "attention in the middle only": (
        UNetConfig(
            base_channels=12,
            channel_multipliers=(1, 2),
            num_res_blocks=3,
            attention_levels=(),
            head_dim=None,
            num_heads=3,
            norm_groups=6,
        ),
        1,
    ),
    "attention at the ends, one head dimension": (
        UNetConfig(
            base_channels=8,
            channel_multipliers=(1, 1, 4),
            num_res_blocks=2,
            attention_levels=(0, 2),
            head_dim=8,
            norm_groups=8,
        ),
        3,
    ),
    "one level": (
        UNetConfig(
            base_channels=16,
            channel_multipliers=(1,),
            num_res_blocks=1,
            attention_levels=(0,),
            head_dim=4,
            norm_groups=2,
        ),
        4,
    ),
}
AUTOENCODERS = {
    "kl_f8": AutoencoderConfig(base_channels=32),
    "odd": AutoencoderConfig(
        base_channels=12, channel_multipliers=(1, 3, 2), num_res_blocks=1, latent_channels=5, norm_groups=4
    ),
    "no attention": AutoencoderConfig(
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=3,
        latent_channels=1,
        norm_groups=2,
        mid_attention=False,
    ),
    "attention on levels": AutoencoderConfig(
        base_channels=8,
        channel_multipliers=(1, 2, 1),
        num_res_blocks=2,
        latent_channels=2,
        norm_groups=4,
        attention_levels=(0, 2),
    ),
    "f1": AutoencoderConfig(base_channels=8, channel_multipliers=(1,), num_res_blocks=1, norm_groups=8),
}
PER_CHANNEL = LatentStatistics(channel_mean=(0.4, -2.0, 0.0, 1.0), channel_std=(3.0, 0.5, 1.0, 2.0))
VQ_AUTOENCODERS = {
    "vq_f8": AutoencoderConfig(
        kind="vq",
        base_channels=32,
        channel_multipliers=(1, 2, 2, 4),
        latent_channels=4,
        codebook_size=300,
        attention_levels=(3,),
    ),
    "no attention": AutoencoderConfig(
        kind="vq",
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        latent_channels=1,
        norm_groups=2,
        mid_attention=False,
        codebook_size=1,
    ),
    "attention on levels alone": AutoencoderConfig(
        kind="vq",
        base_channels=8,
        channel_multipliers=(1, 3),
        num_res_blocks=1,
        latent_channels=6,
        norm_groups=4,
        mid_attention=False,
        attention_levels=(0, 1),
        codebook_size=50,
    ),
}
TEXT_ENCODERS = {
    "quick_gelu": TextConditioningConfig(width=24, depth=2, num_heads=3, activation="quick_gelu"),
    "gelu": TextConditioningConfig(width=64, depth=3, num_heads=1, activation="gelu", max_tokens=20),
}


def make_model(
    unet: UNetConfig = TINY_UNET,
    autoencoder: AutoencoderConfig = TINY_AUTOENCODER,
    text: TextConditioningConfig = TINY_TEXT,
    statistics: LatentStatistics = LatentStatistics(scale=0.3),  # noqa: B008 (frozen)
) -> DiffusionArtifact:
    first = make_artifact(random_state(Autoencoder(autoencoder)), autoencoder, statistics, {"resolution": 32})
    conditioning = ConditioningConfig(text=text)
    return make_diffusion_artifact(
        random_state(LatentDiffusion(unet, conditioning, autoencoder.latent_channels)),
        first,
        unet=unet,
        conditioning=conditioning,
        diffusion=DiffusionConfig(),
        sampling=SamplingConfig(),
        provenance={"resolution": 32},
    )


def relative_difference(theirs: Tensor, ours: Tensor) -> float:
    assert theirs.shape == ours.shape
    assert ours.norm() > 0.1, "an output near zero proves nothing"
    return float((theirs - ours).norm() / ours.norm())


def opened(model_class: Any, folder: Path) -> Any:
    """A model from an exported folder, with a place for every tensor and a tensor for every place."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("name", UNETS)
def test_unet(name: str, tmp_path: Path) -> None:
    config, latent_channels = UNETS[name]
    first = AutoencoderConfig(
        base_channels=4, channel_multipliers=(1,), num_res_blocks=1, latent_channels=latent_channels, norm_groups=4
    )
    artifact = make_model(unet=config, autoencoder=first)
    fill_diffusers_folder(tmp_path, artifact)
    theirs = opened(UNet2DConditionModel, tmp_path / "unet")
    ours = LoadedDiffusion(artifact)
    # The values that the published files have.
    if name == "sd1":
        assert theirs.config.attention_head_dim == 8
    if name == "sd2":
        assert theirs.config.attention_head_dim == [1, 2, 4, 4]

    z = torch.randn(2, latent_channels, 8, 24)
    t = torch.tensor([3, 960])
    context = torch.randn(2, 7, TINY_TEXT.width)
    with torch.no_grad():
        assert relative_difference(theirs(z, t, context).sample, ours(z, t, context)) < TOLERANCE


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder(name: str, tmp_path: Path) -> None:
    config = AUTOENCODERS[name]
    artifact = make_artifact(
        random_state(Autoencoder(config)), config, LatentStatistics(shift=0.25, scale=0.3), {"resolution": 32}
    )
    fill_diffusers_folder(tmp_path, artifact)
    theirs = opened(AutoencoderKL, tmp_path)
    ours = Autoencoder(config).eval()
    ours.load_state_dict(artifact.state)
    ours.statistics = artifact.statistics

    x = torch.rand(2, 3, 16, 40) * 2 - 1
    f = config.downsampling_factor
    z = torch.randn(2, config.latent_channels, 16 // f, 40 // f)
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        mean, logvar = ours.encode_moments(x)
        assert relative_difference(posterior.mean, mean) < TOLERANCE
        assert relative_difference(posterior.logvar, logvar) < TOLERANCE
        latents = (posterior.mode() - theirs.config.shift_factor) * theirs.config.scaling_factor
        assert relative_difference(latents, ours.encode(x)) < TOLERANCE
        raw = z / theirs.config.scaling_factor + theirs.config.shift_factor
        assert relative_difference(theirs.decode(raw).sample, ours.decode(z)) < TOLERANCE


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_with_statistics_per_channel(name: str, tmp_path: Path) -> None:
    """The raw latents of the exported model are our latents: other programs have nothing to convert."""
    config = AUTOENCODERS[name]
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(config.latent_channels, generator=generator)
    std = torch.randn(config.latent_channels, generator=generator).exp()
    statistics = LatentStatistics(channel_mean=tuple(mean.tolist()), channel_std=tuple(std.tolist()))
    artifact = make_artifact(random_state(Autoencoder(config)), config, statistics, {"resolution": 32})
    fill_diffusers_folder(tmp_path, artifact)
    theirs = opened(AutoencoderKL, tmp_path)
    assert theirs.config.scaling_factor == 1.0
    assert theirs.config.shift_factor is None
    ours = LoadedAutoencoder(artifact)

    x = torch.rand(2, 3, 16, 40) * 2 - 1
    f = config.downsampling_factor
    z = torch.randn(2, config.latent_channels, 16 // f, 40 // f)
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        assert relative_difference(posterior.mode(), ours.encode(x)) < TOLERANCE
        assert relative_difference(posterior.mean + posterior.std * z, ours.encode(x, z)) < TOLERANCE
        assert relative_difference(theirs.decode(z).sample, ours.decode(z)) < TOLERANCE


@pytest.mark.parametrize("name", VQ_AUTOENCODERS)
def test_vq_autoencoder(name: str, tmp_path: Path) -> None:
    config = VQ_AUTOENCODERS[name]
    artifact = make_artifact(random_state(Autoencoder(config)), config, LatentStatistics(scale=0.5), {"resolution": 32})
    fill_diffusers_folder(tmp_path, artifact)
    theirs = opened(VQModel, tmp_path)
    assert theirs.config.scaling_factor == 0.5
    ours = LoadedAutoencoder(artifact)
    x = torch.rand(2, 3, 16, 40) * 2 - 1
    with torch.no_grad():
        latents = theirs.encode(x).latents
        assert relative_difference(latents * 0.5, ours.encode(x)) < TOLERANCE
        # Latents between the codes: both sides search, and find the same.
        assert relative_difference(theirs.decode(latents).sample, ours.decode(latents * 0.5)) < TOLERANCE


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_text_encoder(name: str, tmp_path: Path) -> None:
    config = TEXT_ENCODERS[name]
    artifact = make_model(text=config)
    fill_diffusers_folder(tmp_path, artifact)
    theirs = opened(CLIPTextModel, tmp_path / "text_encoder")
    captions = ["", "a cat", "one " * 100]
    with torch.no_grad():
        output = theirs(clip_tokenizer()(captions, config.max_tokens)[0]).last_hidden_state
    assert relative_difference(output, LoadedDiffusion(artifact).encode_conditioning(captions)) < TOLERANCE


@pytest.mark.parametrize("statistics", [LatentStatistics(scale=0.3), PER_CHANNEL], ids=["scalar", "per channel"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_pipeline_draws_our_images(tmp_path: Path, guidance_scale: float, statistics: LatentStatistics) -> None:
    """From captions to pixels: tokenizer, text encoder, guidance, scheduler, UNet, scaling and decoder at once."""
    artifact = make_model(statistics=statistics)
    fill_diffusers_folder(tmp_path, artifact)
    pipeline_class: Any = StableDiffusionPipeline
    pipeline = pipeline_class.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    captions, seeds = ["A red apple", "naïve café, it's 3 o'clock"], (5, 6)
    theirs = pipeline(
        captions,
        num_inference_steps=10,
        guidance_scale=guidance_scale,
        latents=ImageNoise(seeds, (4, 16, 16)).initial(),
        output_type="pt",
    ).images
    ours = LoadedDiffusion(artifact).sample(captions, seeds, num_steps=10, guidance_scale=guidance_scale, eta=0.0)
    assert theirs.std() > 0.05
    assert relative_difference(theirs * 2 - 1, ours) < TOLERANCE
