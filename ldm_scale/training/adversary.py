"""The discriminator's side of stage 1: when it trains and is felt, what it learns from, whether it is healthy.

In images seen: it trains from `discriminator_start_images - discriminator_pretrain_images`, the autoencoder feels it
from `discriminator_start_images`, with a weight that rises over `adversarial_ramp_images`. When its smoothed accuracy
says that it has won outright (`discriminator_hold_accuracy`), it waits until the autoencoder has caught up: against
a perfect discriminator the autoencoder's gradient says nothing. docs/stage1.md has the rule for choosing these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_scale.config.schema import AutoencoderLossConfig
from ldm_scale.engine.checkpoint import Trained
from ldm_scale.engine.collectives import mean_over_ranks
from ldm_scale.engine.zero import ShardedModel
from ldm_scale.models.discriminator import discriminator_loss, generator_loss, gradient_penalty, lecam_penalty
from ldm_scale.telemetry.log import get_logger

HEALTH_HALF_LIFE_IMAGES = 2_000  # of the smoothed accuracy and logits
RELEASE_MARGIN = 0.05  # of accuracy below the hold's threshold, so that it does not flicker

ACCURACY, REAL, FAKE = "discriminator/accuracy", "discriminator/logits_real", "discriminator/logits_fake"


class Adversary:
    """A discriminator under ZeRO with its schedule and health. Losses take pixels as the engine computes them."""

    def __init__(self, model: ShardedModel, loss: AutoencoderLossConfig) -> None:
        self.model, self._loss = model, loss
        # Images seen by it, smoothed accuracy, smoothed logits of real and of fake patches, 1 while it is held.
        self._health = torch.zeros(5)
        self.trained = Trained(model, buffers={"health": self._health} | dict(model.module.named_buffers()))
        self._figures: list[Tensor] = []
        self._running: list[Tensor] = []  # its buffers as they were before the step

    def trains(self, images: int) -> bool:
        """Whether its loss is computed in the step that starts after `images` images."""
        return images >= self._loss.discriminator_start_images - self._loss.discriminator_pretrain_images

    def felt(self, images: int) -> bool:
        """Whether the autoencoder feels it in that step."""
        return images >= self._loss.discriminator_start_images

    def weight(self, images: int) -> float:
        """What the adaptive weight is multiplied by in that step."""
        ramp = self._loss.adversarial_ramp_images
        passed = images - self._loss.discriminator_start_images
        return self._loss.adversarial_weight * (1.0 if ramp == 0 else min(1.0, passed / ramp))

    @property
    def held(self) -> bool:
        """Whether it waits for the autoencoder."""
        return bool(self._health[4] > 0)

    def generator_loss(self, y: Tensor) -> Tensor:
        """How real it finds reconstructions, as a loss of them; a gradient of this must be taken at y alone.

        The module is called, not the engine: the discriminator's own gradients stay untouched.
        """
        logits = self.model.module(y.to(self.model.environment.dtype)).float()
        return generator_loss(logits, self._loss.adversarial_loss)

    def begin(self) -> None:
        """Nothing; remembers what its forward passes change (batch norm's running statistics)."""
        self._running = [buffer.clone() for buffer in self.model.module.buffers()]

    def discard(self) -> None:
        """Nothing; forgets the passes since `begin`."""
        for buffer, before in zip(self.model.module.buffers(), self._running, strict=True):
            buffer.copy_(before)
        self._figures.clear()

    def backward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Figures of one micro-batch, its gradient accumulated unless held. Shapes: (B, 3, H, W) twice, y detached."""
        if self.held:
            with torch.no_grad():
                real, fake = self._logits(x, y)
            loss = discriminator_loss(real, fake, self._loss.adversarial_loss)
            return self._report(loss, real, fake)
        x = x.to(self.model.environment.dtype)
        if self._loss.r1_weight:
            x = x.detach().requires_grad_()
        real, fake = self._logits(x, y)
        loss = discriminator_loss(real, fake, self._loss.adversarial_loss)
        report = self._report(loss, real, fake)
        total = loss
        if self._loss.r1_weight:
            report["discriminator/r1"] = gradient_penalty(real, x)
            total = total + 0.5 * self._loss.r1_weight * report["discriminator/r1"]
        if self._loss.lecam_weight and self._health[0] > 0:
            average_real, average_fake = self._health[2].item(), self._health[3].item()
            report["discriminator/lecam"] = lecam_penalty(real, fake, average_real, average_fake)
            total = total + self._loss.lecam_weight * report["discriminator/lecam"]
        self.model.backward(total)
        return report

    def step(self, lr: float, images: int, global_batch: int) -> dict[str, float]:
        """Its gradient's norm, after its optimizer made a step (unless held) and its health was looked at.

        Collective: all ranks.
        """
        held = self.held
        report = {"discriminator/held": float(held)}
        if not held:
            report["grad_norm/discriminator"] = self.model.step(lr)
        self._observe(images, global_batch)
        return report | {"discriminator/accuracy_smoothed": float(self._health[1])}

    def _logits(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of real and fake patches in fp32."""
        # The penalty's own gradient would set off hooks that DeepSpeed puts on what its engine returns.
        network = self.model.module if self._loss.r1_weight else self.model
        if self._loss.discriminator_norm == "batch":  # real and fake batches have statistics of their own
            return network(x.to(y.dtype)).float(), network(y).float()
        real, fake = network(torch.cat([x.to(y.dtype), y])).float().chunk(2)
        return real, fake

    def _report(self, loss: Tensor, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        accuracy = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
        self._figures.append(torch.stack([accuracy, real.detach().mean(), fake.detach().mean()]))
        return {
            "loss/discriminator": loss,
            ACCURACY: accuracy,
            REAL: real.mean(),
            FAKE: fake.mean(),
            "discriminator/logit_gap": real.mean() - fake.mean(),
        }

    def _observe(self, images: int, global_batch: int) -> None:
        """Takes the step's figures, averaged over ranks and micro-batches, into the health; holds or releases."""
        figures = mean_over_ranks(torch.stack(self._figures).mean(dim=0)).cpu()
        self._figures.clear()
        # The average of a young health is over what it has seen, not drawn to the zeros that it started with.
        seen = self._health[0].item() + global_batch
        keep = 0.5 ** (global_batch / min(HEALTH_HALF_LIFE_IMAGES, seen)) if self._health[0] > 0 else 0.0
        self._health[1:4] = keep * self._health[1:4] + (1 - keep) * figures
        self._health[0] = min(seen, 2.0**24)
        threshold = self._loss.discriminator_hold_accuracy
        if threshold is None:
            return
        accuracy = self._health[1].item()
        if not self.held and accuracy >= threshold and seen >= HEALTH_HALF_LIFE_IMAGES:
            self._health[4] = 1.0
            get_logger().warning(
                f"at {images + global_batch} images the discriminator is held: its smoothed accuracy {accuracy:.3f} "
                f"reached autoencoder_loss.discriminator_hold_accuracy={threshold}; it goes on below "
                f"{threshold - RELEASE_MARGIN:.3f}"
            )
        elif self.held and accuracy < threshold - RELEASE_MARGIN:
            self._health[4] = 0.0
            get_logger().info(f"at {images + global_batch} images the discriminator goes on: accuracy {accuracy:.3f}")
