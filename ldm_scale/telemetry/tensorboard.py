"""Scalars and pictures of a run: TensorBoard's event files for people, metrics.jsonl for programs.

The only file that imports tensorboard, and only in the constructor: that takes a second or two, which ranks and
commands that write nothing should not pay. metrics.jsonl repeats the scalars, one JSON object a line, so that plots,
reports and tests read a run with the standard library alone. The horizontal axis of both is the images seen.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

import torch
from torch import Tensor

from ldm_scale.telemetry.log import get_logger

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_RESERVED = ("images", "time")


@dataclass(frozen=True)
class Curves:
    """Several lines over one axis of named places, for one picture. A value that is not finite leaves a gap."""

    title: str
    x_label: str
    y_label: str
    places: Sequence[str]
    lines: Mapping[str, Sequence[float]]  # by their names, a value for each place
    references: frozenset[str] = frozenset()  # names of lines that are only there to compare with: dashed


class ScalarWriter:
    """Writes a run's figures below `run_dir`, or nothing at all where `enabled` is False (all ranks but one).

    `resume_images` is the image count that the run continues from: what an earlier attempt wrote beyond it is taken
    back, because those images are seen again. None starts anew and takes everything back.
    """

    def __init__(self, run_dir: Path | str, enabled: bool, resume_images: int | None = None) -> None:
        self._events: SummaryWriter | None = None
        self._metrics: TextIO | None = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        # TensorBoard hides events from purge_step on, that step included.
        purge_step = 0 if resume_images is None else resume_images + 1
        self._events = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=purge_step)
        path = run_dir / METRICS_FILE
        _drop_rows_from(path, purge_step)
        self._metrics = path.open("a", encoding="utf-8", buffering=1)

    def add_scalars(self, scalars: Mapping[str, float], images_seen: int) -> None:
        """Adds one row. A value that is not finite becomes null in metrics.jsonl, which JSON has no number for."""
        if self._events is None or self._metrics is None:
            return
        values = {name: float(value) for name, value in scalars.items()}
        assert not set(values) & set(_RESERVED), f"{_RESERVED} are the row's own names; given: {sorted(values)}"
        row: dict[str, Any] = {"images": images_seen, "time": round(time.time(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._giving_up_quietly():
            for name, value in values.items():
                self._events.add_scalar(name, value, images_seen)
            self._metrics.write(json.dumps(row, allow_nan=False) + "\n")

    def add_image_grid(self, name: str, images: Tensor, images_seen: int, columns: int = 8) -> None:
        """Adds one picture made of `images` (N, 3, H, W) in [-1, 1], row by row."""
        if self._events is not None:
            with self._giving_up_quietly():
                self._events.add_image(name, image_grid(images, columns), images_seen)

    def add_curves(self, name: str, curves: Curves, images_seen: int) -> None:
        """Adds one picture of lines."""
        if self._events is not None:
            with self._giving_up_quietly():
                self._events.add_figure(name, draw_curves(curves), images_seen)

    def add_text(self, name: str, text: str, images_seen: int) -> None:
        """Adds a text, in Markdown."""
        if self._events is not None:
            with self._giving_up_quietly():
                self._events.add_text(name, text, images_seen)

    def add_charts(self, charts: Mapping[str, Sequence[str]], category: str) -> None:
        """Lays scalars over each other in TensorBoard's page of custom scalars: the title of a chart, and its tags."""
        if self._events is not None and charts:
            with self._giving_up_quietly():
                layout = {title: ["Multiline", list(tags)] for title, tags in charts.items()}
                self._events.add_custom_scalars({category: layout})

    def flush(self) -> None:
        """Puts everything on disk: before a checkpoint is published, so that it never knows more than the figures."""
        if self._events is not None and self._metrics is not None:
            with self._giving_up_quietly():
                self._events.flush()
                self._metrics.flush()

    def close(self) -> None:
        """Ends the files; nothing may be added afterwards."""
        if self._events is not None and self._metrics is not None:
            with self._giving_up_quietly():
                self._events.close()
            with contextlib.suppress(OSError):
                self._metrics.close()
        self._events = self._metrics = None

    @contextlib.contextmanager
    def _giving_up_quietly(self) -> Iterator[None]:
        """Ends the writing of figures, with a line in the log, where the disk refuses them: training is worth more."""
        try:
            yield
        except OSError as error:
            get_logger().error(f"figures are no longer written ({error}); training goes on")
            metrics, self._events, self._metrics = self._metrics, None, None
            if metrics is not None:
                with contextlib.suppress(OSError):
                    metrics.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl, oldest first; a last line that was cut short is left out."""
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def image_grid(images: Tensor, columns: int = 8, gap: int = 2) -> Tensor:
    """Images side by side on white, as bytes.

    Shapes: images (N, 3, H, W) in [-1, 1]; returns (3, rows * (H + gap) - gap, columns * (W + gap) - gap) uint8.
    """
    num_images, channels, height, width = images.shape
    columns = min(columns, num_images)
    rows = math.ceil(num_images / columns)
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    padding = pixels.new_full((rows * columns - num_images, channels, height, width), 255)
    tiles = torch.cat([pixels, padding]).reshape(rows, columns, channels, height, width)
    grid = pixels.new_full((channels, rows, height + gap, columns, width + gap), 255)
    grid[:, :, :height, :, :width] = tiles.permute(2, 0, 3, 1, 4)
    grid = grid.reshape(channels, rows * (height + gap), columns * (width + gap))
    return grid[:, : grid.shape[1] - gap, : grid.shape[2] - gap]


def draw_curves(curves: Curves) -> Figure:
    """The picture of lines; dashed references, and places from left to right in their order."""
    # matplotlib takes a second to import. The figure belongs to no window, so no backend is chosen for the process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    xs = range(len(curves.places))
    for name, values in curves.lines.items():
        (line,) = axes.plot(xs, [value if math.isfinite(value) else math.nan for value in values], label=name)
        line.set(**{"linestyle": "--"} if name in curves.references else {"marker": "o"})
    axes.set_xticks(xs, curves.places, rotation=30, ha="right", fontsize=8)
    axes.set(title=curves.title, xlabel=curves.x_label, ylabel=curves.y_label)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _drop_rows_from(path: Path, images: int) -> None:
    """Leaves only the rows below `images` in a metrics file; the old file stays until the new one is whole."""
    if not path.is_file():
        return
    kept = [row for row in read_metrics(path.parent) if row["images"] < images]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(partial, path)
