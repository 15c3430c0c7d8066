"""What `doctor data` found as a picture: samples with their captions, distributions, look-alikes and bad samples.

Everything is placed in inches from the top left corner, a section below the other: the sheet is as high as its content.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ldm_scale.data.indexing import write_whole
from ldm_scale.data.policy import BadSample
from ldm_scale.errors import DataError
from ldm_scale.operations.doctor_duplicates import MAX_BITS
from ldm_scale.operations.doctor_samples import SampleTally, picture_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_SECTIONS = 12  # of splits and parts; matplotlib draws at most 65,536 pixels
_DPI = 100
_WIDTH, _MARGIN, _GAP = 16.0, 0.4, 0.15  # inches
_COLUMNS, _ROWS = 10, 2  # pictures with captions
_SIDE = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) / _COLUMNS  # of a picture
_GROUPS, _OF_GROUP, _ALIKE = 4, 6, 1.0  # look-alikes, and the side of one
_REASONS, _BAD_KEYS = 8, 12
_HEAD, _CAPTION, _PLOTS, _NAME, _REASON = 0.7, 0.42, 2.5, 0.25, 0.24  # heights
_BLUE, _ORANGE, _GREY, _RED = "#4477aa", "#ee8833", "#777777", "#bb3344"


def draw_sheet(path: Path, title: str, tallies: Sequence[SampleTally]) -> None:
    """Nothing; the PNG is at `path`."""
    # matplotlib takes a second to import. The figure belongs to no window, so no backend is chosen for the process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = tallies[:MAX_SECTIONS]
    tops = np.cumsum([0.8, *(_height(tally) for tally in shown)]).tolist()
    figure = Figure(figsize=(_WIDTH, tops[-1] + 0.1), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    sheet = _Sheet(figure)
    sheet.write(_MARGIN, 0.25, f"doctor data {title}", size=15, weight="bold")
    if len(shown) < len(tallies):
        sheet.write(_MARGIN, 0.57, f"the first {len(shown)} of {len(tallies)} splits and parts", color=_GREY)
    for tally, top in zip(shown, tops, strict=False):
        _draw_head(sheet, tally, top)
        _draw_pictures(sheet, tally, top + _HEAD)
        below = top + _HEAD + _rows(tally) * (_SIDE + _CAPTION)
        _draw_distributions(sheet, tally, below)
        _draw_groups(sheet, tally, below + _PLOTS)
        _draw_bad(sheet, tally, below + _PLOTS)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # scripts that the font has not are boxes
        figure.savefig(buffer, format="png", dpi=_DPI)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())


def _rows(tally: SampleTally) -> int:
    """Rows of pictures with captions."""
    return min(_ROWS, -(-tally.usable // _COLUMNS))


def _height(tally: SampleTally) -> float:
    """Inches of a section."""
    groups = min(_GROUPS, len(tally.figures.groups.rows)) * (_ALIKE + _NAME)
    reasons, keys = _reasons(tally), len(_bad_lines(tally))
    bad = _REASON * len(reasons) + 0.15 * keys
    return _HEAD + _rows(tally) * (_SIDE + _CAPTION) + _PLOTS + 0.35 + max(0.3, groups, bad) + 0.5


class _Sheet:
    """A figure with places in inches from its top left corner."""

    def __init__(self, figure: Figure) -> None:
        self._figure = figure
        self._width, self._height = figure.get_size_inches()

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """New axes."""
        bottom = self._height - top - height
        return self._figure.add_axes(
            (left / self._width, bottom / self._height, width / self._width, height / self._height)
        )

    def write(self, left: float, top: float, text: str, *, size: float = 9, **style: Any) -> None:
        """Nothing; the text stands there, its dollars as they are."""
        style = {"ha": "left", "va": "top"} | style
        place = left / self._width, 1 - top / self._height
        self._figure.text(*place, text, fontsize=size, parse_math=False, **style)

    def show(self, picture: Image.Image | None, left: float, top: float, side: float) -> None:
        """Nothing; the picture fills a square, or a cross stands there."""
        axes = self.axes(left, top, side, side)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color("#dddddd")
        if picture is None:
            axes.plot([0, 1], [0, 1], [0, 1], [1, 0], color="#dddddd", linewidth=1)
            return
        pixels = round(side * _DPI)
        shown = ImageOps.pad(picture, (pixels, pixels), Image.Resampling.BICUBIC, "#eeeeee")
        axes.imshow(np.asarray(shown), aspect="auto", interpolation="none")


def _draw_head(sheet: _Sheet, tally: SampleTally, top: float) -> None:
    sheet.write(_MARGIN, top, tally.label, size=13, weight="bold")
    dataset = tally.dataset
    facts = [
        f"{dataset.num_samples:,} samples in {len(dataset.shards):,} shards",
        f"{tally.seen:,} looked at, {len(tally.bad) + len(tally.broken):,} of them bad",
        f"{tally.figures.num_small:,} smaller than the training" if tally.usable else "",
        f"{len(tally.missing) + len(tally.empty):,} without a caption",
        f"{len(tally.twins):,} repeated pictures, {len(tally.figures.groups.rows):,} groups of look-alikes",
    ]
    sheet.write(_MARGIN, top + 0.32, "   |   ".join(filter(None, facts)), size=10, color=_GREY)


def _draw_pictures(sheet: _Sheet, tally: SampleTally, top: float) -> None:
    """Nothing; some usable samples, spread over those looked at, stand there with their captions."""
    numbers = tally.figures.numbers
    chosen = numbers[np.linspace(0, len(numbers) - 1, min(len(numbers), _COLUMNS * _ROWS)).astype(int)].tolist()
    for place, number in enumerate(chosen):
        row, column = divmod(place, _COLUMNS)
        left, above = _MARGIN + column * (_SIDE + _GAP), top + row * (_SIDE + _CAPTION)
        picture, caption = _read(tally, number)
        sheet.show(picture, left, above, _SIDE)
        sheet.write(left, above + _SIDE + 0.05, _wrapped(caption or "(no caption)", round(_SIDE * 17)), size=8)


def _wrapped(text: str, width: int) -> str:
    """A text on two lines of so many characters, cut if need be."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return "\n".join(textwrap.wrap(printable, width, max_lines=2, placeholder=" ..."))


def _read(tally: SampleTally, number: int) -> tuple[Image.Image | None, str]:
    """A sample's picture and caption; None for a picture that has become unreadable."""
    try:
        return picture_of(tally.dataset.read(number))
    except (BadSample, DataError):
        return None, ""


def _draw_distributions(sheet: _Sheet, tally: SampleTally, top: float) -> None:
    figures = tally.figures
    columns: list[tuple[str, list[tuple[str, NDArray[Any]]]]] = [
        ("sides, px", [("width", figures.widths), ("height", figures.heights)]),
        ("width by height", [("", figures.aspects)]),
        ("characters of a caption", [("", figures.characters)]),
        ("words of a caption", [("", figures.words)]),
    ]
    width = (_WIDTH - 2 * _MARGIN) / len(columns)
    for number, (name, rows) in enumerate(columns):
        axes = sheet.axes(_MARGIN + 0.25 + number * width, top + 0.35, width - 0.6, _PLOTS - 1.05)
        axes.set_title(name, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        values = np.concatenate([row for _, row in rows])
        if not len(values):
            axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes, color=_GREY)
            axes.set_xticks([])
            axes.set_yticks([])
            continue
        _draw_histogram(axes, rows, values)


def _draw_histogram(axes: Axes, rows: list[tuple[str, NDArray[Any]]], values: NDArray[Any]) -> None:
    """Nothing; the rows stand in the axes, of which whole numbers are counted and others are ratios."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    if np.issubdtype(values.dtype, np.integer):
        bins = _whole_bins(values)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    else:
        reach = max(1.0, float(np.abs(np.log2(values)).max()))
        bins = np.exp2(np.linspace(-reach, reach, 42)).tolist()  # an odd number of bins: squares have one
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator([2.0**n for n in range(-int(reach), int(reach) + 1)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:.3g}"))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    for (label, row), color in zip(rows, (_BLUE, _ORANGE), strict=False):
        axes.hist(np.clip(row, bins[0], bins[-1]), bins=bins, color=color, alpha=0.6, label=label)
        axes.axvline(float(np.median(row)), color=color, linewidth=1.2, linestyle="--")
    if len(rows) > 1:
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.02, 0.98))
    axes.set_xlabel(
        f"median {np.median(values):.4g}, {values.min():.4g} to {values.max():.4g}", fontsize=8, color=_GREY
    )


def _whole_bins(values: NDArray[Any]) -> list[float]:
    """Edges of at most forty bins of as many whole numbers each; the highest hundredth is counted in the last."""
    low, high = int(values.min()), int(np.percentile(values, 99))
    if high - low < 10:
        low, high = max(0, low - 5), high + 5
    step = -(-(high - low + 1) // 40)
    return np.arange(low - 0.5, high + step + 0.5, step).tolist()


def _draw_groups(sheet: _Sheet, tally: SampleTally, top: float) -> None:
    """Nothing; the largest groups of pictures that look alike stand there, a group a row."""
    rows = tally.figures.groups.rows
    sheet.write(_MARGIN, top, f"Look-alikes: hashes within {MAX_BITS} of 64 bits", size=10.5, weight="bold")
    if not rows:
        sheet.write(_MARGIN, top + 0.3, "none", color=_GREY)
    for number, group in enumerate(rows[:_GROUPS]):
        above = top + 0.35 + number * (_ALIKE + _NAME)
        for column, row in enumerate(group[:_OF_GROUP]):
            picture, _ = _read(tally, int(tally.figures.numbers[row]))
            left = _MARGIN + column * (_ALIKE + _GAP)
            sheet.show(picture, left, above, _ALIKE)
            (key,) = tally.figures.keys_of([row])
            sheet.write(left, above + _ALIKE + 0.03, _cut(key.rpartition("/")[2], 19), size=6.5, color=_GREY)
        left = _MARGIN + min(len(group), _OF_GROUP) * (_ALIKE + _GAP)
        if len(group) > _OF_GROUP:
            sheet.write(left - 0.07, above + _ALIKE / 2, f"{len(group)}\nin all", va="center", color=_GREY, size=8)


def _draw_bad(sheet: _Sheet, tally: SampleTally, top: float) -> None:
    """Nothing; reasons of bad samples stand there as bars, and some of their keys below."""
    left = _WIDTH / 2 + _MARGIN
    sheet.write(left, top, "Bad samples", size=10.5, weight="bold")
    reasons, lines = _reasons(tally), _bad_lines(tally)
    if not reasons:
        sheet.write(left, top + 0.3, f"none of {tally.seen:,} looked at, and none that the index left out", color=_GREY)
        return
    height = _REASON * len(reasons)
    axes = sheet.axes(left + 3.4, top + 0.35, _WIDTH - _MARGIN - left - 4.0, height)
    colors = [_GREY if by_index else _RED for _, _, by_index in reasons]
    axes.barh(range(len(reasons)), [count for _, count, _ in reasons], color=colors, alpha=0.75, height=0.7)
    names = [_cut(f"{reason} (index)" if by_index else reason, 52) for reason, _, by_index in reasons]
    axes.set_yticks(range(len(reasons)), names, fontsize=8)
    axes.set_ylim(len(reasons) - 0.5, -0.5)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for row, (_, count, _) in enumerate(reasons):
        axes.text(count, row, f" {count:,}", va="center", fontsize=8)
    text = "\n".join(_cut(line, 108) for line in lines)
    sheet.write(left, top + 0.5 + height, text, size=7.5, color=_GREY)


def _reasons(tally: SampleTally) -> list[tuple[str, int, bool]]:
    """(reason, samples, whether the index left them out), those found now first."""
    counts = Counter(tally.bad.values())
    if tally.broken:
        counts["in a damaged shard"] = len(tally.broken)
    found = [(reason, count, False) for reason, count in counts.most_common()]
    return (found + [(reason, count, True) for reason, count in tally.left_out.most_common()])[:_REASONS]


def _bad_lines(tally: SampleTally) -> list[str]:
    """Keys of bad samples with their reasons."""
    listed = [*tally.broken.items(), *tally.bad.items()]
    lines = [f"{key}: {reason}" for key, reason in listed[:_BAD_KEYS]]
    return lines if len(listed) <= _BAD_KEYS else [*lines, f"and {len(listed) - _BAD_KEYS:,} more"]


def _cut(text: str, width: int) -> str:
    """One line of at most so many characters."""
    return (_wrapped(text, width).splitlines() or [""])[0]
