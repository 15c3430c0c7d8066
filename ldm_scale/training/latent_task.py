"""What the stages that work in a trained autoencoder's latent space share: its latents, and noise by image number."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from ldm_scale.config.fit import check_artifact_fits, check_posterior
from ldm_scale.config.schema import BatchPlan, Config
from ldm_scale.data import Batch, build_loader
from ldm_scale.diffusion.process import build_process, offset_noise
from ldm_scale.diffusion.times import stratified_uniforms
from ldm_scale.engine import seeding
from ldm_scale.engine.checkpoint import Trained, write_weights
from ldm_scale.engine.cuda_graphs import ReplayedForward, check_cuda_graphs
from ldm_scale.engine.env import Environment
from ldm_scale.engine.spikes import NUM_LEVELS
from ldm_scale.engine.zero import ShardedModel
from ldm_scale.interchange.artifact import read_artifact
from ldm_scale.interchange.load import load_autoencoder
from ldm_scale.models.build import build_seeded
from ldm_scale.models.compiled import CompileReport, check_compiler, compile_blocks, compiled_kinds
from ldm_scale.models.fused import set_kernels
from ldm_scale.models.unet import UNetEncoder
from ldm_scale.planning.memory import blocks_to_recompute
from ldm_scale.planning.recomputation import recomputed_words
from ldm_scale.telemetry.log import get_logger
from ldm_scale.training.task import Task

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class LatentTask(Task):
    """A stage whose images are latents of an artifact."""

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
        side = config.data.resolution // artifact.config.downsampling_factor
        self.latent_shape: tuple[int, int, int] = (artifact.config.latent_channels, side, side)
        self.process = build_process(config.diffusion).to(environment.device)
        between = torch.arange(1, NUM_LEVELS, dtype=torch.float64) / NUM_LEVELS
        self._level_bounds = self.to_device(self.process.times(between)).sort().values

    def shard(self, name: str, build: Callable[[], ModuleT]) -> tuple[ModuleT, ShardedModel]:
        """The network that `build` makes and what trains it, averaged and saved under `name`; `init` gives its weights.

        Collective: all ranks.
        """
        network = build_seeded(build, self.config.train.seed)
        set_kernels(network, self.config.kernels)
        if self.config.train.compile == "blocks":
            check_compiler(self.environment.device)
            self.compile_report = CompileReport(compile_blocks(network))
        model = ShardedModel(
            network,
            optimizer=self.config.optimizer,
            zero=self.config.zero,
            stage=self.config.zero.stage,
            micro_batch=self.plan.micro_batch,
            accumulation_steps=self.plan.accumulation_steps,
            environment=self.environment,
            gathered_whole=compiled_kinds(network),
        )
        weights = self.initial_weights()
        if weights is not None:
            write_weights(model, weights)
        self.trained[name] = Trained(model, self.average(model))
        return network, model

    def speed_up(self, unet: UNetEncoder, network: nn.Module) -> None:
        """Nothing; the UNet recomputes what the configuration says, and `network` is replayed where it asks for that.

        Raises: ConfigError if the budget of memory is too small, or a CUDA graph is not possible here.
        """
        train, here = self.config.train, self.environment
        # What `auto` has become here: the plan is for the device that is there.
        precision: Literal["fp32", "bf16"] = "bf16" if here.dtype == torch.bfloat16 else "fp32"
        device: Literal["cpu", "cuda"] = "cuda" if here.device.type == "cuda" else "cpu"
        settled = dataclasses.replace(self.config, train=dataclasses.replace(train, precision=precision, device=device))
        unet.checkpoint_activations = blocks_to_recompute(settled, self.plan, here.world_size, self.latent_shape)
        if train.activation_checkpointing == "budget":
            get_logger(here.rank).info(recomputed_words(unet.checkpoint_activations, train.memory_budget_gib))
        if train.cuda_graphs:
            check_cuda_graphs(self.config, here.world_size, here.device)
            ReplayedForward(network)

    def encode(self, batch: Batch, mode: bool = False) -> Tensor:
        """Latents in fp32 of images and of cached moments alike: samples with the noise of the image numbers, or modes.

        Shapes: returns (b, c, H/f, W/f).
        """
        noise = None
        with torch.no_grad():
            mean, logvar = self._moments(batch)
            if self.config.latents.sample_posterior and not mode:
                numbers = batch.image_numbers.tolist()
                streams = [seeding.stream(self.config.train.seed, "posterior", number) for number in numbers]
                noise = self.to_device(seeding.normal(streams, mean.shape[1:]))
            return self.autoencoder.network.latents(mean, logvar, noise)

    @torch.no_grad()
    def encode_pixels(self, x: Tensor) -> Tensor:
        """Latents of pixels, modes. Shapes: (B, 3, H, W) to (B, c, H/f, W/f)."""
        network = self.autoencoder.network
        return network.latents(*network.encode_moments(self.to_device(x).to(self.environment.dtype)), None)

    def update_trained(self, name: str, images: int) -> dict[str, float]:
        """Learning rate and gradient norm, after the network `name` and its averages made their step.

        See `Task.update`. Collective: all ranks.
        """
        lr, trained = self.lr(images), self.trained[name]
        report = {"lr": lr, "grad_norm": trained.model.step(lr)}
        if trained.ema is not None:
            trained.ema.update(images + self.plan.global_batch, self.plan.global_batch)
        return report

    def validation_batches(self, num_images: int, split: str | None = None) -> tuple[list[Batch], int]:
        """This rank's batches of the first validation images, and how many of their images count, as on every rank.

        `split` None is the configured one of validation. In the pieces that training fits into memory.
        """
        config, ranks = self.config, self.environment.world_size
        loader = build_loader(
            dataclasses.replace(config.data, num_workers=0),
            split=split or config.data.validation_split or config.data.split,
            seed=config.train.seed,
            global_batch=ranks * self.plan.micro_batch,
            micro_batch=self.plan.micro_batch,
            rank=self.environment.rank,
            world_size=ranks,
            augment=False,
            num_epochs=1,
            accept_latents=True,
            annotations=config.conditioning.annotations if config.stage == "diffusion" else frozenset(),
        )
        # At stage 3 all ranks must run the network equally often, so a last batch that does not fill all ranks stays
        # out.
        num_samples = loader.dataset.num_samples
        num_full = num_samples // (ranks * self.plan.micro_batch)
        num_wanted = -(-num_images // (ranks * self.plan.micro_batch))
        batches = list(itertools.islice(loader, max(1, min(num_full, num_wanted))))
        return batches, sum(len(batch.keys) for batch in batches) if num_full else num_samples // ranks

    def draw(
        self, numbers: Sequence[int], num_uniforms: int = 0, shape: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Times (B,), noise (B, c, h, w), and further uniform numbers (B, num_uniforms): functions of image numbers.

        `shape` (c, h, w) is that of the batch's latents, if not of the configured resolution.
        """
        seed, diffusion = self.config.train.seed, self.config.diffusion
        streams = [seeding.stream(seed, "diffusion", number) for number in numbers]
        u = torch.tensor([s.random() for s in streams], dtype=torch.float64)
        uniforms = torch.stack([torch.from_numpy(s.random(num_uniforms)) for s in streams])
        noise = seeding.normal(streams, self.latent_shape if shape is None else shape)
        if diffusion.stratified_times:
            batch = self.plan.global_batch
            offset = seeding.stream(seed, "stratified times", numbers[0] // batch).random()
            u = stratified_uniforms(numbers, batch, offset)
        if diffusion.noise_offset > 0:
            constants = seeding.normal(streams, self.latent_shape[:1])
            noise = offset_noise(noise, constants, diffusion.noise_offset)
        return self.to_device(self.process.times(u)), self.to_device(noise), uniforms

    def note_losses(self, losses: Tensor, t: Tensor) -> None:
        """Nothing; keeps the losses of a micro-batch's images for the judgement of the step. Shapes: (b,) twice."""
        levels = torch.bucketize(t, self._level_bounds, right=True)
        self.sample_losses.append((losses.detach(), levels))

    def network_time(self, t: Tensor) -> Tensor:
        """`Process.network_time`; float64 where it is no whole number, which the engine passes on as it is.

        In bfloat16 two neighbouring thousandths would be the same time.
        """
        time = self.process.network_time(t)
        return time.double() if time.is_floating_point() else time

    def to_device(self, x: Tensor) -> Tensor:
        """x where the networks are."""
        return self.environment.put(x)

    def _moments(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance (None of a point) of each sample: from the cache, or of its image now."""
        network = self.autoencoder.network
        if batch.cached is None or batch.moments is None:
            return network.encode_moments(self.to_device(batch.images).to(self.environment.dtype))
        if not len(batch.images) and bool(batch.cached.all()):
            moments = self.to_device(batch.moments).float().contiguous(memory_format=torch.channels_last)
            return _split(moments, network.config.kind)
        # The layout that encoding gives: the UNet's convolutions follow it.
        moments = torch.empty(
            [len(batch.cached), *batch.moments.shape[1:]],
            device=self.environment.device,
            memory_format=torch.channels_last,
        )
        moments[self.to_device(batch.cached)] = self.to_device(batch.moments).float()
        if len(batch.images):
            x = self.to_device(batch.images).to(self.environment.dtype)
            parts = [part for part in network.encode_moments(x) if part is not None]
            moments[self.to_device(~batch.cached)] = torch.cat(parts, dim=1).float()
        return _split(moments, network.config.kind)


def _split(moments: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """Mean and log-variance, None of a point."""
    if kind != "kl":
        return moments, None
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar
