"""How fast this machine would train two experiments, measured in a few seconds without data or engines."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.schema import Config
from ldm_scale.models.build import build_autoencoder
from ldm_scale.models.discriminator import PatchDiscriminator
from ldm_scale.models.perceptual import build_perceptual

STEPS = 5
# Optimizer, EMA, loader, metrics, validation and start-up, as a share of the forward and backward passes measured here.
OVERHEAD = 1.3


def images_per_s(autoencoder: Config, diffusion: Config) -> tuple[float, float]:
    """Images/s of the two trainings on the device that they would choose."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _autoencoder_rate(autoencoder, device), _diffusion_rate(diffusion, device)


def _autoencoder_rate(config: Config, device: torch.device) -> float:
    network = build_autoencoder(config.autoencoder).to(device)
    loss = config.autoencoder_loss
    perceptual = build_perceptual(loss).to(device) if loss.perceptual_weight else None
    discriminator = PatchDiscriminator(loss.discriminator_base_channels, loss.discriminator_layers).to(device)
    batch, side = config.train.global_batch, config.data.resolution
    latent_side = side // config.autoencoder.downsampling_factor
    x = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    noise = torch.randn(batch, config.autoencoder.latent_channels, latent_side, latent_side, device=device)

    def reconstruct() -> None:
        y = network(x, noise)[0]
        value = (y - x).abs().mean()
        (value if perceptual is None else value + perceptual(y, x).mean()).backward()

    def discriminate() -> None:
        discriminator(x.clone().requires_grad_()).mean().backward()
        discriminator(torch.cat([x, x])).mean().backward()

    seconds = _seconds(reconstruct, device)
    if loss.adversarial_weight > 0:
        felt = max(0.0, 1.0 - loss.discriminator_start_images / config.train.total_images)
        seconds += felt * _seconds(discriminate, device)
    return batch / (seconds * OVERHEAD)


def _diffusion_rate(config: Config, device: torch.device) -> float:
    channels = config.autoencoder.latent_channels
    network = LatentDiffusion(config.unet, config.conditioning, channels).to(device)
    autoencoder = build_autoencoder(config.autoencoder).to(device)
    batch, side = config.train.global_batch, config.data.resolution
    x = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    size = (side // config.autoencoder.downsampling_factor,) * 2
    with device:
        t, inputs = torch.zeros(batch, dtype=torch.int64), network.conditioner.example(batch, size)

    def step() -> None:
        with torch.no_grad():
            z: Tensor = autoencoder.encode(x)
        network(z, t, inputs).square().mean().backward()

    return batch / (_seconds(step, device) * OVERHEAD)


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    """Median duration of a step, after one that is not counted."""
    durations = []
    for _ in range(STEPS + 1):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - started)
    return sorted(durations[1:])[STEPS // 2]
