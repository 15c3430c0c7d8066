"""What stage 1 shows and leaves behind: held-out figures, pictures, latent statistics, the artifact."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ldm_scale.config.convert import config_to_dict
from ldm_scale.data import Batch, build_loader, open_unindexed
from ldm_scale.engine.collectives import broadcast_object, gather_objects, sum_over_ranks
from ldm_scale.engine.ema import RAW
from ldm_scale.engine.weights import read_full_tensors
from ldm_scale.evaluation.reconstruction import bicubic_baseline, psnr
from ldm_scale.interchange.artifact import write_artifact
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.models.half_precision import HalfPrecisionProbe, probe_half_precision
from ldm_scale.models.half_precision import merge as merge_probes
from ldm_scale.training.adversary import ACCURACY, FAKE, REAL
from ldm_scale.training.statistics import Moments, latent_statistics, merge, require_difference
from ldm_scale.training.task import Pictures

if TYPE_CHECKING:
    from ldm_scale.training.autoencoder_step import AutoencoderTask

VALIDATION_IMAGES = 512
PICTURES = 8
PROBED_IMAGES = 32


def validate(task: AutoencoderTask) -> dict[str, float]:
    """PSNR in dB over the first held-out images, that of bicubic down by f and up, and the perceptual distance.

    Collective: all ranks.
    """
    factor = task.config.autoencoder.downsampling_factor
    sums = torch.zeros(4, dtype=torch.float64)
    with _evaluated_weights(task), torch.no_grad():
        for batch in _batches(task, task.config.data.validation_split, VALIDATION_IMAGES):
            x = batch.images.to(task.environment.device)
            y = _reconstruct(task, x).clamp(-1, 1)
            distance = torch.zeros(1) if task.perceptual is None or not len(x) else task.perceptual(y, x)
            figures = (psnr(x, y), psnr(x, bicubic_baseline(x, factor)), distance, torch.ones(len(x)))
            sums += torch.stack([figure.double().sum().cpu() for figure in figures])
    total, bicubic, distance_sum, count = sum_over_ranks(sums.to(task.environment.device)).tolist()
    if count == 0:
        return {}
    report = {"validation/psnr_db": total / count, "validation/bicubic_psnr_db": bicubic / count}
    if task.perceptual is not None:
        report["validation/perceptual"] = distance_sum / count
    return report


def charts(task: AutoencoderTask) -> dict[str, list[str]]:
    """Scalars that TensorBoard shows over one another: losses, the GAN's health, use of the codes."""
    loss = task.config.autoencoder_loss
    regularization = {"kl": ["loss/kl"], "vq": ["loss/commitment"]}.get(task.config.autoencoder.kind, [])
    perceptual = ["loss/perceptual"] if loss.perceptual_weight else []
    result = {"losses": [f"loss/{loss.reconstruction}", *perceptual, *regularization]}
    if task.adversary is not None:
        result["adversarial losses"] = ["loss/discriminator", "loss/generator"]
        result["logits of the discriminator"] = [REAL, FAKE]
        result["accuracy of the discriminator"] = [ACCURACY, "discriminator/accuracy_smoothed", "discriminator/held"]
        result["adaptive weight"] = ["adaptive_weight", "adaptive_weight_saturated"]
    if task.codebook is not None:
        result["use of the codebook"] = ["codebook/used_share", "codebook/alive_share"]
        result["perplexity of the codes"] = ["codebook/perplexity"]
    result["PSNR, dB"] = ["validation/psnr_db", "validation/bicubic_psnr_db"]
    return result


def pictures(task: AutoencoderTask) -> dict[str, Pictures]:
    """Held-out images beside their reconstructions. Collective: all ranks."""
    with _evaluated_weights(task), torch.no_grad():
        batches = list(_batches(task, task.config.data.validation_split, PICTURES * task.environment.world_size))
        x = torch.cat([batch.images for batch in batches])[:PICTURES].to(task.environment.device)
        y = _reconstruct(task, x).clamp(-1, 1)
    keys = [key.rpartition("/")[2] for batch in batches for key in batch.keys]
    return {"reconstruction": Pictures({"image": x.cpu(), "reconstruction": y.float().cpu()}, keys[: len(x)])}


def measure_statistics(task: AutoencoderTask) -> LatentStatistics:
    """The map from raw latents to latents, measured over many batches and all ranks; scale 1 for VQ.

    Raises: NumericsError if the latents are constant. Collective: all ranks.
    Source: arXiv:2112.10752, appendix G; section 4.3.2 and D.1 for VQ, whose latents have a variance near 1.
    """
    if task.config.autoencoder.kind == "vq":
        return LatentStatistics(posterior="mode")
    latents = task.config.latents
    parts: list[Moments] = []
    places: list[Moments] = []
    images = 0
    with _evaluated_weights(task), torch.no_grad():
        for batch in _batches(task, task.config.data.split, latents.statistics_images):
            mean, logvar = _encode(task, batch.images.to(task.environment.device))
            z_raw = mean.float()
            if logvar is not None and latents.sample_posterior:
                noise = task.posterior_noise(batch.image_numbers.tolist(), "statistics")
                z_raw = z_raw + (0.5 * logvar.float()).exp() * noise
            parts.append(Moments.of(z_raw))
            places.append(Moments.of(mean.float().flatten(1)[:, :, None, None]))
            images += len(batch.images)
    posterior: Literal["sample", "mode"] = "sample" if latents.sample_posterior else "mode"
    moments = merge(part for rank_parts in gather_objects(parts) for part in rank_parts)
    num_images = sum(gather_objects(images))
    require_difference(merge(gather_objects(merge(places))), moments, num_images)
    return latent_statistics(moments, num_images, latents.statistics, posterior)


def probe(task: AutoencoderTask) -> HalfPrecisionProbe:
    """Whether the trained weights would overflow in half precision, on real images of all ranks.

    Collective: all ranks.
    """
    split = task.config.data.validation_split
    with _evaluated_weights(task), torch.no_grad():
        batches = (
            _at_least_one(batch.images.to(task.environment.device, task.environment.dtype))
            for batch in _batches(task, split, PROBED_IMAGES)
        )
        probes: list[HalfPrecisionProbe] = gather_objects(probe_half_precision(task.network, batches))
    return reduce(merge_probes, probes)


def write(task: AutoencoderTask, checkpoint: Path, images: int) -> dict[str, Any]:
    """Path and hash of the written artifact. Collective: all ranks."""
    statistics = measure_statistics(task)
    half_precision = probe(task)
    report: dict[str, Any] = {
        "latent_statistics": config_to_dict(statistics),
        "half_precision": config_to_dict(half_precision),
    }
    if task.environment.is_main:
        ema = task.trained["autoencoder"].ema
        weights = RAW if ema is None else ema.names[0]
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
            }
            | ({"init": task.init} if task.init else {}),
            half_precision=half_precision,
        )
        report |= {"artifact": str(directory), "hash": digest}
    return broadcast_object(report)  # type: ignore[no-any-return]


def _evaluated_weights(task: AutoencoderTask) -> contextlib.AbstractContextManager[None]:
    ema = task.trained["autoencoder"].ema
    return contextlib.nullcontext() if ema is None else ema.active()


def _encode(task: AutoencoderTask, x: Tensor) -> tuple[Tensor, Tensor | None]:
    mean, logvar = task.network.encode_moments(_at_least_one(x).to(task.environment.dtype))
    return mean[: len(x)], None if logvar is None else logvar[: len(x)]


def _reconstruct(task: AutoencoderTask, x: Tensor) -> Tensor:
    """Decoded modes of the posteriors, in fp32."""
    mean, _ = _encode(task, x)
    return task.network.decode_raw(_at_least_one(mean))[: len(x)].float()


def _at_least_one(x: Tensor) -> Tensor:
    """x, or one zero image where this rank has none left: at stage 3 all ranks must run the network equally often."""
    return x if len(x) else x.new_zeros((1, *x.shape[1:]))


def _batches(task: AutoencoderTask, split: str, images: int) -> Iterator[Batch]:
    """One pass over at most about `images` images without augmentation, divided among the ranks.

    Of shards without a manifest, the first of their stream; where those are fewer, they come again.
    """
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
        num_epochs=1 if open_unindexed(data.manifest) is None else None,
    )
    seen = 0
    for batch in loader:
        if seen >= images:
            return
        seen += task.plan.micro_batch * task.environment.world_size
        yield batch
