"""What a run's figures mean, in words: the classic ways in which the training of stage 2 fails without an error.

`diagnose` is a function of figures alone. Every finding says what was seen, why it matters and what to do. The limits
are wide: a finding is meant to be right when it comes, and a run without one need not be good.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

STUCK_SHARE = 0.95  # of predicting zero: where nothing was learnt
JUDGED_AFTER_STEPS = 100  # earlier, a loss near predicting zero is natural
LATENT_STD_LIMITS = (0.5, 2.0)  # of what the process expects
LEAST_MOVEMENT = 0.01  # sum of learning rates: AdamW moves a weight by about the rate at each step
DIVERGED_SHARE = 1.02  # of predicting zero
GRADIENT_GROWTH = 10.0  # of the norms' median between the first and the last quarter of the recent steps
NOISIEST_LOG_SNR = -2.0  # an image must be hidden at the end of the noise range
CLEANEST_LOG_SNR = 2.0  # and nearly whole at its beginning
CONDITIONING_JUDGED_SHARE = 0.25  # of the run
ERRORS_OF_A_GAP = 2.0  # standard errors by which another image's conditioning must do worse
EMA_JUDGED_SHARE = 0.5  # of the run
EMA_LAG = 1.05  # of the raw weights' loss
OVERFIT_SHARE = 0.8  # of the validation loss
ERRORS_OF_OVERFIT = 3.0


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run."""

    name: str
    seen: str
    matters: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name}: {self.seen}. {self.matters}. What to do: {self.advice}"


@dataclass(frozen=True)
class Gap:
    """How much worse the loss is with another image's conditioning of one kind, and the standard error of that."""

    mean: float
    error: float
    drop_probability: float


@dataclass(frozen=True)
class Figures:
    """What is known of a run at a validation. Losses are means over the noise range, of the network's own output."""

    images: int  # seen so far
    total_images: int
    global_batch: int
    warmup_images: int
    raw: float
    zero: float  # of predicting zero
    latent_std: float  # of the validation images
    expected_std: float  # of latents, as the process has it
    log_snr: tuple[float, float]  # ln(alpha^2 / sigma^2) at the least and the most noise
    movement: float  # sum of the learning rates of all steps so far
    peak_lr: float
    ema: float | None = None
    ema_half_life_images: float = 0.0
    gaps: Mapping[str, Gap] = field(default_factory=dict)  # by kind of conditioning
    without_conditioning: tuple[float, float] | None = None  # loss given y, and given nothing, on the same images
    # Loss of images that are trained on, and of as many others, and the standard error of their difference.
    overfit: tuple[float, float, float] | None = None
    recent_gradient_norms: Sequence[float] = ()  # of the last steps, oldest first


def diagnose(figures: Figures) -> list[Finding]:
    """Findings, the most serious first; none for a run in which nothing is seen to be wrong."""
    rules = (_not_finite, _stuck, _latent_scale, _noise_range, _conditioning_ignored, _ema_lags, _overfit)
    return [finding for rule in rules for finding in rule(figures)]


def gradient_history(norms: Sequence[float]) -> str:
    """The norms of the last steps in a few words; empty where there are none."""
    if not norms:
        return ""
    median = statistics.median(norms)
    return f"gradient norm of the last {len(norms)} steps: median {median:.3g}, last {norms[-1]:.3g}"


def _not_finite(figures: Figures) -> Iterator[Finding]:
    losses = {"raw": figures.raw} | ({} if figures.ema is None else {"averaged": figures.ema})
    bad = [name for name, loss in losses.items() if not math.isfinite(loss)]
    if bad:
        yield Finding(
            "not finite",
            f"after {figures.images} images the validation loss of the {' and '.join(bad)} weights is not finite",
            "A weight is NaN or infinite, or an activation overflows at some level of noise; once NaN, weights and "
            "averages stay so",
            "continue from a checkpoint before, with a smaller optimizer.lr, optimizer.gradient_clip=1, or "
            "train.precision=fp32",
        )


def _stuck(figures: Figures) -> Iterator[Finding]:
    judged_after = max(JUDGED_AFTER_STEPS * figures.global_batch, figures.warmup_images)
    if figures.images < judged_after or not figures.raw > STUCK_SHARE * figures.zero:
        return
    suspects = list(_suspects(figures))
    if not suspects:
        suspects = ["scale, schedule and learning rate look right; look at the pictures and at `ldm-scale doctor data`"]
    yield Finding(
        "loss stuck",
        f"after {figures.images} images the loss is {figures.raw:.4f}, that of predicting zero {figures.zero:.4f}",
        "The network has learnt nothing that a constant does not know; samples will be noise",
        "; ".join(suspects),
    )


def _suspects(figures: Figures) -> Iterator[str]:
    """Why nothing is learnt, each with what to do about it."""
    low, high = LATENT_STD_LIMITS
    if not low <= figures.latent_std / figures.expected_std <= high:
        yield (
            f"the latents' scale: their deviation is {figures.latent_std:.3g} where {figures.expected_std:g} is right "
            "(see the finding on it)"
        )
    if figures.movement < LEAST_MOVEMENT:
        yield (
            f"the learning rate: the rates of all steps so far add up to {figures.movement:.1e}, which is as far as "
            f"AdamW can have moved a weight; raise optimizer.lr={figures.peak_lr:g} or shorten the warm-up"
        )
    early, late = _quarters(figures.recent_gradient_norms)
    if figures.raw > DIVERGED_SHARE * figures.zero or late > GRADIENT_GROWTH * early:
        yield (
            f"a learning rate that is too large: the loss is {figures.raw / figures.zero:.2f} times that of predicting "
            f"zero, the gradient's norm went from {early:.2g} to {late:.2g} in the last steps; lower optimizer.lr="
            f"{figures.peak_lr:g} or warm up longer"
        )
    cleanest, noisiest = _effective_log_snr(figures)
    if cleanest < CLEANEST_LOG_SNR or noisiest > NOISIEST_LOG_SNR:
        yield f"the noise schedule: log-SNR from {cleanest:.1f} to {noisiest:.1f} with these latents"


def _latent_scale(figures: Figures) -> Iterator[Finding]:
    low, high = LATENT_STD_LIMITS
    if low <= figures.latent_std / figures.expected_std <= high or not math.isfinite(figures.latent_std):
        return
    cleanest, noisiest = _effective_log_snr(figures)
    yield Finding(
        "latent scale",
        f"the validation images' latents have deviation {figures.latent_std:.3g} where the process expects "
        f"{figures.expected_std:g}, so log-SNR runs from {cleanest:.1f} to {noisiest:.1f}",
        "The noise schedule is made for latents of that deviation: with larger ones no noise level hides the image, "
        "with smaller ones none shows it",
        "the artifact's statistics are of other images than these: measure them anew by training stage 1 on this data "
        "(latents.statistics_images), or give the data that the artifact was made for",
    )


def _noise_range(figures: Figures) -> Iterator[Finding]:
    cleanest, noisiest = figures.log_snr
    if cleanest >= CLEANEST_LOG_SNR and noisiest <= NOISIEST_LOG_SNR:
        return
    yield Finding(
        "noise range",
        f"log-SNR runs from {cleanest:.1f} to {noisiest:.1f}; {CLEANEST_LOG_SNR:g} or more to {NOISIEST_LOG_SNR:g} or "
        "less is usual",
        "Sampling starts from noise alone and ends without noise; levels that training never shows come out wrong",
        "compare diffusion.beta_start and beta_end (the paper's are 0.00085 and 0.012 at 1000 timesteps; fewer "
        "timesteps need larger ones), sigma_min and sigma_max",
    )


def _conditioning_ignored(figures: Figures) -> Iterator[Finding]:
    judged_after = max(JUDGED_AFTER_STEPS * figures.global_batch, CONDITIONING_JUDGED_SHARE * figures.total_images)
    if figures.images < judged_after:
        return
    for kind, gap in figures.gaps.items():
        if gap.mean > ERRORS_OF_A_GAP * gap.error:
            continue
        seen = f"with another image's {kind} the loss changes by {gap.mean:+.2g} (standard error {gap.error:.1g})"
        if figures.without_conditioning is not None:
            given, null = figures.without_conditioning
            seen += f"; it is {given:.4f} with the true conditioning and {null:.4f} with none"
        dropped = gap.drop_probability
        yield Finding(
            f"conditioning ignored: {kind}",
            seen,
            "The model does not use what it is given; guidance cannot help either",
            f"lower conditioning.{kind}.drop_probability={dropped:g}, 0.1 is usual"
            if dropped > 0.5
            else f"check that {kind} belongs to the images (`ldm-scale doctor data` shows pairs); if it does, train "
            "longer: the gap grows late when captions say little about the pixels",
        )


def _ema_lags(figures: Figures) -> Iterator[Finding]:
    if figures.ema is None or figures.images < EMA_JUDGED_SHARE * figures.total_images:
        return
    if figures.ema > EMA_LAG * figures.raw:
        kept = "its width is the first of ema.power_stds"
        advice = "train on, begin ema.power_stds with a smaller width in the next run"
        if figures.ema_half_life_images > 0:
            kept = f"its half-life is {figures.ema_half_life_images:g} images"
            advice = "lower ema.half_life_images to a twentieth of the run or less, set ema.warmup_ratio=0.05"
        yield Finding(
            "EMA lags",
            f"after {figures.images} images the averaged weights' loss is {figures.ema:.4f}, the raw ones' "
            f"{figures.raw:.4f}; {kept}",
            "The average still holds weights of the early training, and it is what sampling and export take",
            f"{advice}, or sample and export with --weights raw",
        )


def _overfit(figures: Figures) -> Iterator[Finding]:
    if figures.overfit is None:
        return
    trained_on, others, error = figures.overfit
    if trained_on < OVERFIT_SHARE * others and others - trained_on > ERRORS_OF_OVERFIT * error:
        yield Finding(
            "overfit",
            f"the loss is {trained_on:.4f} on images that are trained on and {others:.4f} on others (standard error of "
            f"the difference {error:.2g})",
            "The model begins to know its training images by heart; samples will repeat them",
            "train on more images, augment (data.horizontal_flip, data.crop_scale_min), make the model smaller, raise "
            "unet.dropout, or stop where the validation loss was lowest",
        )


def _effective_log_snr(figures: Figures) -> tuple[float, float]:
    """The range of log-SNR for latents of the deviation that was measured."""
    shift = 2.0 * math.log(max(figures.latent_std, 1e-12))
    cleanest, noisiest = figures.log_snr
    return cleanest + shift, noisiest + shift


def _quarters(norms: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and the last quarter; 0 and 0 where there are too few."""
    size = len(norms) // 4
    return (statistics.median(norms[:size]), statistics.median(norms[-size:])) if size else (0.0, 0.0)
