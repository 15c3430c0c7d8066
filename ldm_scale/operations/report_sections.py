"""The sections of a run's page, each from what could be read, or None where there is nothing to show."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ldm_scale.errors import ConfigError
from ldm_scale.evaluation.results import Result, require_one_protocol
from ldm_scale.operations.report_charts import count_text, draw, number_text, stacked_bar
from ldm_scale.operations.report_curves import Series, groups
from ldm_scale.operations.report_html import Html, details, joined, table, tag
from ldm_scale.operations.report_pictures import Album, figures
from ldm_scale.operations.report_run import Attempt, RunFolder, plain
from ldm_scale.telemetry.events import EventPicture

_STATUS = {
    "finished": "finished",
    "running": "running",
    "stopped": "stopped in good order; the same command continues it",
    "failed": "ended with an error",
    "dead": "ended without notice, or has said nothing for 15 minutes",
    "unknown": "of unknown state",
}
_SHOWN_ROWS = 20
_MAX_EVALUATION_PICTURES = 2


def header(run: RunFolder) -> Html:
    """What the run is and how far it has come."""
    config, total = run.config, run.total_images
    name = config.get("experiment") or run.path.resolve().name
    stage = config.get("stage", "a run of unknown configuration")
    progress = None
    if total:
        share = min(1.0, run.images / total)
        progress = tag("div", tag("div", "", style=f"width: {share:.1%}"), class_="progress", title=f"{share:.1%}")
    of = f" of {total:,}" if total else ""
    return tag(
        "header",
        tag("h1", name),
        tag("p", tag("span", run.status, class_=f"badge {run.status}"), f" {stage}, {_STATUS[run.status]}"),
        progress,
        tag("p", f"{run.images:,}{of} images seen; {run.path}", class_="muted"),
    )


def tiles(run: RunFolder, series: Series) -> Html:
    """The figures that people look at first."""
    wanted = (
        ("loss", "training loss"),
        ("loss/reconstruction", "reconstruction loss"),
        ("validation/ema/mean", "held-out loss, averaged weights"),
        ("validation/raw/mean", "held-out loss, trained weights"),
        ("validation/psnr_db", "held-out PSNR, dB"),
        ("validation/accuracy/ema/mean", "held-out accuracy, averaged weights"),
        ("images_per_s", "images a second"),
        ("throughput/mfu", "MFU"),
        ("throughput/model_tflops_per_s", "model TFLOP/s a rank"),
        ("memory/device_peak_gib", "GiB of the device at the peak"),
        ("memory/host_peak_gib", "GiB of the host at the peak"),
    )
    found = [(words, number_text(last)) for name, words in wanted if (last := _last(series, name)) is not None]
    if run.attempts:
        unit = _unit(run.attempts[-1])
        found += [(f"{unit}-hours", number_text(sum(attempt.device_hours for attempt in run.attempts)))]
        found += [("restarts", str(len(run.attempts) - 1))]
    cells = (tag("div", tag("b", value), tag("span", words), class_="tile") for words, value in found)
    return tag("div", *cells, class_="tiles")


def trouble(run: RunFolder) -> Html | None:
    """What the run's own diagnosis has found, steps that were skipped, hangs, and what this page lacks."""
    parts: list[object] = []
    found = run.events.texts.get("diagnosis", [])
    if found:
        images, words = found[-1]
        paragraphs = [tag("p", text) for text in words.split("\n\n")]
        parts += [tag("h3", f"Diagnosis at {images:,} images"), *paragraphs]
    if run.skipped:
        rows = [
            (f"{r['images'][0]:,}", r.get("reason", ""), r.get("action", ""), plain(r.get("values", "")))
            for r in run.skipped
        ]
        parts.append(tag("h3", f"{len(run.skipped)} steps in trouble"))
        parts.append(table(rows[-_SHOWN_ROWS:], ("first image", "reason", "action", "values")))
    for when, verdict in run.hangs:
        parts += [tag("h3", f"Hang {when}"), tag("pre", verdict)]
    losses = run.state.get("losses")
    if isinstance(losses, Mapping) and losses.get("total"):
        parts.append(tag("p", f"{losses['total']} samples could not be used (bad_samples.jsonl names them)."))
    if run.missing:
        parts += [tag("h3", "What this page lacks"), tag("ul", *(tag("li", text) for text in run.missing))]
    return section("Findings", *parts) if parts else None


def pictures(run: RunFolder, album: Album) -> Html | None:
    """Samples or reconstructions; curves that the run has drawn itself only where their figures are lost."""
    shown: dict[str, list[EventPicture]] = {
        name: images
        for name, images in run.events.pictures.items()
        if not (name.startswith("validation/") and run.rows)
    }
    found = list(figures(shown, album, run.missing))
    return section("Pictures", *found) if found else None


def curves(run: RunFolder, series: Series) -> Iterator[Html]:
    """All figures over the images seen, and where the time went."""
    for group in groups(series, run.config):
        charts = [drawn for chart in group.charts if (drawn := draw(chart))]
        if not charts:
            continue
        words = tag("p", group.words, class_="muted") if group.words else None
        shares = _time_shares(series) if group.title.startswith("Throughput") else None
        grid = tag("div", *charts, class_="charts")
        if group.title.startswith("All other"):
            yield section(group.title, details(f"{len(charts)} charts", grid))
        else:
            yield section(group.title, words, shares, grid)


def _time_shares(series: Series) -> Html | None:
    prefix = "time_share/"
    means = {}
    for name, points in series.items():
        values = [y for _, y in points if y is not None]
        if name.startswith(prefix) and values:
            means[name.removeprefix(prefix)] = sum(values) / len(values)
    return stacked_bar("Where the time went, mean over the run", list(means.items())) if means else None


def evaluations(results: Sequence[Result], album: Album, missing: list[str]) -> Html | None:
    """Figures with the protocol that they were measured under, and whether they may be set side by side."""
    if not results:
        return None
    parts: list[object] = []
    if len(results) > 1:
        try:
            require_one_protocol(results)
        except ConfigError as error:
            parts.append(tag("p", f"Not to be compared with one another: {error}", class_="warning"))
    for result in results:
        figures_of = table([(name, value) for name, value in _flat(result.figures)])
        protocol = table([(name, value) for name, value in _flat(result.protocol)])
        model = table([(name, value) for name, value in _flat(result.model)])
        parts.append(
            tag(
                "article",
                tag("h3", result.label),
                tag("p", result.source, class_="muted"),
                figures_of,
                *_evaluation_pictures(Path(result.source).parent, album, missing),
                details("protocol", protocol),
                details("model", model),
            )
        )
    return section("Evaluations", *parts)


def _evaluation_pictures(folder: Path, album: Album, missing: list[str]) -> Iterator[Html]:
    for path in sorted(folder.glob("*.png"))[:_MAX_EVALUATION_PICTURES]:
        try:
            picture = album.embedded(path.read_bytes(), path.name)
        except (OSError, SyntaxError, ValueError) as error:
            missing.append(f"the picture {path} is damaged ({error})")
            continue
        if picture is not None:
            yield tag("figure", picture, tag("figcaption", path.name), class_="picture")


def cost(run: RunFolder) -> Html | None:
    """What the run has taken so far, attempt by attempt."""
    training_s = (run.result or run.state).get("training_s")
    facts = [("images", f"{run.images:,}")]
    if isinstance(training_s, int | float):
        facts.append(("time in training steps", _duration(training_s)))
    if run.attempts:
        wall_s = sum(attempt.seconds for attempt in run.attempts)
        facts.append(("time of all attempts, start and pauses included", _duration(wall_s)))
        if isinstance(training_s, int | float) and wall_s:
            facts.append(("share of it in training steps", f"{training_s / wall_s:.1%}"))
        unit = _unit(run.attempts[-1])
        facts.append((f"{unit}-hours", number_text(sum(attempt.device_hours for attempt in run.attempts))))
        facts.append(("restarts", str(len(run.attempts) - 1)))
    rows = [
        (
            _clock(attempt.start["time"]),
            _duration(attempt.seconds),
            f"{attempt.start['images']:,} to {attempt.images:,}",
            f"{attempt.start['ranks']} x {attempt.start.get('device', '?')}",
            attempt.reason or "runs, or ended without notice",
        )
        for attempt in run.attempts
    ]
    shown = rows[-_SHOWN_ROWS:]
    more = tag("p", f"{len(rows) - len(shown)} earlier ones are not shown") if len(rows) > len(shown) else None
    heads = ("began (UTC)", "lasted", "images", "ranks", "ended")
    attempts = details(f"{len(rows)} attempts", more, table(shown, heads), is_open=len(rows) < 6) if rows else None
    return section("Cost", table(facts), attempts)


def checkpoints(run: RunFolder) -> Html | None:
    """What can be continued from, sampled and exported; sizes are checked here, checksums at the next start."""
    if not run.checkpoints and run.result is None:
        return None
    rows = [
        (
            c.name,
            "-" if c.images is None else f"{c.images:,}",
            f"{c.num_bytes / 2**20:,.1f} MiB",
            c.trouble or "whole, by its sizes",
        )
        for c in run.checkpoints
    ]
    product = {name: value for name, value in (run.result or {}).items() if name != "findings"}
    return section(
        "Checkpoints and product",
        table(rows, ("folder", "images", "size", "state")) if rows else None,
        details("what the run has left (result.json)", table(list(_flat(product)))) if product else None,
    )


def environment(run: RunFolder) -> Html | None:
    """Machine, sizes and versions of the last attempt."""
    if not run.attempts:
        return None
    start = run.attempts[-1].start
    hosts = start.get("hosts", {})
    facts = [
        ("device", f"{start['ranks']} x {start.get('device', '?')}"),
        ("hosts", ", ".join(f"{host} ({count})" for host, count in hosts.items()) or "?"),
        ("precision", start.get("precision", "?")),
        (
            "global batch",
            f"{start['ranks']} ranks x {start.get('micro_batch')} images x {start.get('accumulation_steps')}",
        ),
        ("trained parameters", f"{start.get('parameters', 0):,}"),
        ("forward FLOPs an image", count_text(float(start.get("forward_flops", 0)))),
        ("Slurm job", start.get("slurm_job") or "none"),
    ]
    versions = [(name, value or "-") for name, value in start["versions"].items()]
    return section("Environment", table(facts), details("versions", table(versions)))


def configuration(run: RunFolder) -> Html | None:
    """Every key, section by section."""
    if not run.config:
        return None
    top = [(name, plain(value)) for name, value in run.config.items() if not isinstance(value, dict)]
    parts = [table(top)]
    for name, values in run.config.items():
        if isinstance(values, dict):
            parts.append(details(name, table([(key, value) for key, value in _flat(values)])))
    return section("Configuration", *parts)


def section(title: str, *parts: object) -> Html:
    """A part of the page with its heading, by which it can be linked."""
    name = "".join(c if c.isalnum() else "-" for c in title.lower())
    return tag("section", tag("h2", title), *parts, id=name)


def contents(sections: Sequence[Html]) -> Html:
    """Links to the sections."""
    titles = [text.partition("<h2>")[2].partition("</h2>")[0] for text in sections]
    names = [text.partition('id="')[2].partition('"')[0] for text in sections]
    links = (tag("a", Html(title), href=f"#{name}") for title, name in zip(titles, names, strict=True))
    return tag("nav", joined(links))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values for people; a mean and its deviation are one row."""
    for name, value in values.items():
        if isinstance(value, Mapping) and {"mean", "std"} <= value.keys() and isinstance(value["mean"], int | float):
            yield f"{prefix}{name}", f"{number_text(value['mean'])} +- {number_text(value['std'])}"
            value = {key: inner for key, inner in value.items() if key not in ("mean", "std")}
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            is_number = isinstance(value, float) and not isinstance(value, bool)
            yield f"{prefix}{name}", number_text(value) if is_number else plain(value)


def _last(series: Series, name: str) -> float | None:
    values = [y for _, y in series.get(name, ()) if y is not None]
    return values[-1] if values else None


def _unit(attempt: Attempt) -> str:
    return "GPU" if attempt.start.get("device_type") == "cuda" else "rank"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    text = time.strftime("%H:%M:%S", time.gmtime(rest))
    return f"{days} d {text}" if days else text


def _clock(at_s: float) -> str:
    return datetime.fromtimestamp(float(at_s), UTC).strftime("%Y-%m-%d %H:%M:%S")
