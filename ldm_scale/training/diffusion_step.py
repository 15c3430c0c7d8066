"""Stage 2: the UNet and tau_theta learn to denoise latents (arXiv:2112.10752, eq. 3).

Time, noise, what is dropped and what is simulated (masks, degradations) are functions of (seed, image number): the same
on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ldm_scale import faults
from ldm_scale.conditioning.base import Conditions, Inputs, Tools
from ldm_scale.conditioning.batches import conditions_of
from ldm_scale.conditioning.frozen_text import FrozenTextCondition, FrozenTextEncoder
from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.conditioning.text import num_truncated
from ldm_scale.config.schema import BatchPlan, Config
from ldm_scale.data import Batch, open_manifest, open_unindexed
from ldm_scale.engine.env import Environment
from ldm_scale.interchange.cached_text import check_text_fits
from ldm_scale.telemetry.tensorboard import Curves
from ldm_scale.training import diffusion_product
from ldm_scale.training.diagnosis import Finding
from ldm_scale.training.latent_task import LatentTask
from ldm_scale.training.task import Pictures


class DiffusionTask(LatentTask):
    """Trains the latent diffusion model on the latent space that an artifact defines."""

    headline = ("loss", "validation/raw/mean", "validation/ema/mean")

    def __init__(self, config: Config, plan: BatchPlan, environment: Environment) -> None:
        super().__init__(config, plan, environment)
        self.network, self.model = self.shard(
            "diffusion", lambda: LatentDiffusion(config.unet, config.conditioning, self.latent_shape[0])
        )
        self.speed_up(self.network.unet, self.network.unet)
        self.tools = Tools(environment.device, encode=self.encode_pixels, encode_text=self._frozen_text())

    def accumulate(self, batches: Sequence[Batch], images: int) -> dict[str, Tensor]:
        """See `Task.accumulate`."""
        total = torch.zeros((), device=self.environment.device)
        self.sample_losses.clear()
        for batch in batches:
            faults.poison("step.input", batch.images)
            z, inputs = faults.poison("step.latents", self.encode(batch)), self.inputs(batch)
            conditioner = self.network.conditioner
            t, noise, uniforms = self.draw(batch.image_numbers.tolist(), conditioner.num_uniforms, z.shape[1:])
            z_t = self.process.add_noise(z, noise, t)
            output = self.model(
                self.process.network_input(z_t, t),
                self.network_time(t),
                conditioner.drop(inputs, uniforms),
            )
            losses = self.process.loss(output, z, noise, t)
            self.note_losses(losses, t)
            loss = faults.poison("step.loss", losses.mean())
            self.model.backward(loss)
            total += loss.detach().float() / len(batches)  # stays there: reading it would wait for the device
        return {"loss": total}

    def update(self, images: int) -> dict[str, float]:
        """See `Task.update`."""
        return self.update_trained("diffusion", images)

    def validate(self, images: int) -> dict[str, float]:
        """Losses per noise level on fixed noise, raw and EMA."""
        return diffusion_product.validate(self)

    def charts(self) -> dict[str, list[str]]:
        """Losses of one noise level, raw, EMA and references."""
        return diffusion_product.charts(self)

    def curves(self, figures: Mapping[str, float]) -> dict[str, Curves]:
        """Losses over the noise levels."""
        return diffusion_product.curves(self, figures)

    def findings(
        self, figures: Mapping[str, float], recent: Sequence[Mapping[str, float]], images: int
    ) -> list[Finding]:
        """See `Task.findings`."""
        return diffusion_product.findings(self, figures, recent, images)

    def pictures(self) -> dict[str, Pictures]:
        """Samples of fixed conditions and noise, raw and EMA."""
        return diffusion_product.pictures(self)

    def finish(self, checkpoint: Path, images: int) -> dict[str, Any]:
        """The last checkpoint is the product: `ldm-scale sample` and `ldm-scale export` read it."""
        return {"checkpoint": str(checkpoint), "autoencoder_hash": self.autoencoder_hash}

    def conditions(self, batch: Batch) -> Conditions:
        """y of a batch, with what training makes itself of the images by their numbers."""
        return conditions_of(self.network.conditioner, batch, self.config.train.seed)

    def inputs(self, batch: Batch) -> Inputs:
        """What tau_theta's networks take, nothing dropped. Shapes: one row per image."""
        return self.prepare(self.conditions(batch))

    @torch.no_grad()
    def prepare(self, y: Conditions) -> Inputs:
        """See `Conditioner.prepare`."""
        return self.network.conditioner.prepare(y, self.tools)

    @property
    def num_truncated(self) -> int:
        """See `Task.num_truncated`."""
        return num_truncated(*self.network.conditioner.conditions.values(), self.tools.encode_text)

    def _frozen_text(self) -> Callable[[Sequence[str]], Tensor] | None:
        """The frozen text encoder on the device, where the model has one; its null is stored with the condition."""
        section = self.config.conditioning.frozen_text
        if section is None:
            return None
        encoder = FrozenTextEncoder(section)
        data = self.config.data
        if open_unindexed(data.manifest) is None:
            cache = open_manifest(data.manifest, data.split, check_sizes=False).latents
            if cache is not None and cache.text is not None:
                check_text_fits(cache.text, encoder, data.manifest)
        encoder.to(self.environment.device, self.environment.dtype)
        condition = cast(FrozenTextCondition, self.network.conditioner["frozen_text"])
        condition.set_null(encoder([""]))
        return encoder
