"""Stage 1: the autoencoder and its discriminator (arXiv:2112.10752, eq. 25), two ZeRO engines and one step counter.

The generator's gradient is put together at the decoder's output y. Reconstruction and adversarial losses are functions
of y alone, so their gradients there are taken on a detached copy; the adaptive weight is the ratio of the gradients
that they cause at the last convolution's weights, which `conv2d_weight` computes from y's gradients and that
convolution's input. One backward pass through the engine then carries the weighted sum. So nothing runs
`torch.autograd.grad` through ZeRO's hooks, the discriminator's own gradients stay untouched in the generator's part,
and the weight is averaged over ranks and micro-batches before its norms are taken: it does not depend on how many
there are. The discriminator itself is `adversary.py`, what concerns VQ codes alone `codebook.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import grad

from ldm_scale import faults
from ldm_scale.config.schema import BatchPlan, Config
from ldm_scale.data import Batch
from ldm_scale.engine import seeding
from ldm_scale.engine.checkpoint import Trained, write_weights
from ldm_scale.engine.collectives import mean_over_ranks
from ldm_scale.engine.env import Environment
from ldm_scale.engine.zero import ShardedModel
from ldm_scale.models.autoencoder import OUTPUT_LOGVAR, Autoencoder, AutoencoderOutput, kl_divergence
from ldm_scale.models.build import build_autoencoder, build_seeded
from ldm_scale.models.discriminator import PatchDiscriminator
from ldm_scale.models.fused import set_kernels
from ldm_scale.models.perceptual import build_perceptual
from ldm_scale.telemetry.log import get_logger
from ldm_scale.training import autoencoder_product
from ldm_scale.training.adversary import Adversary
from ldm_scale.training.codebook import CODEBOOK, CodebookKeeper
from ldm_scale.training.task import Pictures, Task

conv2d_weight: Callable[..., Tensor] = grad.conv2d_weight  # torch gives it no types

ADAPTIVE_WEIGHT_EPS = 1e-4  # in the denominator, as in taming-transformers


class Inputs(NamedTuple):
    """One micro-batch."""

    x: Tensor  # pixels (B, 3, H, W)
    noise: Tensor  # of the posterior's sample (B, c, H/f, W/f)
    numbers: Tensor  # of the images in the stream (B,)


class OutputGradients(NamedTuple):
    """Losses at the decoder's output and their gradients there, for one micro-batch."""

    reconstruction: Tensor  # d (reconstruction + perceptual) / d y, (B, 3, H, W); over the output's variance
    adversarial: Tensor | None  # d L_adv / d y before its weight, (B, 3, H, W); None before the discriminator is felt
    loss: Tensor  # reconstruction + perceptual, a scalar without graph
    metrics: dict[str, Tensor]


class AdaptiveWeight(NamedTuple):
    """The adversarial loss's weight and whether its ratio was at the clamp."""

    value: Tensor
    saturated: Tensor


class AutoencoderTask(Task):
    """Trains encoder, decoder and discriminator; leaves an autoencoder artifact."""

    headline = ("loss/reconstruction", "validation/psnr_db")

    def __init__(self, config: Config, plan: BatchPlan, environment: Environment) -> None:
        super().__init__(config, plan, environment)
        self._loss = config.autoencoder_loss
        seed = config.train.seed
        self.network: Autoencoder = build_seeded(lambda: build_autoencoder(config.autoencoder), seed)
        if self._loss.learned_variance:
            self.network.learn_output_variance()
        self.network.checkpoint_activations(config.train.activation_checkpointing)
        set_kernels(self.network, config.kernels)
        codebook = None if self.network.quantizer is None else self.network.quantizer.codebook.detach().clone()
        self.autoencoder = self._shard(self.network, config.zero.stage)
        weights = self.initial_weights()
        if weights is not None:
            write_weights(self.autoencoder, weights, absent=(OUTPUT_LOGVAR,))
            codebook = None if codebook is None else weights[CODEBOOK]
        self.trained["autoencoder"] = Trained(self.autoencoder, self.average(self.autoencoder))
        self.codebook: CodebookKeeper | None = None
        if codebook is not None:
            codebook = codebook.to(environment.device)
            self.codebook = CodebookKeeper(self.trained["autoencoder"], codebook, self._loss, seed)
        self.perceptual = build_perceptual(self._loss).to(environment.device) if self._loss.perceptual_weight else None
        self.adversary: Adversary | None = None
        if self._loss.adversarial_weight > 0:
            network = build_seeded(
                lambda: PatchDiscriminator(
                    self._loss.discriminator_base_channels,
                    self._loss.discriminator_layers,
                    norm=self._loss.discriminator_norm,
                ),
                seed + 1,
            )
            self.adversary = Adversary(self._shard(network, config.zero.discriminator_stage), self._loss)
            self.trained["discriminator"] = self.adversary.trained
            if weights is not None:
                get_logger(environment.rank).info(
                    "the discriminator begins with random weights, which no artifact holds; it is felt from "
                    f"autoencoder_loss.discriminator_start_images={self._loss.discriminator_start_images} on"
                )
            if not self.adversary.felt(config.train.total_images - 1):
                get_logger().warning(
                    f"autoencoder_loss.discriminator_start_images={self._loss.discriminator_start_images} is not below "
                    f"train.total_images={config.train.total_images}: this run never feels its discriminator"
                )

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

    def accumulate(self, batches: Sequence[Batch], images: int) -> dict[str, Tensor]:
        """See `Task.accumulate`."""
        if self.adversary is not None:
            self.adversary.begin()
        felt = self.adversary is not None and self.adversary.felt(images)
        inputs = [self._inputs(batch) for batch in batches]
        # With several micro-batches the weight must be known before the first backward pass: a forward pass more each.
        weight = self._weight_over_micro_batches(inputs, images) if felt and len(inputs) > 1 else None
        totals: dict[str, Tensor] = {}
        for micro_batch in inputs:
            output = AutoencoderOutput(*self.autoencoder(micro_batch.x, micro_batch.noise))
            gradients = self._output_gradients(output, micro_batch.x, felt)
            if gradients.adversarial is not None and weight is None:
                weight = self._adaptive_weight(*self._last_layer_gradients(output, gradients), images)
            metrics = self._backward_generator(output, gradients, weight)
            if self.codebook is not None and output.indices is not None:
                self.codebook.observe(output.mean, output.indices, micro_batch.numbers)
            if self.adversary is not None and self.adversary.trains(images):
                metrics |= self.adversary.backward(micro_batch.x, output.reconstruction.detach())
            for name, value in metrics.items():
                totals[name] = totals.get(name, torch.zeros(())) + value.detach().float().cpu() / len(inputs)
        faults.poison("step.loss", totals["loss/reconstruction"])
        return totals

    def discard(self) -> None:
        """See `Task.discard`."""
        super().discard()
        if self.codebook is not None:
            self.codebook.discard()
        if self.adversary is not None:
            self.adversary.discard()

    def update(self, images: int) -> dict[str, float]:
        """See `Task.update`."""
        trained = self.trained["autoencoder"]
        lr, batch = self.lr(images), self.plan.global_batch
        report = {"lr": lr, "grad_norm/autoencoder": trained.model.step(lr)}
        if self.codebook is not None:
            report |= self.codebook.update(images, batch)
        if trained.ema is not None:
            trained.ema.update(images + batch, batch)
        if self.adversary is not None and self.adversary.trains(images):
            report |= self.adversary.step(self.lr(images, self._loss.discriminator_lr), images, batch)
        return report

    def validate(self, images: int) -> dict[str, float]:
        """Held-out figures of the weights that the artifact would hold, beside bicubic's."""
        return autoencoder_product.validate(self)

    def charts(self) -> dict[str, list[str]]:
        """Losses, the GAN's health, use of the codes."""
        return autoencoder_product.charts(self)

    def pictures(self) -> dict[str, Pictures]:
        """Held-out images beside their reconstructions."""
        return autoencoder_product.pictures(self)

    def finish(self, checkpoint: Path, images: int) -> dict[str, Any]:
        """Measures the latent statistics and writes the artifact."""
        return autoencoder_product.write(self, checkpoint, images)

    def _inputs(self, batch: Batch) -> Inputs:
        x = self.environment.put(faults.poison("step.input", batch.images))
        numbers = batch.image_numbers.to(self.environment.device)
        noise = self.posterior_noise(batch.image_numbers.tolist(), "posterior", (x.shape[2], x.shape[3]))
        return Inputs(x, noise, numbers)

    def posterior_noise(
        self, image_numbers: Sequence[int], purpose: str, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Noise of the posterior's samples of images of this size, (H, W), or else of the configured resolution.

        Shapes: returns (B, c, H/f, W/f).
        """
        config = self.config
        f, (height, width) = config.autoencoder.downsampling_factor, size or [config.data.resolution] * 2
        shape = (config.autoencoder.latent_channels, height // f, width // f)
        if config.autoencoder.kind != "kl":
            return torch.zeros(len(image_numbers), *shape, device=self.environment.device)
        streams = [seeding.stream(config.train.seed, purpose, number) for number in image_numbers]
        return self.environment.put(seeding.normal(streams, shape))

    def _output_gradients(self, output: AutoencoderOutput, x: Tensor, adversarial: bool) -> OutputGradients:
        y = output.reconstruction.detach().float().requires_grad_()
        error = (y - x).abs().mean() if self._loss.reconstruction == "l1" else (y - x).square().mean()
        loss = self._loss.reconstruction_weight * error
        if self._loss.chroma_weight:
            chroma = (y - x) - (y - x).mean(dim=1, keepdim=True)
            loss = loss + self._loss.chroma_weight * chroma.square().mean()
        metrics = {f"loss/{self._loss.reconstruction}": error}
        if self.perceptual is not None:
            perceptual = self.perceptual(y, x).mean()
            loss = loss + self._loss.perceptual_weight * perceptual
            metrics["loss/perceptual"] = perceptual
        (reconstruction_gradient,) = torch.autograd.grad(loss, y)
        if output.output_logvar is not None:
            reconstruction_gradient = reconstruction_gradient * torch.exp(-output.output_logvar.detach().float())
        metrics["loss/reconstruction"] = loss
        if not adversarial:
            return OutputGradients(reconstruction_gradient, None, loss.detach(), metrics)
        assert self.adversary is not None, "nothing is adversarial without a discriminator"
        generator_loss = self.adversary.generator_loss(y)
        (adversarial_gradient,) = torch.autograd.grad(generator_loss, y)
        metrics["loss/generator"] = generator_loss
        return OutputGradients(reconstruction_gradient, adversarial_gradient, loss.detach(), metrics)

    def _last_layer_gradients(self, output: AutoencoderOutput, gradients: OutputGradients) -> tuple[Tensor, Tensor]:
        """Gradients of both losses at the last convolution's weights, averaged over the ranks."""
        assert gradients.adversarial is not None, "asked for before the discriminator is felt"
        features = output.last_features.detach().float()
        shape = (3, features.shape[1], 3, 3)
        pair = torch.stack(
            [conv2d_weight(features, shape, dy, padding=1) for dy in (gradients.reconstruction, gradients.adversarial)]
        )
        reconstruction, adversarial = mean_over_ranks(pair)
        return reconstruction, adversarial

    def _adaptive_weight(self, reconstruction: Tensor, adversarial: Tensor, images: int) -> AdaptiveWeight:
        """Source: arXiv:2012.09841, eq. 7; clamped, and weighted by adversarial_weight and its ramp."""
        assert self.adversary is not None, "nothing is adversarial without a discriminator"
        ratio: Tensor = reconstruction.norm() / (adversarial.norm() + ADAPTIVE_WEIGHT_EPS)
        largest = self._loss.adaptive_weight_max
        return AdaptiveWeight(ratio.clamp(0.0, largest) * self.adversary.weight(images), (ratio >= largest).float())

    def _weight_over_micro_batches(self, inputs: Sequence[Inputs], images: int) -> AdaptiveWeight:
        sums: list[Tensor] = []
        for micro_batch in inputs:
            with torch.no_grad():
                output = AutoencoderOutput(*self.autoencoder(micro_batch.x, micro_batch.noise))
            pair = self._last_layer_gradients(output, self._output_gradients(output, micro_batch.x, adversarial=True))
            sums = [a + b for a, b in zip(sums, pair, strict=True)] if sums else list(pair)
        return self._adaptive_weight(sums[0] / len(inputs), sums[1] / len(inputs), images)

    def _backward_generator(
        self, output: AutoencoderOutput, gradients: OutputGradients, weight: AdaptiveWeight | None
    ) -> dict[str, Tensor]:
        dy = gradients.reconstruction
        metrics = dict(gradients.metrics)
        if gradients.adversarial is not None and weight is not None:
            dy = dy + weight.value * gradients.adversarial
            metrics |= {"adaptive_weight": weight.value, "adaptive_weight_saturated": weight.saturated}
        # The gradient of this product at the output is dy, so backward continues from there through the decoder.
        total = (output.reconstruction.float() * dy).sum()
        if output.output_logvar is not None:
            # The Gaussian or Laplacian likelihood's two terms in the variance, whose gradient at y is in dy already.
            logvar = output.output_logvar.float().sum()
            total = total + gradients.loss * torch.exp(-logvar) + logvar
            metrics["output_logvar"] = logvar
        regularization, figures = self._regularization(output)
        self.autoencoder.backward(total + regularization)
        return metrics | figures

    def _regularization(self, output: AutoencoderOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """The latents' regularisation with its weight, and its figures."""
        if output.logvar is not None:
            kl = kl_divergence(output.mean.float(), output.logvar.float()).mean()
            # Reconstruction terms are means over pixels; the paper's are sums, so the KL's weight is per pixel here.
            return self._loss.kl_weight * kl / output.reconstruction[0].numel(), {"loss/kl": kl}
        assert output.codes is not None, "a VQ autoencoder returns codes"
        z_raw, codes = output.mean.float(), output.codes.float()
        commitment = (z_raw - codes.detach()).square().mean()
        if self._loss.codebook_update == "ema":
            # ZeRO counts on a gradient of every parameter; the codes themselves are written after the step.
            pull = 0.0 * codes.sum()
        else:
            pull = self._loss.codebook_weight * (codes - z_raw.detach()).square().mean()
        return self._loss.commitment_weight * commitment + pull, {"loss/commitment": commitment}
