"""From seconds to images/s, ratios, utilisation and GPU-days."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.measured import spread
from benchmarks.pixel_latent.models import Counted, Model, Scale, count
from benchmarks.pixel_latent.published import GPUS
from benchmarks.pixel_latent.rounds import Seconds, per_image
from benchmarks.pixel_latent.steps import CACHED, DOUBLE, ON_THE_FLY, TRAINING
from ldm_scale.planning.devices import peak_flops

SAMPLING_STEPS = 100  # DDIM, as the paper's Figures 6 and 17
SAMPLES = ("sample", f"sample{DOUBLE}")
FAR = 0.10  # parameters that differ by more are no comparison of equal models
COMPUTED = "computed, not measured"


def figures_of(
    group: Sequence[Model],
    seconds: Seconds,
    failed: Mapping[str, str],
    scale: Scale,
    device: tuple[str, torch.dtype],
) -> dict[str, dict[str, Any]]:
    """All figures of the models of a group, by their keys, beside its first, which is LDM-1."""
    first = group[0]
    counts = {model.key: count(model.at(scale)) for model in group}
    found = {}
    for model in group:
        entry = describe(model, counts[model.key], scale)
        entry["failed"] = failed.get(model.key)
        entry["counted_ratio"] = counted_ratios(first.published, model.published)
        entry["counted_ratio_as_measured"] = counted_ratios(counts[first.key], counts[model.key])
        refusal = refused(first, model, counts, failed)
        entry["ratio_refused"] = refusal
        if model.key in seconds:
            times = image_times(model, seconds[model.key], scale)
            entry["images_per_s"] = {name: spread([1 / s for s in values]) for name, values in times.items()}
            entry["mfu"] = utilisation(counts[model.key], entry["images_per_s"], device)
            if refusal is None:
                base = image_times(first, seconds[first.key], scale)
                entry["ratio"] = {name: ratio_of(base[name], values) for name, values in times.items()}
        # Narrowed networks reach another share of the peak than the published ones, whose days these are.
        entry["gpu_days"] = gpu_days(model, entry.get("mfu", {}) if scale.narrowing == 1 else {}, device[0])
        entry["days_here"] = {
            name: model.paper_images / rate["median"] / 86400
            for name, rate in entry.get("images_per_s", {}).items()
            if name in TRAINING
        }
        found[model.key] = entry
    return found


def describe(model: Model, counted: Counted, scale: Scale) -> dict[str, Any]:
    """What is known without measuring."""
    published = model.published
    return {
        "family": model.family,
        "name": model.name,
        "f": model.f,
        "paper_images": model.paper_images,
        "micro_batch": model.at(scale).train.micro_batch,
        "published": flops(published),
        "measured": flops(counted),
    }


def flops(counted: Counted) -> dict[str, Any]:
    """Parameters and FLOPs of an image."""
    size = counted.size
    assert size.unet is not None, "every model here has a UNet"
    return {
        "parameters": counted.parameters,
        "unet_forward_flops": size.unet.forward_flops,
        "encoder_forward_flops": size.encoder.forward_flops,
        "decoder_forward_flops": size.decoder.forward_flops,
        "train_cached_flops": counted.train_cached,
        "train_on_the_fly_flops": counted.train_on_the_fly,
        "sample_flops": counted.sample(SAMPLING_STEPS),
    }


def counted_ratios(first: Counted, other: Counted) -> dict[str, float]:
    """How many times fewer FLOPs an image takes than LDM-1's."""
    return {
        CACHED: first.train_cached / other.train_cached,
        ON_THE_FLY: first.train_on_the_fly / other.train_on_the_fly,
        "sample": first.sample(SAMPLING_STEPS) / other.sample(SAMPLING_STEPS),
    }


def refused(first: Model, other: Model, counts: Mapping[str, Counted], failed: Mapping[str, str]) -> str | None:
    """Why no ratio of the two is given; None if it may be.

    Both must have been measured, and have the same number of parameters but for a tenth.
    """
    for model in (first, other):
        if model.key in failed:
            return failed[model.key]
    for a, b in ((first.published, other.published), (counts[first.key], counts[other.key])):
        difference = abs(b.parameters / a.parameters - 1)
        if difference > FAR:
            return f"{b.parameters:,} parameters beside LDM-1's {a.parameters:,}: {difference:.0%} apart"
    return None


def image_times(model: Model, one: Mapping[str, list[float]], scale: Scale) -> dict[str, list[float]]:
    """Seconds of an image in training, and of one sampled, a value a round."""
    found = {name: one[name] for name in TRAINING if name in one}
    if model.f == 1 and model.cacheable:
        found[CACHED] = found[ON_THE_FLY]  # pixels: it is the same step
    for name, ending in zip(SAMPLES, ("", DOUBLE), strict=True):
        found[name] = per_image(dict(one), SAMPLING_STEPS, scale.ddim_steps, ending)
    return found


def ratio_of(first: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """LDM-1's seconds over the other's in the same round: how many times faster it is."""
    return spread([a / b for a, b in zip(first, other, strict=True)])


def utilisation(
    counted: Counted, rates: Mapping[str, Mapping[str, float]], device: tuple[str, torch.dtype]
) -> dict[str, float | None]:
    """Counted FLOP/s over the device's peak (MFU), the encoder's included where it runs; None without a known peak."""
    peak = peak_flops(*device)
    per_step = {CACHED: counted.train_cached, ON_THE_FLY: counted.train_on_the_fly}
    return {
        name: None if peak is None else per_step[name] * rates[name]["median"] / peak
        for name in TRAINING
        if name in rates
    }


def gpu_days(model: Model, mfu: Mapping[str, float | None], here: str) -> dict[str, dict[str, Any]]:
    """Days of one GPU of each kind to the paper's number of images, by mode: the published network at 256 px.

    images x FLOPs / (peak x share of the peak). The share is the one measured here on the published networks, taken to
    be the same on the other GPU; where none was measured (narrowed networks, no known peak) it is that of published
    trainings on that very GPU, and the figure is computed alone.
    """
    per_image = {CACHED: model.published.train_cached, ON_THE_FLY: model.published.train_on_the_fly}
    found: dict[str, dict[str, Any]] = {}
    for mode in TRAINING if model.cacheable else (ON_THE_FLY,):
        measured = mfu.get(mode)
        for name, gpu in GPUS.items():
            share = gpu.utilisation if measured is None else measured
            found.setdefault(mode, {})[name] = {
                "days": model.paper_images * per_image[mode] / (gpu.peak * share) / 86400,
                "share_of_peak": share,
                "basis": COMPUTED if measured is None else f"projected by the share of the peak measured on {here}",
            }
    return found


def joined(parts: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Figures of several groups; LDM-1, which is in all of its family's, keeps those of the first."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        for key, entry in part.items():
            found.setdefault(key, entry)
    return found
