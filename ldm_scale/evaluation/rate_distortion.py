"""Distortion over rate for several autoencoders: what arXiv:2112.10752, figure 2, draws, with measured points.

The x axis is bits per pixel under the best code that treats all places alike (`rate.py`), so that KL and VQ models lie
on one axis; a thin line leads to what the model was trained with. Left panel: PSNR. Right panel: the perceptual
distance, as a share of that between unrelated images. Where the right curve is still flat while the left one has
long fallen, bits were perceptual: the autoencoder may throw them away. Where the right one rises, what goes is content,
which a latent diffusion model is there to model and should get to see. The rate of a KL model is that of a
sample of its posterior, its distortion that of the mode, which is a little lower.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_scale.engine.tensor_file import replace_file
from ldm_scale.errors import ConfigError
from ldm_scale.evaluation.rate import PIXEL_BITS
from ldm_scale.evaluation.results import Result, reading, require_one_protocol, unique_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"kl": "tab:blue", "vq": "tab:orange", "identity": "tab:gray"}
_LABELS_TO_THE_LEFT = 8.0  # bits per pixel from which a label would leave the picture
_X_LABEL = "rate of the latents, bits per pixel (pixels are stored in 24)"
_LEAST_RATE = 1e-4  # where a collapsed model of rate 0 is drawn: the axis is logarithmic
_MARKERS = {"kl": "o", "vq": "s", "identity": "D"}


def rate_distortion(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each model, from the highest rate to the lowest.

    `bits_per_pixel` is the fitted bound, `bits_per_pixel_trained` the one of training. `bits_removed` is the share of
    the 24 bits of a pixel that the latents no longer carry; `perceptual_lost` is the perceptual distance as a share of
    that between unrelated images (None where that is not known).
    Raises: ConfigError if the results were measured under different protocols.
    """
    require_one_protocol(results)
    rows = []
    for label, result in zip(unique_labels(results), results, strict=True):
        with reading(result):
            rows.append({"label": label, **_point(result)})
    return sorted(rows, key=lambda row: -row["bits_per_pixel"])


def _point(result: Result) -> dict[str, Any]:
    figures = result.figures
    fitted, trained = _rates(figures["rate"])
    distance, unrelated = figures["perceptual"]["mean"], figures["perceptual"]["unrelated"]
    return {
        "kind": result.model["kind"],
        "f": result.model["f"],
        "numbers_per_pixel": figures["rate"]["numbers_per_pixel"],
        "bits_per_pixel": fitted,
        "bits_per_pixel_trained": trained,
        "bits_removed": 1.0 - fitted / PIXEL_BITS,
        "psnr_db": figures["psnr_db"]["mean"],
        "perceptual": distance,
        "perceptual_lost": distance / unrelated if unrelated else None,
    }


def rate_distortion_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people."""
    width = max(len(row["label"]) for row in rows)
    lines = [
        f"{'model':<{width}}  bits/pixel  numbers/pixel  of 24 bits removed  PSNR, dB  perceptual content lost",
        *(
            f"{row['label']:<{width}}  {row['bits_per_pixel']:>10.4f}  {row['numbers_per_pixel']:>13.4f}  "
            f"{row['bits_removed']:>18.2%}  {_cell(row['psnr_db'], '.2f', 'exact'):>8}  "
            f"{_cell(row['perceptual_lost'], '.2%', '-'):>23}"
            for row in rows
        ),
    ]
    return "\n".join(lines)


def plot_rate_distortion(results: Sequence[Result], path: Path) -> list[dict[str, Any]]:
    """The rows of `rate_distortion`, after drawing them into a PNG.

    Raises: ConfigError if the results were measured under different protocols, or `path` is no PNG.
    """
    rows = rate_distortion(results)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--out {path}: the plot is a PNG; give a name that ends in .png")
    # matplotlib takes a second to import. The figure belongs to no window, so no backend is chosen for the process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = results[0]
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    name = first.figures["perceptual"]["name"]
    finite = [row["psnr_db"] for row in rows if row["psnr_db"] is not None]
    ceiling = max(finite, default=40.0) + 5.0  # where models that lose nothing are drawn
    _draw(left, rows, [ceiling if row["psnr_db"] is None else row["psnr_db"] for row in rows])
    left.set_ylabel("PSNR, dB" + ("" if len(finite) == len(rows) else " (top: exact)"))
    left.set_title("Distortion of pixels")
    shares = [row["perceptual_lost"] for row in rows]
    if None in shares:
        _draw(right, rows, [row["perceptual"] for row in rows])
        right.set_ylabel(name)
    else:
        _draw(right, rows, [100.0 * share for share in shares])
        right.set_ylabel(f"{name}, % of unrelated images'")
    right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))
    right.set_title("Distortion of content")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel(_X_LABEL)
        axes.grid(alpha=0.3)
    right.set_xlabel(
        f"{_X_LABEL}\nleft: content goes, semantic compression, the latent model's part"
        "\nright: only detail goes, perceptual compression, the autoencoder's part"
    )
    with reading(first):
        data = first.protocol["data"]
        what = f"{data['num_images']} images, {first.protocol['resolution']} px, data {data['digest'][:8]}"
    figure.suptitle(f"{what}; thin lines lead to the rate of training (KL from N(0, 1), log2|Z|)", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(figure, path)
    return rows


def write_figure(figure: Figure, path: Path) -> None:
    """Nothing; the PNG is there whole, or as it was. Dollars in what it says are dollars, and begin no formula."""
    from matplotlib.text import Text

    # Ticks of logarithmic axes are formulas of matplotlib's own.
    ticks = {text for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for text in axis.findobj(Text)}
    for text in set(figure.findobj(Text)) - ticks | {
        axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
    }:
        assert isinstance(text, Text)
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    replace_file(path, buffer.getvalue())


def _draw(axes: Axes, rows: Sequence[dict[str, Any]], heights: Sequence[float]) -> None:
    """Nothing; a point for each model, models of a kind joined in the order of their rates."""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        points = [(row, y) for row, y in zip(rows, heights, strict=True) if row["kind"] == kind]
        color = _COLORS.get(kind, "black")
        rates = [max(row["bits_per_pixel"], _LEAST_RATE) for row, _ in points]
        axes.plot(rates, [y for _, y in points], color=color, marker=_MARKERS.get(kind, "x"), label=kind)
        for rate, (row, y) in zip(rates, points, strict=True):
            trained = max(row["bits_per_pixel_trained"], _LEAST_RATE)
            axes.hlines(y, rate, trained, color=color, linewidth=0.8, alpha=0.6)
            side = {"xytext": (-4, 5), "ha": "right"} if rate > _LABELS_TO_THE_LEFT else {"xytext": (4, 5)}
            axes.annotate(row["label"], (rate, y), textcoords="offset points", fontsize=8, **side)
    axes.legend(fontsize=8)


def _rates(rate: dict[str, float]) -> tuple[float, float]:
    """Bits per pixel: the fitted bound, and the one of training."""
    for fitted, trained in (
        ("kl_bits_per_pixel_fitted", "kl_bits_per_pixel"),
        ("code_entropy_bits_per_pixel", "code_bits_per_pixel"),
        ("stored_bits_per_pixel", "stored_bits_per_pixel"),
    ):
        if fitted in rate:
            return rate[fitted], rate[trained]
    raise KeyError(f"no rate among {sorted(rate)}")


def _cell(value: float | None, form: str, absent: str) -> str:
    return absent if value is None else format(value, form)
