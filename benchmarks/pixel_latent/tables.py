"""What was measured as CSV and as Markdown, beside the paper's own rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.pixel_latent.costs import COMPUTED, SAMPLES, SAMPLING_STEPS
from benchmarks.pixel_latent.models import FAMILIES, Scale
from benchmarks.pixel_latent.published import CLAIM, GPUS, TABLE_6, TABLE_6_CAVEATS, TABLE_18
from benchmarks.pixel_latent.rounds import sampling_rounds
from benchmarks.pixel_latent.steps import CACHED, ON_THE_FLY, TRAINING

Figures = Mapping[str, dict[str, Any]]
ABSENT = "-"
WAYS = {CACHED: "latents cached", ON_THE_FLY: "encoded on the fly"}


def csv_text(figures: Figures) -> str:
    """A line for each model; empty where there is no figure."""
    rows = [_csv_row(entry) for entry in figures.values()]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    row = {name: entry[name] for name in ("family", "name", "f", "paper_images", "micro_batch")}
    for width in ("published", "measured"):
        row |= {f"{width}_{name}": value for name, value in entry[width].items()}
    row |= {f"counted_ratio_{name}": value for name, value in entry["counted_ratio"].items()}
    row |= {f"counted_ratio_as_measured_{name}": value for name, value in entry["counted_ratio_as_measured"].items()}
    for what in ("images_per_s", "ratio"):
        for name in (*TRAINING, *SAMPLES):
            found = entry.get(what, {}).get(name, {})
            row |= {
                f"{name}_{what}{ending}": found.get(key)
                for key, ending in (("median", ""), ("lower_quartile", "_low"), ("upper_quartile", "_high"))
            }
    row |= {f"{name}_mfu": entry.get("mfu", {}).get(name) for name in TRAINING}
    row |= {f"{name}_peak_bytes": _peak(entry, name) for name in (*TRAINING, SAMPLES[1])}
    row |= {f"{name}_days_here": entry.get("days_here", {}).get(name) for name in TRAINING}
    for mode in TRAINING:
        for gpu in GPUS:
            row[f"{mode}_{gpu}_days"] = entry["gpu_days"].get(mode, {}).get(gpu, {}).get("days")
    row["days_basis"] = next(iter(entry["gpu_days"][ON_THE_FLY].values()))["basis"]
    return row | {"ratio_refused": entry["ratio_refused"], "failed": entry["failed"]}


def markdown(figures: Figures, scale: Scale, rounds: int, environment: Mapping[str, Any]) -> str:
    """The report: training, sampling, the paper's Tables 6 and 18, GPU-days."""
    px = scale.resolution
    by = "" if scale.narrowing == 1 else f" Every network is {scale.narrowing} times narrower than published."
    parts = [
        "# Pixels against latents",
        f"{environment['date']}, {environment['device']}, {environment['threads']} thread(s), torch "
        f"{environment['torch']}, load average {environment['load_average']:.1f}. {rounds} rounds, in which the models "
        f"take turns; medians, quartiles in brackets.{by} {scale.batch} images of {px} px an optimizer step. Ratios "
        "are of images/s, LDM-1 = 1. Counted ratios are of FLOPs, of the published networks at 256 px and, in "
        "brackets, of those that were measured.",
        *_training(figures, px),
        *_sampling(figures, scale, rounds),
        *_table_6(figures, px),
        *_table_18(figures),
        *_days(figures),
    ]
    refused = [f"- {e['family']} {e['name']}: {e['ratio_refused']}" for e in figures.values() if e["ratio_refused"]]
    if refused:
        parts += ["## No ratio", "\n".join(refused)]
    return "\n\n".join(parts) + "\n"


def _training(figures: Figures, px: int) -> Iterable[str]:
    yield f"## Training, {px} px"
    yield 'Peak memory is of a step whose micro-batches are as large as "images at once" says: more where more fitted.'
    for family, title in _families(figures):
        header = ["", "parameters, published (measured)", "GFLOP a forward pass, published"]
        for way in WAYS.values():
            header += [f"images/s, {way}", "ratio", "counted"]
        header += ["images at once", "peak MiB, cached", "on the fly"]
        lines = []
        for entry in _of(figures, family):
            published, measured = entry["published"], entry["measured"]
            line = [
                entry["name"],
                f"{published['parameters'] / 1e6:.1f}M ({measured['parameters'] / 1e6:.2f}M)",
                _digits(published["unet_forward_flops"] / 1e9),
            ]
            for mode in WAYS:
                line += [_spread(entry, "images_per_s", mode), _spread(entry, "ratio", mode), _counted(entry, mode)]
            line += [str(entry["micro_batch"]), *(_mib(entry, mode) for mode in WAYS)]
            lines.append(line)
        yield f"**{title}**"
        yield _table(header, lines)


def _sampling(figures: Figures, scale: Scale, rounds: int) -> Iterable[str]:
    px, timed = scale.resolution, sampling_rounds(rounds)
    yield f"## Sampling, {SAMPLING_STEPS} DDIM steps and the decoder"
    yield (
        f"Timed in {timed} of the {rounds} rounds, each time {scale.ddim_steps} DDIM step(s), from whose mean those of "
        f"{SAMPLING_STEPS} are made; medians and quartiles are of {timed} values."
    )
    for family, title in _families(figures):
        header = ["", f"images/s, {px} px", "ratio", f"counted, {px} px", f"images/s, {2 * px} px", "ratio"]
        header += [f"peak MiB, {2 * px} px"]
        lines = []
        for entry in _of(figures, family):
            low, high = SAMPLES
            line = [entry["name"], _spread(entry, "images_per_s", low), _spread(entry, "ratio", low)]
            line += [_counted(entry, "sample"), _spread(entry, "images_per_s", high), _spread(entry, "ratio", high)]
            lines.append([*line, _mib(entry, high)])
        yield f"**{title}**"
        yield _table(header, lines)


def _table_6(figures: Figures, px: int) -> Iterable[str]:
    rows = {entry["name"]: entry for entry in figures.values() if entry["family"] == "inpainting"}
    if not rows:
        return
    yield "## Beside the paper's Table 6 (arXiv:2112.10752)"
    first = TABLE_6["LDM-1"]
    header = ["", "training: paper", "here", "counted", "sampling: paper, 256; 512 px", f"here, {px}; {2 * px} px"]
    header += ["hours an epoch: paper", "FID: paper"]
    lines = []
    for name, printed in TABLE_6.items():
        entry = rows.get(name, {})
        sampled = (printed.sampling_256 / first.sampling_256, printed.sampling_512 / first.sampling_512)
        lines.append(
            [
                name,
                f"{printed.training / first.training:.2f}",
                _spread(entry, "ratio", ON_THE_FLY),
                _counted(entry, ON_THE_FLY) if entry else ABSENT,
                f"{sampled[0]:.2f}; {sampled[1]:.2f}",
                "; ".join(_median(entry, "ratio", name) for name in SAMPLES),
                f"{printed.epoch_h} ({first.epoch_h / printed.epoch_h:.2f})",
                f"{printed.fid} ({first.fid / printed.fid:.2f})",
            ]
        )
    yield _table(header, lines)
    yield f'The paper\'s sentence is "speed-up of at least {CLAIM}x". What to know about its table:'
    yield "\n".join(f"- {caveat}" for caveat in TABLE_6_CAVEATS)


def _table_18(figures: Figures) -> Iterable[str]:
    lines = []
    for row in TABLE_18:
        entry = figures.get(row.model)
        if entry is None:
            continue
        found = entry["gpu_days"][ON_THE_FLY]["V100"]
        days = found["days"] * row.images / entry["paper_images"]
        share = days * found["share_of_peak"] / row.v100_days
        lines.append(
            [
                row.what,
                _digits(row.v100_days),
                f"{share:.0%}",
                f"{days:.1f} ({found['share_of_peak']:.0%}; {found['basis']})",
            ]
        )
    if lines:
        yield "## Beside the paper's Table 18"
        yield _table(
            ["", "V100-days, paper", "the share of 120 TFLOP/s that they mean", "V100-days here, by counted FLOPs"],
            lines,
        )
        yield (
            "The paper counts an A100-day as 2.2 V100-days and encodes on the fly. Both columns count three forward "
            "passes of the UNet and one of the encoder for each image."
        )


def _days(figures: Figures) -> Iterable[str]:
    yield "## GPU-days to the paper's number of images"
    basis = {gpu["basis"] for e in figures.values() for mode in e["gpu_days"].values() for gpu in mode.values()}
    yield (
        "One GPU, the published network at 256 px: images x FLOPs an image / (peak x share of the peak); "
        + "; ".join(sorted(basis))
        + "."
    )
    if COMPUTED in basis:
        used = [
            f"- {name}: {gpu.utilisation:.1%} of {gpu.peak / 1e12:g} TFLOP/s; {gpu.source}"
            for name, gpu in GPUS.items()
        ]
        yield "\n".join(["Shares that others have published, for every f alike:", "", *used])
    header = ["", "images", *(f"{gpu}: cached; on the fly" for gpu in GPUS), "days here, as measured"]
    lines = []
    for entry in figures.values():
        line = [f"{entry['family']} {entry['name']}", f"{entry['paper_images'] / 1e6:g}M"]
        for gpu in GPUS:
            by_mode = [entry["gpu_days"].get(mode, {}).get(gpu) for mode in WAYS]
            line.append("; ".join(ABSENT if found is None else _digits(found["days"]) for found in by_mode))
        here = [entry.get("days_here", {}).get(mode) for mode in WAYS]
        lines.append([*line, "; ".join(ABSENT if days is None else _digits(days) for days in here)])
    yield _table(header, lines)
    yield "The last column is of the networks that were measured, at the resolution that was measured."


def _families(figures: Figures) -> list[tuple[str, str]]:
    present = {entry["family"] for entry in figures.values()}
    return [(family, title) for family, title in FAMILIES.items() if family in present]


def _of(figures: Figures, family: str) -> list[dict[str, Any]]:
    return [entry for entry in figures.values() if entry["family"] == family]


def _counted(entry: Mapping[str, Any], name: str) -> str:
    if name == CACHED and CACHED not in entry["gpu_days"]:
        return ABSENT
    return f"{_digits(entry['counted_ratio'][name])} ({_digits(entry['counted_ratio_as_measured'][name])})"


def _median(entry: Mapping[str, Any], what: str, name: str) -> str:
    found = entry.get(what, {}).get(name)
    return ABSENT if found is None else _digits(found["median"])


def _spread(entry: Mapping[str, Any], what: str, name: str) -> str:
    found = entry.get(what, {}).get(name)
    if found is None:
        return ABSENT
    return f"{_digits(found['median'])} ({_digits(found['lower_quartile'])} to {_digits(found['upper_quartile'])})"


def _mib(entry: Mapping[str, Any], name: str) -> str:
    found = _peak(entry, name)
    return ABSENT if found is None else f"{found / 2**20:,.0f}"


def _peak(entry: Mapping[str, Any], name: str) -> int | None:
    """Bytes; of pixels, which are their own latents, both ways are one."""
    if name == CACHED and entry["f"] == 1 and CACHED in entry["gpu_days"]:
        name = ON_THE_FLY
    found: int | None = entry.get("peak_bytes", {}).get(name)
    return found


def _digits(value: float) -> str:
    """Three digits that mean something, no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
