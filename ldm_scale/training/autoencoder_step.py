"""Stage 1: the autoencoder and its discriminator (arXiv:2112.10752, eq. 25), two ZeRO engines and one step counter.

The generator's gradient is put together at the decoder's output y. Reconstruction and adversarial losses are functions
of y alone, so their gradients there are taken on a detached copy; the adaptive weight is the ratio of the gradients
that they cause at the last convolution's weights, which `conv2d_weight` computes from y's gradients and that
convolution's input. One backward pass through the engine then carries the weighted sum. So nothing runs
`torch.autograd.grad` through ZeRO's hooks, the discriminator's own gradients stay untouched in the generator's part,
and the weight is averaged over ranks and micro-batches before its norms are taken: it does not depend on how many
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import grad

from ldm_scale.config.schema import BatchPlan, Config
from ldm_scale.data import Batch
from ldm_scale.engine import seeding
from ldm_scale.engine.checkpoint import Trained
from ldm_scale.engine.collectives import mean_over_ranks
from ldm_scale.engine.env import Environment
from ldm_scale.engine.zero import ShardedModel
from ldm_scale.models.autoencoder import Autoencoder, AutoencoderOutput, kl_divergence
from ldm_scale.models.build import build_autoencoder, build_seeded
from ldm_scale.models.discriminator import PatchDiscriminator, hinge_discriminator_loss, hinge_generator_loss
from ldm_scale.models.fused import set_kernels
from ldm_scale.models.perceptual import build_perceptual
from ldm_scale.training import autoencoder_product
from ldm_scale.training.task import Task

conv2d_weight: Callable[..., Tensor] = grad.conv2d_weight  # torch gives it no types

ADAPTIVE_WEIGHT_EPS = 1e-4  # in the denominator, as in taming-transformers


class OutputGradients(NamedTuple):
    """Losses at the decoder's output and their gradients there, for one micro-batch."""

    reconstruction: Tensor  # d (L1 + perceptual) / d y, (B, 3, H, W)
    adversarial: Tensor | None  # d L_adv / d y before its weight, (B, 3, H, W); None before the discriminator starts
    metrics: dict[str, Tensor]


class AutoencoderTask(Task):
    """Trains encoder, decoder and discriminator; leaves an autoencoder artifact."""

    def __init__(self, config: Config, plan: BatchPlan, environment: Environment) -> None:
        super().__init__(config, plan, environment)
        self._loss = config.autoencoder_loss
        seed = config.train.seed
        self.network: Autoencoder = build_seeded(lambda: build_autoencoder(config.autoencoder), seed)
        set_kernels(self.network, config.kernels)
        self.autoencoder = self._shard(self.network, config.zero.stage)
        self.trained["autoencoder"] = Trained(self.autoencoder, self.average(self.autoencoder))
        self.perceptual = build_perceptual(self._loss).to(environment.device) if self._loss.perceptual_weight else None
        self.discriminator: ShardedModel | None = None
        if self._loss.adversarial_weight > 0:
            network = build_seeded(
                lambda: PatchDiscriminator(self._loss.discriminator_base_channels, self._loss.discriminator_layers),
                seed + 1,
            )
            self.discriminator = self._shard(network, config.zero.discriminator_stage)
            self.trained["discriminator"] = Trained(self.discriminator)

    def _shard(self, network: torch.nn.Module, stage: int) -> ShardedModel:
        return ShardedModel(
            network,
            optimizer=self.config.optimizer,
            zero=self.config.zero,
            stage=stage,
            micro_batch=self.plan.micro_batch,
            accumulation_steps=self.plan.accumulation_steps,
            environment=self.environment,
        )

    def adversarial_active(self, images: int) -> bool:
        """Whether the discriminator trains, and is felt, in the step that starts after `images` images."""
        return self.discriminator is not None and images >= self._loss.discriminator_start_images

    def accumulate(self, batches: Sequence[Batch], images: int) -> dict[str, Tensor]:
        """See `Task.accumulate`."""
        active = self.adversarial_active(images)
        inputs = [self._inputs(batch) for batch in batches]
        # With several micro-batches the weight must be known before the first backward pass: a forward pass more each.
        weight = self._weight_over_micro_batches(inputs) if active and len(inputs) > 1 else None
        totals: dict[str, Tensor] = {}
        for x, noise in inputs:
            output = AutoencoderOutput(*self.autoencoder(x, noise))
            gradients = self._output_gradients(output, x, active)
            if gradients.adversarial is not None and weight is None:
                weight = self._adaptive_weight(*self._last_layer_gradients(output, gradients))
            metrics = self._backward_generator(output, gradients, weight)
            if active:
                metrics |= self._backward_discriminator(x, output.reconstruction.detach())
            for name, value in metrics.items():
                totals[name] = totals.get(name, torch.zeros(())) + value.detach().float().cpu() / len(inputs)
        return totals

    def update(self, images: int) -> dict[str, float]:
        """See `Task.update`."""
        trained = self.trained["autoencoder"]
        lr = self.lr(images)
        report = {"lr": lr, "grad_norm/autoencoder": trained.model.step(lr)}
        if trained.ema is not None:
            trained.ema.update(images + self.plan.global_batch, self.plan.global_batch)
        if self.discriminator is not None and self.adversarial_active(images):
            lr = self.lr(images, self._loss.discriminator_lr)
            report["grad_norm/discriminator"] = self.discriminator.step(lr)
        return report

    def validate(self, images: int) -> dict[str, float]:
        """Held-out PSNR of the weights that the artifact would hold, beside bicubic's."""
        return autoencoder_product.validate(self)

    def pictures(self) -> dict[str, Tensor]:
        """Held-out images beside their reconstructions."""
        return autoencoder_product.pictures(self)

    def finish(self, checkpoint: Path, images: int) -> dict[str, Any]:
        """Measures the latent statistics and writes the artifact."""
        return autoencoder_product.write(self, checkpoint, images)

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x = batch.images.to(self.environment.device, non_blocking=True)
        return x, self.posterior_noise(batch.image_numbers.tolist(), "posterior")

    def posterior_noise(self, image_numbers: Sequence[int], purpose: str) -> Tensor:
        """Noise of the posterior's samples. Shapes: returns (B, c, H/f, W/f)."""
        config = self.config
        side = config.data.resolution // config.autoencoder.downsampling_factor
        streams = [seeding.stream(config.train.seed, purpose, number) for number in image_numbers]
        noise = seeding.normal(streams, (config.autoencoder.latent_channels, side, side))
        return noise.to(self.environment.device, non_blocking=True)

    def _output_gradients(self, output: AutoencoderOutput, x: Tensor, adversarial: bool) -> OutputGradients:
        y = output.reconstruction.detach().float().requires_grad_()
        absolute = (y - x).abs().mean()
        loss = self._loss.reconstruction_weight * absolute
        if self._loss.chroma_weight:
            chroma = (y - x) - (y - x).mean(dim=1, keepdim=True)
            loss = loss + self._loss.chroma_weight * chroma.square().mean()
        metrics = {"loss/l1": absolute}
        if self.perceptual is not None:
            perceptual = self.perceptual(y, x).mean()
            loss = loss + self._loss.perceptual_weight * perceptual
            metrics["loss/perceptual"] = perceptual
        (reconstruction_gradient,) = torch.autograd.grad(loss, y)
        metrics["loss/reconstruction"] = loss
        if not adversarial:
            return OutputGradients(reconstruction_gradient, None, metrics)
        assert self.discriminator is not None, "adversarial_active is false without a discriminator"
        generator_loss = hinge_generator_loss(self.discriminator.module(y.to(self.environment.dtype)).float())
        (adversarial_gradient,) = torch.autograd.grad(generator_loss, y)
        metrics["loss/generator"] = generator_loss
        return OutputGradients(reconstruction_gradient, adversarial_gradient, metrics)

    def _last_layer_gradients(self, output: AutoencoderOutput, gradients: OutputGradients) -> tuple[Tensor, Tensor]:
        """Gradients of both losses at the last convolution's weights, averaged over the ranks."""
        assert gradients.adversarial is not None, "asked for before the discriminator's start"
        features = output.last_features.detach().float()
        shape = (3, features.shape[1], 3, 3)
        pair = torch.stack(
            [conv2d_weight(features, shape, dy, padding=1) for dy in (gradients.reconstruction, gradients.adversarial)]
        )
        reconstruction, adversarial = mean_over_ranks(pair)
        return reconstruction, adversarial

    def _adaptive_weight(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """Source: arXiv:2012.09841, eq. 7; clamped, and weighted by adversarial_weight."""
        ratio: Tensor = reconstruction.norm() / (adversarial.norm() + ADAPTIVE_WEIGHT_EPS)
        return ratio.clamp(0.0, self._loss.adaptive_weight_max) * self._loss.adversarial_weight

    def _weight_over_micro_batches(self, inputs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        sums: list[Tensor] = []
        for x, noise in inputs:
            with torch.no_grad():
                output = AutoencoderOutput(*self.autoencoder(x, noise))
            pair = self._last_layer_gradients(output, self._output_gradients(output, x, adversarial=True))
            sums = [a + b for a, b in zip(sums, pair, strict=True)] if sums else list(pair)
        return self._adaptive_weight(sums[0] / len(inputs), sums[1] / len(inputs))

    def _backward_generator(
        self, output: AutoencoderOutput, gradients: OutputGradients, weight: Tensor | None
    ) -> dict[str, Tensor]:
        dy = gradients.reconstruction
        metrics = dict(gradients.metrics)
        if gradients.adversarial is not None and weight is not None:
            dy = dy + weight * gradients.adversarial
            metrics["adaptive_weight"] = weight
        kl = kl_divergence(output.mean.float(), output.logvar.float()).mean()
        # Reconstruction terms are means over pixels; the paper's are sums, so the KL's weight is per pixel here.
        kl_term = self._loss.kl_weight * kl / output.reconstruction[0].numel()
        # The gradient of this product at the output is dy, so backward continues from there through the decoder.
        self.autoencoder.backward((output.reconstruction.float() * dy).sum() + kl_term)
        metrics["loss/kl"] = kl
        return metrics

    def _backward_discriminator(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        assert self.discriminator is not None, "adversarial_active is false without a discriminator"
        logits = self.discriminator(torch.cat([x.to(y.dtype), y])).float()
        real, fake = logits.chunk(2)
        loss = hinge_discriminator_loss(real, fake)
        self.discriminator.backward(loss)
        return {
            "loss/discriminator": loss,
            "discriminator/logits_real": real.mean(),
            "discriminator/logits_fake": fake.mean(),
        }
