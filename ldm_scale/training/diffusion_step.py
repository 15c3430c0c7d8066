"""Stage 2: the UNet and tau_theta learn to predict the noise in latents (arXiv:2112.10752, eq. 3).

Timestep, noise and dropping of the caption are functions of (seed, image number): the same on any number of ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.conditioning.text import tokenize
from ldm_scale.config.fit import check_artifact_fits, check_posterior
from ldm_scale.config.schema import BatchPlan, Config
from ldm_scale.data import Batch
from ldm_scale.diffusion.loss import diffusion_loss
from ldm_scale.diffusion.prediction import training_target
from ldm_scale.diffusion.schedule import build_schedule
from ldm_scale.engine import seeding
from ldm_scale.engine.checkpoint import Trained
from ldm_scale.engine.env import Environment
from ldm_scale.engine.zero import ShardedModel
from ldm_scale.interchange.artifact import read_artifact
from ldm_scale.interchange.load import load_autoencoder
from ldm_scale.models.build import build_seeded
from ldm_scale.models.fused import set_kernels
from ldm_scale.training import diffusion_product
from ldm_scale.training.task import Task


class DiffusionTask(Task):
    """Trains the latent diffusion model on the latent space that an artifact defines."""

    def __init__(self, config: Config, plan: BatchPlan, environment: Environment) -> None:
        super().__init__(config, plan, environment)
        artifact = read_artifact(Path(config.artifact))
        check_artifact_fits(config, artifact.config.downsampling_factor, artifact.config.latent_channels)
        check_posterior(config, artifact.config.kind, artifact.statistics.posterior, artifact.statistics.num_images)
        self.autoencoder_hash = artifact.content_hash
        self.autoencoder = load_autoencoder(config.artifact).to(environment.device, environment.dtype)
        # The autoencoder's one head is as wide as its features, which our attention does not serve.
        attention = config.kernels.attention if config.kernels.attention != "triton" else "auto"
        set_kernels(self.autoencoder.network, dataclasses.replace(config.kernels, attention=attention))
        self.latent_shape = (
            artifact.config.latent_channels,
            *[config.data.resolution // artifact.config.downsampling_factor] * 2,
        )
        self.network: LatentDiffusion = build_seeded(
            lambda: LatentDiffusion(config.unet, config.conditioning, artifact.config.latent_channels),
            config.train.seed,
        )
        set_kernels(self.network, config.kernels)
        self.model = ShardedModel(
            self.network,
            optimizer=config.optimizer,
            zero=config.zero,
            stage=config.zero.stage,
            micro_batch=plan.micro_batch,
            accumulation_steps=plan.accumulation_steps,
            environment=environment,
        )
        self.trained["diffusion"] = Trained(self.model, self.average(self.model))
        self.schedule = build_schedule(config.diffusion).to(environment.device)
        self._token_cache: dict[str, Tensor] = {}

    def accumulate(self, batches: Sequence[Batch], images: int) -> dict[str, Tensor]:
        """See `Task.accumulate`."""
        total = torch.zeros(())
        for batch in batches:
            numbers = batch.image_numbers.tolist()
            z = self.encode(batch)
            t, noise, dropped = self._draw(numbers)
            captions = ["" if drop else caption for caption, drop in zip(batch.captions, dropped, strict=True)]
            z_t = self.schedule.add_noise(z, noise, t)
            prediction = self.model(z_t, t, self.tokens(captions))
            target = training_target(self.config.diffusion.prediction, z, noise)
            loss = diffusion_loss(prediction, target, self.config.diffusion.loss).mean()
            self.model.backward(loss)
            total += loss.detach().float().cpu() / len(batches)
        return {"loss": total}

    def update(self, images: int) -> dict[str, float]:
        """See `Task.update`."""
        lr = self.lr(images)
        report = {"lr": lr, "grad_norm": self.model.step(lr)}
        ema = self.trained["diffusion"].ema
        if ema is not None:
            ema.update(images + self.plan.global_batch, self.plan.global_batch)
        return report

    def validate(self, images: int) -> dict[str, float]:
        """Losses per noise level on fixed noise, raw and EMA."""
        return diffusion_product.validate(self)

    def pictures(self) -> dict[str, Tensor]:
        """Samples of fixed captions and noise, raw and EMA."""
        return diffusion_product.pictures(self)

    def finish(self, checkpoint: Path, images: int) -> dict[str, Any]:
        """The last checkpoint is the product: `ldm-scale sample` and `ldm-scale export` read it."""
        return {"checkpoint": str(checkpoint), "autoencoder_hash": self.autoencoder_hash}

    def encode(self, batch: Batch, mode: bool = False) -> Tensor:
        """Latents in fp32 of images and of cached moments alike: samples with the noise of the image numbers, or modes.

        Shapes: returns (b, c, H/f, W/f).
        """
        noise = None
        if self.config.latents.sample_posterior and not mode:
            numbers = batch.image_numbers.tolist()
            streams = [seeding.stream(self.config.train.seed, "posterior", number) for number in numbers]
            noise = self._to_device(seeding.normal(streams, self.latent_shape))
        with torch.no_grad():
            return self.autoencoder.network.latents(*self._moments(batch), noise)

    def _moments(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance (None of a point) of each sample: from the cache, or of its image now."""
        network = self.autoencoder.network
        if batch.cached is None or batch.moments is None:
            return network.encode_moments(self._to_device(batch.images).to(self.environment.dtype))
        # The layout that encoding gives: the UNet's convolutions follow it.
        moments = torch.empty(
            [len(batch.cached), *batch.moments.shape[1:]],
            device=self.environment.device,
            memory_format=torch.channels_last,
        )
        moments[self._to_device(batch.cached)] = self._to_device(batch.moments).float()
        if len(batch.images):
            x = self._to_device(batch.images).to(self.environment.dtype)
            parts = [part for part in network.encode_moments(x) if part is not None]
            moments[self._to_device(~batch.cached)] = torch.cat(parts, dim=1).float()
        if network.config.kind != "kl":
            return moments, None
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Tokens of captions, each tokenised once. Shapes: returns (len(captions), max_tokens)."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._token_cache]
        if new:
            if len(self._token_cache) > 100_000:  # bounds the memory of long runs over web captions
                self._token_cache.clear()
                new = list(dict.fromkeys(captions))
            for caption, row in zip(new, tokenize(new, self.config.conditioning.max_tokens), strict=True):
                self._token_cache[caption] = row
        return self._to_device(torch.stack([self._token_cache[caption] for caption in captions]))

    def _draw(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, list[bool]]:
        """Timesteps (B,), noise (B, c, h, w) and which captions are dropped."""
        streams = [seeding.stream(self.config.train.seed, "diffusion", number) for number in numbers]
        t = torch.tensor([int(s.integers(self.config.diffusion.num_timesteps)) for s in streams])
        dropped = [float(s.random()) < self.config.conditioning.drop_probability for s in streams]
        return self._to_device(t), self._to_device(seeding.normal(streams, self.latent_shape)), dropped

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self.environment.device, non_blocking=True)
