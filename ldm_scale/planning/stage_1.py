"""Stage 1's micro-batch on the meta device: autoencoder, perceptual net and discriminator, as training has them.

What is computed is what `training/autoencoder_step.py` computes once the discriminator is felt, with the values that a
step only reports left out: a forward pass, the losses' gradients at the pixels, their weights' ratio at the last
convolution, the backward pass, and the discriminator's own. `tests/unit/planning/test_stage_1.py` holds FLOPs and
memory against that step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import grad

from ldm_scale.config.schema import AutoencoderLossConfig, Config, Recomputation
from ldm_scale.models.autoencoder import AutoencoderOutput, kl_divergence
from ldm_scale.models.build import build_autoencoder
from ldm_scale.models.discriminator import PatchDiscriminator, discriminator_loss, generator_loss, gradient_penalty
from ldm_scale.models.perceptual import PerceptualLoss, shapes_of_perceptual
from ldm_scale.planning.meta_step import MetaStep, Phase

_conv2d_weight: Callable[..., Tensor] = grad.conv2d_weight  # torch gives it no types


def has_adversary(config: Config) -> bool:
    """Whether the run comes to feel its discriminator."""
    loss = config.autoencoder_loss
    return loss.adversarial_weight > 0 and loss.discriminator_start_images < config.train.total_images


def make_discriminator(loss: AutoencoderLossConfig) -> PatchDiscriminator:
    """The network of `autoencoder_loss`, on the current default device."""
    return PatchDiscriminator(loss.discriminator_base_channels, loss.discriminator_layers, norm=loss.discriminator_norm)


@functools.cache
def perceptual_net(loss: AutoencoderLossConfig) -> PerceptualLoss | None:
    """On the meta device, whether or not its weights are here; None where nothing is compared by one."""
    return shapes_of_perceptual(loss) if loss.perceptual_weight else None


def autoencoder_step(config: Config, micro_batch: int, dtype: torch.dtype, recomputed: Recomputation) -> MetaStep:
    """The autoencoder and a micro-batch through it."""
    loss, resolution = config.autoencoder_loss, config.data.resolution
    with torch.device("meta"):
        network = build_autoencoder(config.autoencoder)
        if loss.learned_variance:
            network.learn_output_variance()
        network.checkpoint_activations(recomputed)
        if network.quantizer is not None:
            # The kernel's search is one operation. Plain torch's are as many as images ask for, and keep nothing.
            network.quantizer.backend = "triton"
        network = network.to(dtype).train()
        discriminator = make_discriminator(loss).to(dtype) if has_adversary(config) else None
        x = torch.empty(micro_batch, 3, resolution, resolution)
        side = resolution // config.autoencoder.downsampling_factor
        noise = torch.empty(micro_batch, config.autoencoder.latent_channels, side, side)
    perceptual = perceptual_net(loss)

    def run(begins: Callable[[Phase], None]) -> None:
        output = AutoencoderOutput(*network(x.to(dtype), noise.to(dtype)))
        begins("losses")
        dy = _output_gradient(output, x, loss, perceptual, discriminator)
        begins("backward")
        torch.autograd.backward((output.reconstruction.float() * dy).sum() + _regularization(output, loss))
        if discriminator is not None:
            begins("discriminator")
            _train_discriminator(discriminator, x, output.reconstruction.detach(), loss)

    return MetaStep(network, run)


def _output_gradient(
    output: AutoencoderOutput,
    x: Tensor,
    loss: AutoencoderLossConfig,
    perceptual: PerceptualLoss | None,
    discriminator: nn.Module | None,
) -> Tensor:
    """Of all losses at the decoder's output, (B, 3, H, W)."""
    y = output.reconstruction.detach().float().requires_grad_()
    total = (y - x).abs().mean() if loss.reconstruction == "l1" else (y - x).square().mean()
    if loss.chroma_weight:
        total = total + ((y - x) - (y - x).mean(dim=1, keepdim=True)).square().mean()
    if perceptual is not None:
        total = total + perceptual(y, x).mean()
    (reconstruction,) = torch.autograd.grad(total, y)
    if discriminator is None:
        return reconstruction
    logits = discriminator(y.to(output.reconstruction.dtype)).float()
    (adversarial,) = torch.autograd.grad(generator_loss(logits, loss.adversarial_loss), y)
    features = output.last_features.detach().float()
    shape = (3, features.shape[1], 3, 3)
    pair = [_conv2d_weight(features, shape, dy, padding=1) for dy in (reconstruction, adversarial)]
    weight: Tensor = pair[0].norm() / pair[1].norm()
    return reconstruction + weight * adversarial


def _regularization(output: AutoencoderOutput, loss: AutoencoderLossConfig) -> Tensor:
    """Of the latents, and what gives every parameter a gradient."""
    learned = torch.zeros((), device="meta") if output.output_logvar is None else output.output_logvar.float().sum()
    if output.logvar is not None:
        return kl_divergence(output.mean.float(), output.logvar.float()).mean() + learned
    assert output.codes is not None, "a VQ autoencoder returns codes"
    z_raw, codes = output.mean.float(), output.codes.float()
    commitment = (z_raw - codes.detach()).square().mean()
    if loss.codebook_update == "ema":
        return commitment + 0.0 * codes.sum() + learned
    return commitment + (codes - z_raw.detach()).square().mean() + learned


def _train_discriminator(network: nn.Module, x: Tensor, y: Tensor, loss: AutoencoderLossConfig) -> None:
    """Nothing, after its forward and backward pass; real and fake images go through it side by side."""
    x = x.to(y.dtype)
    if loss.r1_weight:
        x = x.detach().requires_grad_()
    if loss.discriminator_norm == "batch":
        real, fake = network(x).float(), network(y).float()
    else:
        real, fake = network(torch.cat([x, y])).float().chunk(2)
    total = discriminator_loss(real, fake, loss.adversarial_loss)
    if loss.r1_weight:
        total = total + gradient_penalty(real, x)
    torch.autograd.backward(total)
    # Reduced and let go before the next micro-batch, as at ZeRO's stage 1; at stage 0 they are small.
    for parameter in network.parameters():
        parameter.grad = None
