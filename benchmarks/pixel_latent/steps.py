"""What is timed of a model: the trainer's own training step, DDIM steps and the decoder, on random images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.pixel_latent.models import Model, Scale
from benchmarks.train_step import Steps
from ldm_scale.conditioning.latent_diffusion import conditional_denoiser
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.data import Batch
from ldm_scale.data.batch import join
from ldm_scale.diffusion.sampler import sample
from ldm_scale.engine.env import Environment
from ldm_scale.errors import NumericsError
from ldm_scale.interchange.artifact import write_artifact
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.models.build import build_autoencoder, build_seeded
from ldm_scale.training.diffusion_step import DiffusionTask

TRAINING = CACHED, ON_THE_FLY = "train_cached", "train_on_the_fly"
DENOISE, DECODE = "denoise", "decode"
DOUBLE = "_double"  # at the end of an action's name: at twice the resolution


class Prepared:
    """A model with random weights, an untrained first stage, and what is to be timed of them, by name."""

    def __init__(self, model: Model, scale: Scale, here: Environment, folder: Path) -> None:
        self.model, self.scale = model, scale
        config = replace(model.at(scale), artifact=str(random_artifact(model.at(scale), folder)))
        config = replace(config, train=replace(config.train, device=here.device.type))
        self.task = DiffusionTask(config, batch_plan(config, here.world_size), here)
        pictures = random_batch(self.task, self.task.plan.micro_batch, scale.resolution)
        self.actions: dict[str, Callable[[], Tensor | None]] = {}
        # Pixels are their own latents: encoding them or reading them from a cache is the same step.
        if model.cacheable and model.f > 1:
            self.actions[CACHED] = Steps(self.task, cached(self.task, pictures)).everything
        self.actions[ON_THE_FLY] = Steps(self.task, pictures).everything
        for ending, factor, count in (("", 1, scale.sample_images[0]), (DOUBLE, 2, scale.sample_images[1])):
            batch = random_batch(self.task, count, scale.resolution * factor)
            latents = _Latents(self.task, batch, scale.ddim_steps)
            self.actions[DENOISE + ending] = latents.denoise
            self.actions[DECODE + ending] = latents.decode

    def images(self, action: str) -> int:
        """Images that one call of an action takes."""
        if action in TRAINING:
            return self.task.plan.global_batch
        return self.scale.sample_images[action.endswith(DOUBLE)]

    def run(self, action: str, clock: Callable[[], float]) -> float:
        """Seconds of one call.

        Raises: NumericsError if what it made is not finite.
        """
        begin_s = clock()
        made = self.actions[action]()
        seconds = clock() - begin_s
        if made is not None and not bool(made.isfinite().all()):
            raise NumericsError(f"{self.model.key}: {action} gave values that are not finite; no speed is reported")
        return seconds


class _Latents:
    """Some DDIM steps from noise, and the decoder on what they gave."""

    def __init__(self, task: DiffusionTask, batch: Batch, num_steps: int) -> None:
        self.task, self.num_steps = task, num_steps
        self.inputs = task.inputs(batch)
        f = task.autoencoder.config.downsampling_factor
        side = batch.images.shape[-1] // f
        generator = torch.Generator().manual_seed(2)
        noise = torch.randn(len(batch.keys), task.latent_shape[0], side, side, generator=generator)
        self.noise = self.z = noise.to(task.environment.device)

    @torch.no_grad()
    def denoise(self) -> Tensor:
        task = self.task
        with task.evaluating():
            denoiser = conditional_denoiser(task.network, task.process, self.inputs, self.noise.shape[-2:])
            self.z = sample(denoiser, self.noise, task.process, sampler="ddim", num_steps=self.num_steps)
        return self.z

    def decode(self) -> Tensor:
        return self.task.autoencoder.decode(self.z)


def random_artifact(config: Config, folder: Path) -> Path:
    """An untrained first stage: speed and memory do not ask what the weights are."""
    state: dict[str, Tensor] = {}
    if config.autoencoder.kind != "identity":
        network = build_seeded(lambda: build_autoencoder(config.autoencoder), seed=0)
        state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    posterior = "sample" if config.latents.sample_posterior else "mode"
    statistics = LatentStatistics(posterior=posterior)  # type: ignore[arg-type]
    write_artifact(folder, state, config.autoencoder, statistics, {"resolution": config.data.resolution})
    return folder


def random_batch(task: DiffusionTask, count: int, side: int) -> Batch:
    """Smooth random pictures, each of a class; pinned as loaded ones. Shapes: images (count, 3, side, side)."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    classes = task.config.conditioning.classes
    batch = Batch(
        images=F.interpolate(coarse, size=side, mode="bilinear").contiguous(memory_format=torch.channels_last),
        captions=[""] * count,
        classes=torch.arange(count) % (classes.num_classes if classes else 1),
        keys=[str(i) for i in range(count)],
        image_numbers=torch.arange(count),
        bad=[],
    )
    return join([batch], pin=task.environment.device.type == "cuda")


@torch.no_grad()
def cached(task: DiffusionTask, batch: Batch) -> Batch:
    """The batch as a cache of latents gives it: moments in float16 in place of its pictures."""
    pixels = batch.images.to(task.environment.device, task.environment.dtype)
    moments = torch.cat([part for part in task.autoencoder.network.encode_moments(pixels) if part is not None], dim=1)
    latents = replace(
        batch,
        images=batch.images[:0],
        moments=moments.half().cpu(),
        cached=torch.ones(len(batch.keys), dtype=torch.bool),
    )
    return join([latents], pin=task.environment.device.type == "cuda")
