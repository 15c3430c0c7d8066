"""The schedulers that exports carry: StableDiffusionPipeline with them makes the latents that our sampler makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from ldm_scale.diffusion.guidance import Denoiser, classifier_free_guidance
from ldm_scale.diffusion.sampler import ImageNoise, sample
from ldm_scale.interchange.diffusers_scheduler import make_scheduler
from tests.helpers.processes import process_of

# diffusers ships no types for its constructors.
_UNet: Any = UNet2DConditionModel
_VAE: Any = AutoencoderKL
_Pipeline: Any = StableDiffusionPipeline

NOISE = ImageNoise((3, 4), (4, 8, 8))
CONTEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
NULL = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return _UNet(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
    ).eval()


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["eps", "v", "x0", "cosine_v", "zero_v", "zero_x0", "edm", "edm_half"])
def test_the_pipeline_makes_our_latents(kind: str, rescale: float, unet: Any) -> None:
    process = process_of(kind)

    def denoiser(context: Tensor) -> Denoiser:
        def denoise(z: Tensor, t: Tensor) -> Tensor:
            output: Tensor = unet(process.network_input(z, t), process.network_time(t), context).sample
            return output

        return denoise

    guided = classifier_free_guidance(denoiser(CONTEXT), denoiser(NULL), process, scale=3.0, rescale=rescale)
    sampler: Any = "euler" if kind.startswith("edm") else "ddim"
    ours = sample(guided, NOISE.initial(), process, sampler=sampler, num_steps=10)

    pipeline = _Pipeline(
        vae=_VAE(block_out_channels=(4,), norm_num_groups=2),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=make_scheduler(process.cfg),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=CONTEXT,
        negative_prompt_embeds=NULL,
        num_inference_steps=10,
        guidance_scale=3.0,
        guidance_rescale=rescale,
        latents=NOISE.initial(),
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
