"""Our models, exported, compute in diffusers and transformers what they compute here (float32, random weights)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.conditioning.text import tokenize
from ldm_scale.config.schema import (
    AutoencoderConfig,
    DiffusionConfig,
    SamplingConfig,
    TextConditioningConfig,
    UNetConfig,
)
from ldm_scale.diffusion.sampler import ImageNoise
from ldm_scale.interchange.artifact import DiffusionArtifact, make_artifact, make_diffusion_artifact
from ldm_scale.interchange.diffusers import fill_diffusers_folder
from ldm_scale.interchange.load import LoadedDiffusion
from ldm_scale.models.autoencoder import Autoencoder, LatentStatistics

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
    "f1": AutoencoderConfig(base_channels=8, channel_multipliers=(1,), num_res_blocks=1, norm_groups=8),
}
TEXT_ENCODERS = {
    "quick_gelu": TextConditioningConfig(width=24, depth=2, num_heads=3, activation="quick_gelu"),
    "gelu": TextConditioningConfig(width=64, depth=3, num_heads=1, activation="gelu", max_tokens=20),
}


def random_state(network: nn.Module) -> dict[str, Tensor]:
    """Weights of which none is zero: layers that start at zero would hide all others."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in network.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        state[name] = tensor + 0.1 * noise if tensor.ndim == 1 else noise / tensor[0].numel() ** 0.5
    return state


def make_model(
    unet: UNetConfig = TINY_UNET,
    autoencoder: AutoencoderConfig = TINY_AUTOENCODER,
    text: TextConditioningConfig = TINY_TEXT,
) -> DiffusionArtifact:
    first = make_artifact(
        random_state(Autoencoder(autoencoder)), autoencoder, LatentStatistics(scale=0.3), {"resolution": 32}
    )
    return make_diffusion_artifact(
        random_state(LatentDiffusion(unet, text, autoencoder.latent_channels)),
        first,
        unet=unet,
        conditioning=text,
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


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_text_encoder(name: str, tmp_path: Path) -> None:
    config = TEXT_ENCODERS[name]
    artifact = make_model(text=config)
    fill_diffusers_folder(tmp_path, artifact)
    theirs = opened(CLIPTextModel, tmp_path / "text_encoder")
    captions = ["", "a cat", "one " * 100]
    with torch.no_grad():
        output = theirs(tokenize(captions, config.max_tokens)).last_hidden_state
    assert relative_difference(output, LoadedDiffusion(artifact).encode_conditioning(captions)) < TOLERANCE


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_pipeline_draws_our_images(tmp_path: Path, guidance_scale: float) -> None:
    """From captions to pixels: tokenizer, text encoder, guidance, scheduler, UNet, scaling and decoder at once."""
    artifact = make_model()
    fill_diffusers_folder(tmp_path, artifact)
    pipeline_class: Any = StableDiffusionPipeline
    pipeline = pipeline_class.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    captions, seeds = ["A red apple", "naïve café, it's 3 o'clock"], (5, 6)
    theirs = pipeline(
        captions,
        num_inference_steps=2,
        guidance_scale=guidance_scale,
        latents=ImageNoise(seeds, (4, 16, 16)).initial(),
        output_type="pt",
    ).images
    ours = LoadedDiffusion(artifact).sample(captions, seeds, num_steps=2, guidance_scale=guidance_scale, eta=0.0)
    assert theirs.std() > 0.05
    assert relative_difference(theirs * 2 - 1, ours) < TOLERANCE
