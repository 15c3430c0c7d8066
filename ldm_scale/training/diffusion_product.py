"""What stage 2 shows while it trains: losses per noise level, whether y is used, samples, and what may be wrong.

Names of the figures of `validate`, each a mean over the noise range (or its part, `bin0` the least noisy), of the
network's own output without weights:
    validation/raw, validation/ema        the trained weights, and their first average
    validation/zero, validation/linear    references: predicting zero, and knowing the latents' mean and variance alone
    validation/true, /shuffled, /null     of the first images, raw weights: their own y, another image's, none
    validation/gap/<kind>                 what another image's y of one kind costs; gap_error/<kind> its standard error
    validation/training_images, /others   of images of the training split, and of as many validation images
    validation/latents/mean, /std         of the validation latents
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm_scale.conditioning.base import Conditions, Inputs
from ldm_scale.conditioning.latent_diffusion import conditional_denoiser, sample_latents
from ldm_scale.data import Batch, build_loader
from ldm_scale.diffusion.sampler import ImageNoise
from ldm_scale.engine.collectives import sum_over_ranks
from ldm_scale.evaluation import shown
from ldm_scale.evaluation.noise_levels import (
    NUM_BINS,
    Predictor,
    linear_predictor,
    log_snr_ranges,
    noise_level_losses,
    other_rows,
    predict_zero,
)
from ldm_scale.telemetry.tensorboard import Curves
from ldm_scale.training.diagnosis import Figures, Finding, Gap, diagnose
from ldm_scale.training.task import Pictures

if TYPE_CHECKING:
    from ldm_scale.training.diffusion_step import DiffusionTask

VALIDATION_IMAGES = 256
COMPARED_IMAGES = 64  # of which the loss is also looked at with another y, and as many of the training split
PICTURES = 16
REFERENCES = ("zero", "linear")
_MAX_RATES = 1000  # learning rates that stand for all of a run


@dataclass(frozen=True, eq=False)
class _Images:
    """This rank's part of the first images of a split, equally many on each rank: latents' modes, inputs, numbers."""

    z: Tensor
    inputs: Inputs
    numbers: list[int]

    def first(self, count: int) -> _Images:
        return _Images(self.z[:count], {n: x[:count] for n, x in self.inputs.items()}, self.numbers[:count])


def validate(task: DiffusionTask) -> dict[str, float]:
    """The figures that the module's docstring names. Collective: all ranks."""
    images = _images(task)
    mean, variance = _moments(task, images.z)
    figures = {
        "validation/latents/mean": float(mean.mean()),
        "validation/latents/std": float((variance + (mean - mean.mean()).square()).mean().sqrt()),
    }
    for name, predict in (("zero", predict_zero), ("linear", linear_predictor(task.process, mean, variance))):
        figures |= _by_noise(task, name, _losses(task, images, predict))
    raw = _losses(task, images)
    figures |= _by_noise(task, "raw", raw)
    ema = task.trained["diffusion"].ema
    if ema is not None:
        with ema.active():
            figures |= _by_noise(task, "ema", _losses(task, images))
    count = -(-COMPARED_IMAGES // task.environment.world_size)
    few, losses = images.first(count), raw[:count].mean(dim=1)
    figures |= _use_of_conditioning(task, few, losses)
    data = task.config.data
    if data.validation_split not in ("", data.split):
        trained_on = _losses(task, _images(task, data.split).first(count)).mean(dim=1)
        for name, values in (("training_images", trained_on), ("others", losses)):
            figures[f"validation/{name}/mean"], figures[f"validation/{name}/error"] = _mean(task, values)
    return figures


def curves(task: DiffusionTask, figures: Mapping[str, float]) -> dict[str, Curves]:
    """The picture of losses over the noise range, and the references."""
    lines = {
        name: [figures[f"validation/{name}/bin{i}"] for i in range(NUM_BINS)]
        for name in ("raw", "ema", *REFERENCES)
        if f"validation/{name}/bin0" in figures
    }
    labels = {"zero": "predicting zero", "linear": "linear: mean and variance alone", "ema": "averaged weights"}
    return {
        "validation/noise_levels": Curves(
            title=f"Loss of the network's output ({task.config.diffusion.prediction}) by level of noise",
            x_label="log-SNR, ln(alpha^2 / sigma^2): much noise to the right",
            y_label="mean squared error",
            places=[_range(task, i) for i in range(NUM_BINS)],
            lines={labels.get(name, "trained weights"): values for name, values in lines.items()},
            references=frozenset(labels[name] for name in REFERENCES),
        )
    }


def charts(task: DiffusionTask) -> dict[str, list[str]]:
    """Scalars that TensorBoard shows over one another: one chart for each part of the noise range, one for the mean."""
    weights = ["raw"] if task.trained["diffusion"].ema is None else ["raw", "ema"]
    compared = ["true", "shuffled", "null"] if len(task.network.conditioner) else []
    result = {"mean over the noise range": [*weights, *REFERENCES]} | ({"conditioning": compared} if compared else {})
    tags = {title: [f"validation/{name}/mean" for name in names] for title, names in result.items()}
    for i in range(NUM_BINS):
        tags[f"log-SNR {_range(task, i)}"] = [f"validation/{name}/bin{i}" for name in (*weights, *REFERENCES)]
    return tags


def findings(
    task: DiffusionTask, figures: Mapping[str, float], recent: Sequence[Mapping[str, float]], images: int
) -> list[Finding]:
    """What is wrong with the run, as far as `validate`'s figures and the `recent` steps' metrics show."""
    config, ranges = task.config, log_snr_ranges(task.process)
    gaps = {
        kind: Gap(
            figures[f"validation/gap/{kind}"], figures[f"validation/gap_error/{kind}"], condition.drop_probability
        )
        for kind, condition in task.network.conditioner.conditions.items()
        if f"validation/gap/{kind}" in figures
    }
    null, others = figures.get("validation/null/mean"), figures.get("validation/others/mean")
    return diagnose(
        Figures(
            images=images,
            total_images=config.train.total_images,
            global_batch=config.train.global_batch,
            warmup_images=config.optimizer.warmup_images,
            raw=figures["validation/raw/mean"],
            zero=figures["validation/zero/mean"],
            latent_std=figures["validation/latents/std"],
            expected_std=config.diffusion.sigma_data if config.diffusion.prediction == "edm" else 1.0,
            log_snr=(ranges[0][0], ranges[-1][1]),
            movement=_sum_of_rates(task, images),
            peak_lr=config.optimizer.lr,
            ema=figures.get("validation/ema/mean"),
            ema_half_life_images=config.ema.half_life_images,
            gaps=gaps,
            without_conditioning=None if null is None else (figures["validation/true/mean"], null),
            overfit=None
            if others is None
            else (
                figures["validation/training_images/mean"],
                others,
                math.hypot(figures["validation/training_images/error"], figures["validation/others/error"]),
            ),
            recent_gradient_norms=[step["grad_norm"] for step in recent if "grad_norm" in step],
        )
    )


def pictures(task: DiffusionTask) -> dict[str, Pictures]:
    """Samples of fixed conditions and seeds beside what can be drawn of these, raw and EMA. Collective: all ranks."""
    y, inputs, count = _shown_conditions(task)
    noise = ImageNoise(tuple(range(count)), task.latent_shape, task.environment.device)
    beside, captions = _described(task, y, count)
    grids = {}
    for name, weights in _weights(task):
        with weights:
            z = sample_latents(task.network, task.process, inputs, noise, task.config.sampling)
        parts = torch.split(z.to(task.environment.dtype), task.plan.micro_batch)
        x = torch.cat([task.autoencoder.decode(part).float() for part in parts])
        grids[f"samples/{name}"] = Pictures(beside | {"sample": x.clamp(-1, 1).cpu()}, captions)
    return grids


def _weights(task: DiffusionTask) -> Iterator[tuple[str, contextlib.AbstractContextManager[None]]]:
    """The trained weights, and their first average."""
    yield "raw", contextlib.nullcontext()
    ema = task.trained["diffusion"].ema
    if ema is not None:
        yield "ema", ema.active()


def _images(task: DiffusionTask, split: str | None = None) -> _Images:
    batches, count = task.validation_batches(VALIDATION_IMAGES if split is None else COMPARED_IMAGES, split)
    parts = [task.inputs(batch) for batch in batches]
    return _Images(
        torch.cat([task.encode(batch, mode=True) for batch in batches]),
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]},
        torch.cat([batch.image_numbers for batch in batches]).tolist(),
    ).first(count)


def _losses(task: DiffusionTask, images: _Images, predict: Predictor | None = None) -> Tensor:
    """Losses per image and noise level on this rank; `predict` None is the network as it is now."""

    def denoise(z_t: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        return conditional_denoiser(task.network, task.process, inputs, (z_t.shape[2], z_t.shape[3]))(z_t, t)

    seed = task.config.train.seed
    return noise_level_losses(predict or denoise, images.z, images.inputs, task.process, seed, images.numbers)


def _use_of_conditioning(task: DiffusionTask, images: _Images, losses: Tensor) -> dict[str, float]:
    """Figures on whether the network uses y: the losses with their own y are given. Collective: all ranks.

    On another number of ranks other images are neighbours, so these figures differ by chance.
    """
    conditioner, inputs = task.network.conditioner, images.inputs
    figures: dict[str, float] = {}
    if not len(conditioner):
        return figures
    shuffled, any_found = dict(inputs), torch.zeros(len(losses), dtype=torch.bool)
    for kind, given in inputs.items():
        partners, found = other_rows(given)
        shuffled[kind] = given[partners.to(given.device)]
        any_found |= found
        with_other = _losses(task, dataclasses.replace(images, inputs=inputs | {kind: shuffled[kind]})).mean(dim=1)
        mean, error = _mean(task, (with_other - losses)[found])
        if math.isfinite(mean):
            figures[f"validation/gap/{kind}"], figures[f"validation/gap_error/{kind}"] = mean, error
    if len(inputs) > 1:
        with_other = _losses(task, dataclasses.replace(images, inputs=shuffled)).mean(dim=1)
    figures["validation/true/mean"] = _mean(task, losses)[0]
    if figures.keys() & {f"validation/gap/{kind}" for kind in inputs}:
        figures["validation/shuffled/mean"] = _mean(task, with_other)[0]
    if any(condition.drop_probability > 0 for condition in conditioner.conditions.values()):
        null = dataclasses.replace(images, inputs=conditioner.null_inputs(inputs))
        figures["validation/null/mean"] = _mean(task, _losses(task, null).mean(dim=1))[0]
    return figures


def _by_noise(task: DiffusionTask, name: str, losses: Tensor) -> dict[str, float]:
    """Means over all ranks' images, part by part of the noise range and over all. Collective: all ranks."""
    sums = torch.cat([losses.sum(dim=0), torch.tensor([float(len(losses))]).double()])
    *totals, count = _over_ranks(task, sums).tolist()
    means = [total / max(1.0, count) for total in totals]
    return {f"validation/{name}/bin{i}": mean for i, mean in enumerate(means)} | {
        f"validation/{name}/mean": sum(means) / len(means)
    }


def _mean(task: DiffusionTask, values: Tensor) -> tuple[float, float]:
    """Mean of all ranks' values (n,) and its standard error; NaN where there are none. Collective: all ranks."""
    sums = torch.stack([values.sum(), values.square().sum(), torch.tensor(float(len(values))).double()])
    total, squares, count = _over_ranks(task, sums).tolist()
    if count == 0:
        return math.nan, math.nan
    mean = total / count
    variance = max(0.0, squares / count - mean * mean) * count / max(1.0, count - 1.0)
    return mean, math.sqrt(variance / count)


def _moments(task: DiffusionTask, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the latents' channels over all ranks' images, (c,) each. Collective: all ranks."""
    x = z.double().transpose(0, 1).flatten(start_dim=1).cpu()
    counts = torch.full((len(x),), float(x.shape[1]), dtype=torch.float64)
    total, squares, count = _over_ranks(task, torch.stack([x.sum(dim=1), x.square().sum(dim=1), counts]))
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0.0)


def _over_ranks(task: DiffusionTask, sums: Tensor) -> Tensor:
    return sum_over_ranks(sums.double().to(task.environment.device)).cpu()


def _range(task: DiffusionTask, i: int) -> str:
    high, low = log_snr_ranges(task.process)[i]
    return f"{high:.1f} to {low:.1f}"


def _sum_of_rates(task: DiffusionTask, images: int) -> float:
    """Sum of the learning rates of all steps so far, from at most so many of them."""
    steps = range(0, images, task.plan.global_batch)
    chosen = steps[:: max(1, len(steps) // _MAX_RATES)]
    return sum(task.lr(start) for start in chosen) * len(steps) / max(1, len(chosen))


def _shown_conditions(task: DiffusionTask) -> tuple[Conditions, Inputs, int]:
    """y of the pictures, what is made of it, and how many they are.

    Of the first training images, with the configured prompts as the first ones' captions.
    """
    batch = _first_batch(task)
    prompts = list(task.config.sampling.prompts)[:PICTURES]
    changes: dict[str, Any] = {}
    if prompts:
        changes = {"captions": prompts + batch.captions[len(prompts) :], "text_contexts": None}
    y, count = dataclasses.replace(task.conditions(batch), **changes), len(prompts) or PICTURES
    return y.rows(slice(count)), {name: rows[:count] for name, rows in task.prepare(y).items()}, count


def _described(task: DiffusionTask, y: Conditions, count: int) -> tuple[dict[str, Tensor], list[str]]:
    """What can be drawn of y, by name, and what can be said of it."""
    kinds, config = set(task.network.conditioner.conditions), task.config
    layout, classes = config.conditioning.layout, config.conditioning.classes
    objects = task.labels.get("object_classes") or [str(i) for i in range(0 if layout is None else layout.num_classes)]
    names = task.labels.get("classes") or [str(i) for i in range(0 if classes is None else classes.num_classes)]
    drawn = shown.panels(y, kinds, objects, config.data.resolution)
    return {name: x.cpu() for name, x in drawn.items()}, shown.captions(y, kinds, names, count)


def _first_batch(task: DiffusionTask) -> Batch:
    """The first training images in the order of the first epoch, the same on every rank."""
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
        annotations=config.conditioning.annotations,
    )
    return next(iter(loader))
