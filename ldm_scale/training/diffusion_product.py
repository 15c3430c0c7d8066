"""What stage 2 shows while it trains: losses per noise level and samples, for the trained and the averaged weights."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm_scale.conditioning.latent_diffusion import sample_latents
from ldm_scale.data import build_loader
from ldm_scale.diffusion.sampler import ImageNoise
from ldm_scale.engine.collectives import sum_over_ranks
from ldm_scale.evaluation.generation import NUM_BINS, noise_level_losses

if TYPE_CHECKING:
    from ldm_scale.training.diffusion_step import DiffusionTask

VALIDATION_IMAGES = 256
PICTURES = 16


def validate(task: DiffusionTask) -> dict[str, float]:
    """Loss in each noise level on fixed noise, raw and EMA, and of predicting zero. Collective: all ranks."""
    z, tokens, numbers = _validation_set(task)
    figures: dict[str, float] = {}

    def denoise(z_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return task.network(z_t.to(task.environment.dtype), t, tokens).float()  # type: ignore[no-any-return]

    for name, weights in _weights(task):
        with weights:
            losses = noise_level_losses(denoise, z, tokens, task.schedule, task.config.train.seed, numbers)
        sums = torch.cat([losses.denoiser, losses.zero]) * losses.num_images
        count = float(sum_over_ranks(torch.tensor([float(losses.num_images)], device=task.environment.device)))
        means = (sum_over_ranks(sums.float().to(task.environment.device)) / count).tolist()
        figures |= {f"validation/{name}/bin{i}": means[i] for i in range(NUM_BINS)}
        figures[f"validation/{name}/mean"] = sum(means[:NUM_BINS]) / NUM_BINS
        if name == "raw":
            figures |= {f"validation/zero/bin{i}": means[NUM_BINS + i] for i in range(NUM_BINS)}
    return figures


def pictures(task: DiffusionTask) -> dict[str, Tensor]:
    """Samples of fixed captions and seeds, raw and EMA. Collective: all ranks."""
    captions = list(task.config.sampling.prompts)[:PICTURES] or _first_captions(task)
    tokens = task.tokens(captions)
    noise = ImageNoise(tuple(range(len(captions))), task.latent_shape, task.environment.device)
    grids = {}
    for name, weights in _weights(task):
        with weights:
            z = sample_latents(task.network, task.schedule, tokens, noise, task.config.sampling)
        parts = torch.split(z.to(task.environment.dtype), task.plan.micro_batch)
        x = torch.cat([task.autoencoder.decode(part).float() for part in parts])
        grids[f"samples/{name}"] = x.clamp(-1, 1).cpu()
    return grids


def _weights(task: DiffusionTask) -> Iterator[tuple[str, contextlib.AbstractContextManager[None]]]:
    yield "raw", contextlib.nullcontext()
    ema = task.trained["diffusion"].ema
    if ema is not None:
        yield "ema", ema.active()


def _validation_set(task: DiffusionTask) -> tuple[Tensor, Tensor, list[int]]:
    """This rank's part of the first validation images: latents' modes, tokens, numbers; equally many on each rank."""
    config, ranks = task.config, task.environment.world_size
    split = config.data.validation_split or config.data.split
    loader = build_loader(
        dataclasses.replace(config.data, num_workers=0),
        split=split,
        seed=config.train.seed,
        global_batch=ranks * task.plan.micro_batch,
        micro_batch=task.plan.micro_batch,
        rank=task.environment.rank,
        world_size=ranks,
        augment=False,
        num_epochs=1,
        accept_latents=True,
    )
    # At stage 3 all ranks must run the network equally often, so a last batch that does not fill all ranks stays out.
    num_full = loader.dataset.num_samples // (ranks * task.plan.micro_batch)
    num_wanted = -(-VALIDATION_IMAGES // (ranks * task.plan.micro_batch))
    batches = list(itertools.islice(loader, max(1, min(num_full, num_wanted))))
    count = sum(len(batch.keys) for batch in batches) if num_full else loader.dataset.num_samples // ranks
    captions = [caption for batch in batches for caption in batch.captions][:count]
    numbers = torch.cat([batch.image_numbers for batch in batches])[:count].tolist()
    # In the pieces that training fits into memory.
    z = torch.cat([task.encode(batch, mode=True) for batch in batches])[:count]
    return z, task.tokens(captions), numbers


def _first_captions(task: DiffusionTask) -> list[str]:
    """The first captions of the training data in the order of its first epoch, the same on every rank."""
    config = task.config
    loader = build_loader(
        dataclasses.replace(config.data, num_workers=0),
        seed=config.train.seed,
        global_batch=PICTURES,
        micro_batch=PICTURES,
        rank=0,
        world_size=1,
        augment=False,
        accept_latents=True,
    )
    return next(iter(loader)).captions
