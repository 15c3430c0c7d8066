"""The trained model of stage 2: the UNet and tau_theta as one module, so that one engine shards both; its sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm_scale.conditioning.build import build_conditioner
from ldm_scale.conditioning.text import tokenize
from ldm_scale.config.schema import SamplingConfig, TextConditioningConfig, UNetConfig
from ldm_scale.diffusion.guidance import guided
from ldm_scale.diffusion.sampler import ImageNoise, sample
from ldm_scale.diffusion.schedule import NoiseSchedule
from ldm_scale.models.build import build_unet


class LatentDiffusion(nn.Module):
    """epsilon_theta(z_t, t, tau_theta(y)) (arXiv:2112.10752, eq. 3)."""

    def __init__(self, unet: UNetConfig, conditioning: TextConditioningConfig, latent_channels: int) -> None:
        super().__init__()
        self.unet = build_unet(unet, latent_channels, latent_channels, conditioning.width)
        self.conditioner = build_conditioner(conditioning)

    def forward(self, z: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Prediction for noised latents. Shapes: z (B, c, H, W), t (B,), tokens (B, max_tokens); returns z's shape."""
        return self.unet(z, t, self.conditioner(tokens))  # type: ignore[no-any-return]


@torch.no_grad()
def sample_latents(
    model: LatentDiffusion,
    schedule: NoiseSchedule,
    tokens: Tensor,
    noise: ImageNoise,
    sampling: SamplingConfig,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents for tokenised captions; latent i depends on its own caption and `noise.seeds[i]` alone.

    Shapes: tokens (B, max_tokens), as many as `noise` has seeds; returns (B, c, H, W) in fp32.
    """
    dtype = model.unet.conv_in.weight.dtype
    null_tokens = tokenize([""], tokens.shape[1]).to(tokens.device)

    def denoise(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return model.unet(z.to(dtype), t, context).float()  # type: ignore[no-any-return]

    return sample(
        guided(denoise, model.conditioner(tokens), model.conditioner(null_tokens), sampling.guidance_scale),
        noise.initial(),
        schedule,
        sampler=sampling.sampler,
        num_steps=sampling.num_steps,
        eta=sampling.eta,
        step_noise=noise.step,
        progress=progress,
    )
