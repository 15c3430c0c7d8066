"""What stage 1 shows and leaves behind: held-out figures, pictures, latent statistics, the artifact."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm_scale.config.convert import config_to_dict
from ldm_scale.data import Batch, build_loader
from ldm_scale.engine.checkpoint import read_full_tensors
from ldm_scale.engine.collectives import broadcast_object, gather_objects, sum_over_ranks
from ldm_scale.evaluation.reconstruction import bicubic_baseline, psnr
from ldm_scale.interchange.artifact import write_artifact
from ldm_scale.models.autoencoder import LatentStatistics

if TYPE_CHECKING:
    from ldm_scale.training.autoencoder_step import AutoencoderTask

VALIDATION_IMAGES = 512
PICTURES = 8


def validate(task: AutoencoderTask) -> dict[str, float]:
    """Mean PSNR in dB over the first held-out images, and that of bicubic down by f and up. Collective: all ranks."""
    factor = task.config.autoencoder.downsampling_factor
    sums = torch.zeros(3, dtype=torch.float64)
    with _evaluated_weights(task), torch.no_grad():
        for batch in _batches(task, task.config.data.validation_split, VALIDATION_IMAGES):
            x = batch.images.to(task.environment.device)
            y = _reconstruct(task, x).clamp(-1, 1)
            sums += (
                torch.stack(
                    [
                        psnr(x, y).sum(),
                        psnr(x, bicubic_baseline(x, factor)).sum(),
                        torch.tensor(float(len(x)), device=x.device),
                    ]
                )
                .double()
                .cpu()
            )
    total, bicubic, count = sum_over_ranks(sums.to(task.environment.device)).tolist()
    if count == 0:
        return {}
    return {"validation/psnr_db": total / count, "validation/bicubic_psnr_db": bicubic / count}


def pictures(task: AutoencoderTask) -> dict[str, Tensor]:
    """Held-out images, then their reconstructions. Collective: all ranks."""
    with _evaluated_weights(task), torch.no_grad():
        batches = list(_batches(task, task.config.data.validation_split, PICTURES * task.environment.world_size))
        x = torch.cat([batch.images for batch in batches])[:PICTURES].to(task.environment.device)
        y = _reconstruct(task, x).clamp(-1, 1)
    return {"reconstruction": torch.cat([x, y.float()]).cpu()}


def measure_statistics(task: AutoencoderTask) -> LatentStatistics:
    """Shift 0 and scale 1 / std of all components of posterior samples, over many batches and all ranks.

    Counts, means and sums of squared deviations are merged pairwise, which does not cancel as sums of squares do.
    Collective: all ranks.
    Source: arXiv:2112.10752, appendix G; Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm".
    """
    moments = (0, 0.0, 0.0)
    images = 0
    with _evaluated_weights(task), torch.no_grad():
        for batch in _batches(task, task.config.data.split, task.config.latents.statistics_images):
            noise = task.posterior_noise(batch.image_numbers.tolist(), "statistics")
            mean, logvar = _encode(task, batch.images.to(task.environment.device))
            z_raw = (mean.float() + (0.5 * logvar.float()).exp() * noise).double().flatten()
            if z_raw.numel():
                squares = float((z_raw - z_raw.mean()).square().sum())
                moments = _merge(moments, (z_raw.numel(), float(z_raw.mean()), squares))
            images += len(batch.images)
    merged = (0, 0.0, 0.0)
    for other in gather_objects(moments):
        merged = _merge(merged, other)
    count, _, squares = merged
    total_images = sum(gather_objects(images))
    std = math.sqrt(squares / max(count, 1))
    return LatentStatistics(shift=0.0, scale=1.0 / std if std > 0 else 1.0, num_images=total_images)


def write(task: AutoencoderTask, checkpoint: Path, images: int) -> dict[str, Any]:
    """Path and hash of the written artifact. Collective: all ranks."""
    statistics = measure_statistics(task)
    report: dict[str, Any] = {"latent_scale": statistics.scale, "statistics_images": statistics.num_images}
    if task.environment.is_main:
        weights = "raw" if task.trained["autoencoder"].ema is None else "ema"
        directory = Path(task.config.run_dir) / "artifact"
        digest = write_artifact(
            directory,
            read_full_tensors(checkpoint, "autoencoder", weights),
            task.config.autoencoder,
            statistics,
            provenance={
                "images": images,
                "weights": weights,
                "resolution": task.config.data.resolution,
                "config": config_to_dict(task.config),
            },
        )
        report |= {"artifact": str(directory), "hash": digest}
    return broadcast_object(report)  # type: ignore[no-any-return]


def _merge(a: tuple[int, float, float], b: tuple[int, float, float]) -> tuple[int, float, float]:
    """Count, mean and sum of squared deviations of two sets together."""
    count = a[0] + b[0]
    if count == 0:
        return a
    delta = b[1] - a[1]
    return count, a[1] + delta * b[0] / count, a[2] + b[2] + delta * delta * a[0] * b[0] / count


def _evaluated_weights(task: AutoencoderTask) -> contextlib.AbstractContextManager[None]:
    ema = task.trained["autoencoder"].ema
    return contextlib.nullcontext() if ema is None else ema.active()


def _encode(task: AutoencoderTask, x: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = task.network.encode_moments(_at_least_one(x).to(task.environment.dtype))
    return mean[: len(x)], logvar[: len(x)]


def _reconstruct(task: AutoencoderTask, x: Tensor) -> Tensor:
    """Decoded modes of the posteriors, in fp32."""
    mean, _ = _encode(task, x)
    return task.network.decode_raw(_at_least_one(mean))[: len(x)].float()


def _at_least_one(x: Tensor) -> Tensor:
    """x, or one zero image where this rank has none left: at stage 3 all ranks must run the network equally often."""
    return x if len(x) else x.new_zeros((1, *x.shape[1:]))


def _batches(task: AutoencoderTask, split: str, images: int) -> Iterator[Batch]:
    """One pass over at most about `images` images without augmentation, divided among the ranks."""
    config = task.config
    data = dataclasses.replace(config.data, num_workers=0)
    loader = build_loader(
        data,
        split=split or config.data.split,
        seed=config.train.seed,
        global_batch=task.plan.micro_batch * task.environment.world_size,
        micro_batch=task.plan.micro_batch,
        rank=task.environment.rank,
        world_size=task.environment.world_size,
        augment=False,
        num_epochs=1,
    )
    seen = 0
    for batch in loader:
        if seen >= images:
            return
        seen += task.plan.micro_batch * task.environment.world_size
        yield batch
