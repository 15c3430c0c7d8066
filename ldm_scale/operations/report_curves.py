"""Which of a run's figures are drawn together, in which order; what no group names is drawn by itself at the end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm_scale.config.convert import section_from_dict
from ldm_scale.config.schema import DiffusionConfig
from ldm_scale.diffusion.process import build_process
from ldm_scale.errors import ConfigError
from ldm_scale.evaluation.noise_levels import NUM_BINS, log_snr_ranges
from ldm_scale.operations.report_charts import MAX_LINES, Chart, Line

Series = Mapping[str, Sequence[tuple[float, float | None]]]

_REFERENCES = frozenset({"zero", "linear", "guessing", "bicubic_psnr_db"})
_NAMES = {
    "raw": "trained weights",
    "ema": "averaged weights",
    "zero": "predicting zero",
    "linear": "mean and variance alone",
    "true": "own conditioning",
    "shuffled": "another image's",
    "null": "none",
    "psnr_db": "reconstruction",
    "bicubic_psnr_db": "bicubic",
    "time_share": "",
}


@dataclass(frozen=True)
class Group:
    """Charts under one heading; `words` explain them."""

    title: str
    charts: Sequence[Chart]
    words: str = ""


# Heading, words, and charts: a title and a pattern of the names whose lines it has.
_GROUPS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Losses",
        "",
        (
            ("Training loss", r"loss"),
            ("Accuracy", r"accuracy"),
            ("Reconstruction loss", r"loss/(l1|l2|reconstruction|perceptual)"),
            ("Regularisation", r"loss/(kl|commitment)"),
            ("Held-out loss, mean over the noise range", r"validation/(raw|ema|zero|linear)/mean"),
            ("Held-out accuracy, mean over the noise range", r"validation/accuracy/(raw|ema)/mean"),
            ("Held-out cross-entropy, mean over the noise range", r"validation/loss/(raw|ema)/mean"),
            ("Held-out loss by what the model is told", r"validation/(true|shuffled|null)/mean"),
            ("Loss of training and of held-out images", r"validation/(training_images|others)/mean"),
            ("Held-out PSNR, dB", r"validation/(psnr_db|bicubic_psnr_db)"),
            ("Held-out perceptual distance", r"validation/perceptual"),
        ),
    ),
    (
        "Health of the GAN",
        "The discriminator has won where its accuracy stays at 1 and its logits drift apart; then its gradient says "
        "nothing.",
        (
            ("Adversarial losses", r"loss/(discriminator|generator)"),
            ("Accuracy of the discriminator", r"discriminator/(accuracy|accuracy_smoothed|held)"),
            ("Logits of real and of reconstructed patches", r"discriminator/logits_(real|fake)"),
            ("Adaptive weight", r"adaptive_weight"),
            ("Share of steps at its clamp", r"adaptive_weight_saturated"),
            ("Penalties", r"discriminator/(r1|lecam)"),
        ),
    ),
    (
        "Use of the codebook",
        "",
        (
            ("Shares of the codes", r"codebook/(used|alive)_share"),
            ("Perplexity of the codes of a step", r"codebook/perplexity"),
            ("Codes revived in a step", r"codebook/revived"),
        ),
    ),
    (
        "Optimisation",
        "",
        (("Norm of the gradients", r"grad_norm(/.*)?"), ("Learning rate", r"lr")),
    ),
    (
        "Throughput and memory",
        "Shares of the time are rank 0's. MFU: the trained network's FLOPs (forward and backward, none computed again) "
        "over the device's peak in bf16.",
        (
            ("Images a second", r"images_per_s"),
            ("MFU", r"throughput/mfu"),
            ("Model TFLOP/s a rank", r"throughput/model_tflops_per_s"),
            ("Share of the time", r"time_share/.*"),
            ("Share of the time spent waiting for data", r"data_wait_share"),
            ("Memory at the peak, GiB", r"memory/.*"),
            ("Slowest rank, seconds in a phase", r"ranks/.*_s_(median|max)"),
        ),
    ),
    (
        "Data",
        "",
        (
            (
                "Samples that could not be used, captions that were cut, steps skipped",
                r"bad_samples|truncated|skipped_steps",
            ),
        ),
    ),
)
_BIN = re.compile(r"(.+)/bin(\d+)")


def groups(series: Series, config: Mapping[str, Any]) -> list[Group]:
    """All figures of the run as charts, those of parts of the noise range by `noise_charts`."""
    left = {name: points for name, points in series.items() if _BIN.fullmatch(name) is None}
    found = []
    for title, words, patterns in _GROUPS:
        charts = []
        for chart, pattern in patterns:
            names = [name for name in left if re.fullmatch(pattern, name)]
            if names:
                charts.append(Chart(chart, _lines({name: left.pop(name) for name in names}), is_share=_is_share(names)))
        if charts:
            found.append(Group(title, charts, words))
    by_noise = noise_charts(series, config)
    if by_noise:
        words = "From the least noisy part to the noisiest, by the logarithm of the signal-to-noise ratio."
        found.insert(1, Group("By level of noise", by_noise, words))
    if left:
        rest = [Chart(name, [Line(name, points)]) for name, points in sorted(left.items())]
        found.append(Group("All other figures", rest))
    return found


def noise_charts(series: Series, config: Mapping[str, Any]) -> list[Chart]:
    """Figures of the parts of the noise range: the last ones over the range, and each part over the run."""
    families: dict[str, dict[str, dict[int, Sequence[tuple[float, float | None]]]]] = {}
    for name, points in series.items():
        match = _BIN.fullmatch(name)
        if match is not None:
            kind, _, weights = match[1].rpartition("/")
            families.setdefault(kind, {}).setdefault(weights, {})[int(match[2])] = points
    charts = []
    for kind, by_weights in families.items():
        what = {"validation": "Held-out loss"}.get(kind, kind.replace("/", " "))
        count = 1 + max(number for bins in by_weights.values() for number in bins)
        places = _noise_places(config, count)
        lines = [
            Line(_NAMES.get(weights, weights), [(n, bins[n][-1][1]) for n in sorted(bins)], weights in _REFERENCES)
            for weights, bins in by_weights.items()
        ]
        charts.append(Chart(f"{what} over the noise range, last validation", lines, "log-SNR", places))
        weights = "ema" if "ema" in by_weights else next(iter(by_weights))
        bins = by_weights[weights]
        over_time = [Line(f"{places[n]}", bins[n]) for n in sorted(bins)][:MAX_LINES]
        charts.append(Chart(f"{what} by part of the range, {_NAMES.get(weights, weights)}", over_time, is_ordered=True))
    return charts


def _noise_places(config: Mapping[str, Any], count: int) -> list[str]:
    """What the parts of the noise range are called: their log-SNR where the configuration says which that is."""
    if count == NUM_BINS and isinstance(config.get("diffusion"), Mapping):
        try:
            process = build_process(section_from_dict(DiffusionConfig, config["diffusion"], "diffusion"))
        except ConfigError:  # of another version of the program
            process = None
        if process is not None:
            return [f"{high:.1f} to {low:.1f}" for high, low in log_snr_ranges(process)]
    return [f"part {number + 1} of {count}" for number in range(count)]


def _lines(series: Series) -> list[Line]:
    """A line for each name: what differs in the names is what the lines are called."""
    names = list(series)
    first, last = _common(names), _common([name[::-1] for name in names])[::-1]
    result = []
    for name, points in series.items():
        short = name if len(names) == 1 else name[len(first) : len(name) - len(last)].strip("/") or name
        result.append(Line(_NAMES.get(short, short.replace("_", " ")), points, short in _REFERENCES))
    return result


def _common(names: Sequence[str]) -> str:
    """What all names begin with, up to a slash."""
    shortest = min(names, key=len)
    end = next((i for i, c in enumerate(shortest) if any(name[i] != c for name in names)), len(shortest))
    return shortest[: shortest.rfind("/", 0, end) + 1]


def _is_share(names: Sequence[str]) -> bool:
    return all(
        name.startswith(("time_share/", "codebook/used", "codebook/alive", "discriminator/acc")) for name in names
    )
