"""The trained model of stage 2: the UNet and tau_theta as one module, so that one engine shards both; its sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ldm_scale.conditioning.base import Conditioned, Inputs
from ldm_scale.conditioning.build import build_conditioner
from ldm_scale.conditioning.windows import UNetCall
from ldm_scale.config.schema import ConditioningConfig, SamplingConfig, UNetConfig
from ldm_scale.diffusion.guidance import Denoiser, classifier_free_guidance
from ldm_scale.diffusion.process import Process
from ldm_scale.diffusion.sampler import ImageNoise, Start, sample
from ldm_scale.models.build import build_unet


class LatentDiffusion(nn.Module):
    """The denoiser of z_t given t and tau_theta(y) (arXiv:2112.10752, eq. 3)."""

    def __init__(self, unet: UNetConfig, conditioning: ConditioningConfig, latent_channels: int) -> None:
        super().__init__()
        self.conditioner = build_conditioner(conditioning, latent_channels)
        in_channels = latent_channels + self.conditioner.spatial_channels
        self.unet = build_unet(unet, in_channels, latent_channels, self.conditioner.context_dim)

    def forward(self, z: Tensor, t: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The network's output for noised latents.

        Shapes: z (B, c, h, w), t (B,) as of `Process.network_time`, inputs one row per image; returns z's shape.
        """
        conditioned = self.conditioner(inputs, (z.shape[2], z.shape[3]))
        return self.unet(with_spatial(z, conditioned), t, conditioned.context)  # type: ignore[no-any-return]


def with_spatial(z: Tensor, conditioned: Conditioned) -> Tensor:
    """The UNet's input: latents, and the spatial conditioning behind them. Shapes: (B, c, h, w) to (B, c + C, h, w)."""
    if conditioned.spatial is None:
        return z
    return torch.cat([z, conditioned.spatial.to(z.dtype)], dim=1)


def conditional_denoiser(
    model: LatentDiffusion, process: Process, inputs: Inputs, size: tuple[int, int], unet: UNetCall | None = None
) -> Denoiser:
    """The model given fixed inputs: (z_t, t) -> its output in fp32. tau_theta runs once, now.

    `unet` replaces the model's own, such as by one that works in tiles.
    Shapes: inputs one row per image; size (h, w) of the latents.
    """
    call: UNetCall = model.unet if unet is None else unet
    dtype = model.unet.conv_in.weight.dtype
    conditioned = model.conditioner(in_type(inputs, dtype), size)

    def denoise(z_t: Tensor, t: Tensor) -> Tensor:
        z = with_spatial(process.network_input(z_t, t).to(dtype), conditioned)
        return call(z, process.network_time(t), conditioned.context).float()

    return denoise


def guided_denoiser(
    model: LatentDiffusion,
    process: Process,
    inputs: Inputs,
    size: tuple[int, int],
    sampling: SamplingConfig,
    null_inputs: Inputs | None = None,
    unet: UNetCall | None = None,
) -> Denoiser:
    """The model under classifier-free guidance as `sampling` sets it.

    `null_inputs` is the other branch's (a negative prompt, for example); None: that of `Conditioner.null_inputs`. Both
    branches run as one batch of twice the size. A model that was never trained without its conditioning has no
    unconditional branch of its own, and is not guided.
    """
    scale = sampling.guidance_scale if null_inputs is not None or can_be_guided(model) else 1.0
    if null_inputs is None:
        null_inputs = model.conditioner.null_inputs(inputs)
    conditional = conditional_denoiser(model, process, inputs, size, unet)
    if scale == 1.0:
        return conditional
    unconditional = conditional_denoiser(model, process, null_inputs, size, unet)
    stacked = {name: torch.cat([given, null_inputs[name]]) for name, given in inputs.items()}
    both = conditional_denoiser(model, process, stacked, size, unet)

    def paired(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        given, null = both(torch.cat([z_t, z_t]), torch.cat([t, t])).chunk(2)
        return given, null

    return classifier_free_guidance(
        conditional,
        unconditional,
        process,
        scale=scale,
        rescale=sampling.guidance_rescale,
        interval=sampling.guidance_interval,
        paired=paired,
    )


def can_be_guided(model: LatentDiffusion) -> bool:
    """Whether the model was trained without some of its conditioning too."""
    return any(condition.drop_probability > 0 for condition in model.conditioner.conditions.values())


@torch.no_grad()
def sample_latents(
    model: LatentDiffusion,
    process: Process,
    inputs: Inputs,
    noise: ImageNoise,
    sampling: SamplingConfig,
    progress: Callable[[int], None] | None = None,
    *,
    null_inputs: Inputs | None = None,
    unet: UNetCall | None = None,
    guide: Callable[[Denoiser], Denoiser] | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
    start: Start | None = None,
) -> Tensor:
    """Latents for prepared inputs; latent i depends on its own row and `noise.seeds[i]` alone.

    `null_inputs` and `unet` as of `guided_denoiser`; `guide` is put around the denoiser, outside of that guidance;
    `observe` and `start` as of `sample`.
    Shapes: inputs as many rows as `noise` has seeds; returns (B, c, h, w) in fp32.
    """
    size = (noise.shape[1], noise.shape[2])
    denoiser = guided_denoiser(model, process, inputs, size, sampling, null_inputs, unet)
    return sample(
        denoiser if guide is None else guide(denoiser),
        noise.initial(),
        process,
        sampler=sampling.sampler,
        num_steps=sampling.num_steps,
        eta=sampling.eta,
        step_noise=noise.step,
        progress=progress,
        observe=observe,
        start=start,
    )


def in_type(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> Inputs:
    """Inputs whose floating tensors have that type."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
