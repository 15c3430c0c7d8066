"""Scalars and pictures of a run: TensorBoard's event files for people, metrics.jsonl for programs.

The only file that imports tensorboard, and only in the constructor: that takes a second or two, which ranks and
commands that write nothing should not pay. metrics.jsonl repeats the scalars, one JSON object a line, so that plots,
reports and tests read a run with the standard library alone. The horizontal axis of both is the images seen.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ldm_scale.telemetry.log import get_logger
from ldm_scale.telemetry.side_files import RowFile, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
RETRY_S = 30.0  # between two attempts to begin an event file
ROOM_BYTES = 1 << 20  # that the disk must have for one: a few pictures
CAPTIONS = "captions"
_RESERVED = ("images", "time")
_Adding = Callable[["SummaryWriter"], None]


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

    Where the disk refuses an event file, another one is begun as soon as it takes one.
    """

    def __init__(self, run_dir: Path | str, enabled: bool, resume_images: int | None = None) -> None:
        self._folder = Path(run_dir) / TENSORBOARD_FOLDER
        self._enabled = enabled
        self._events: SummaryWriter | None = None
        self._preludes: list[_Adding] = []  # what every event file begins with: charts, the configuration
        self._images = self._sure_images = resume_images or 0  # seen last; up to which TensorBoard has everything
        self._is_refused = False
        self._retry_s = 0.0
        if not enabled:
            return
        self._hook, threading.excepthook = threading.excepthook, self._tell
        # TensorBoard hides events from purge_step on, that step included.
        self._purge_step: int | None = 0 if resume_images is None else resume_images + 1
        first_seen_again = self._purge_step
        self._metrics = RowFile(Path(run_dir) / METRICS_FILE)
        self._metrics.cut(lambda row: bool(row["images"] < first_seen_again))
        self._to_events(lambda events: None, self._images)

    def add_scalars(self, scalars: Mapping[str, float], images_seen: int) -> None:
        """Adds one row. A value that is not finite becomes null in metrics.jsonl, which JSON has no number for."""
        if not self._enabled:
            return
        values = {name: float(value) for name, value in scalars.items()}
        assert not set(values) & set(_RESERVED), f"{_RESERVED} are the row's own names; given: {sorted(values)}"
        row: dict[str, Any] = {"images": images_seen, "time": round(time.time(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        if not self._metrics.append(row):
            self._give_up(f"as {METRICS_FILE}")
            self._retry_s = 0.0  # the next row that is taken says that there is room
            return

        def add(events: SummaryWriter) -> None:
            for name, value in values.items():
                events.add_scalar(name, value, images_seen)

        self._to_events(add, images_seen)

    def add_picture(self, name: str, picture: Tensor, images_seen: int, captions: Sequence[str] = ()) -> None:
        """Adds a picture (3, H, W) in bytes, and what its parts are called as a text, `name`/captions, one a line."""

        def add(events: SummaryWriter) -> None:
            events.add_image(name, picture, images_seen)
            if any(captions):
                events.add_text(f"{name}/{CAPTIONS}", caption_list(captions), images_seen)

        self._to_events(add, images_seen)

    def add_curves(self, name: str, curves: Curves, images_seen: int) -> None:
        """Adds one picture of lines."""
        self._to_events(lambda events: events.add_figure(name, draw_curves(curves), images_seen), images_seen)

    def add_text(self, name: str, text: str, images_seen: int) -> None:
        """Adds a text, in Markdown."""
        self._to_events(lambda events: events.add_text(name, text, images_seen), images_seen)

    def add_charts(self, charts: Mapping[str, Sequence[str]], category: str) -> None:
        """Lays scalars over each other in TensorBoard's page of custom scalars: the title of a chart, and its tags."""
        if charts:
            layout = {category: {title: ["Multiline", list(tags)] for title, tags in charts.items()}}
            self._begin_with(lambda events: events.add_custom_scalars(layout))

    def add_configuration(self, values: Mapping[str, Any], figures: Sequence[str]) -> None:
        """Tells TensorBoard the configuration, by dotted keys: as hyper-parameters, and as a table among the texts.

        `figures` are the names of scalars by which its page of hyper-parameters compares runs.
        """

        def add(events: SummaryWriter) -> None:
            from torch.utils.tensorboard.summary import hparams

            plain = {key: v if isinstance(v, bool | int | float) else str(v) for key, v in values.items()}
            # What these are and that a run with them has begun; the third summary says that it has ended.
            for summary in hparams(plain, dict.fromkeys(figures, 0.0))[:2]:  # type: ignore[no-untyped-call]
                events._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
            rows = [f"| `{key}` | `{str(value).replace('|', chr(92) + '|')}` |" for key, value in values.items()]
            events.add_text("configuration", "\n".join(["| key | value |", "|---|---|", *rows]), self._images)

        self._begin_with(add)

    def flush(self) -> None:
        """Puts everything on disk: before a checkpoint is published, so that it never knows more than the figures."""
        if self._enabled:
            self._metrics.append()
            self._to_events(lambda events: events.flush(), self._images)
            if self._events is not None:
                self._sure_images = self._images

    def close(self) -> None:
        """Ends the files; nothing may be added afterwards."""
        if not self._enabled:
            return
        self.flush()
        if self._events is not None:
            with contextlib.suppress(OSError):  # of what was flushed just now
                self._events.close()
        self._events, self._enabled = None, False
        threading.excepthook = self._hook

    def _tell(self, failure: threading.ExceptHookArgs) -> None:
        """Nothing; an event file's own thread ends without a traceback, since the next call here tells the error."""
        is_ours = type(failure.thread).__module__.startswith("tensorboard.")
        if not (is_ours and isinstance(failure.exc_value, OSError)):
            self._hook(failure)

    def _begin_with(self, add: _Adding) -> None:
        """Nothing; this event file has what `add` adds, and so has every later one."""
        self._to_events(add, self._images)
        self._preludes.append(add)

    def _to_events(self, add: _Adding, images_seen: int) -> None:
        """Nothing; the event file has what `add` adds, if the disk takes one: training is worth more."""
        if not self._enabled:
            return
        self._images = images_seen
        try:
            if self._events is None:
                if time.monotonic() < self._retry_s:
                    return
                self._events = self._begun()
            add(self._events)
        except OSError as error:
            self._give_up(error.strerror or str(error))
            self._retry_s = time.monotonic() + RETRY_S

    def _begun(self) -> SummaryWriter:
        """A new event file, with what each begins with."""
        from torch.utils.tensorboard import SummaryWriter

        _require_room(self._folder)
        events = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        for add in self._preludes:
            add(events)
        events.flush()
        if self._is_refused:
            get_logger().info(
                f"{self._folder} is written again; figures and pictures between images {self._sure_images} and "
                f"{self._images} are missing there, {METRICS_FILE} has the figures"
            )
        self._is_refused, self._purge_step = False, None
        return events

    def _give_up(self, reason: str) -> None:
        """Nothing; what comes next is not added until the next attempt to begin an event file."""
        if not self._is_refused:
            self._is_refused = True
            get_logger().error(
                f"{self._folder} cannot be written ({reason}): free space there, or fix its "
                "permissions; training goes on, and figures with it as soon as they can be written"
            )
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()
        self._events = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl, oldest first; lines that are damaged or cut short are left out."""
    return read_rows(Path(run_dir) / METRICS_FILE, lambda row: row["images"] >= 0)


def caption_list(captions: Sequence[str]) -> str:
    """The captions as a numbered list in Markdown, each on a line of its own."""
    return "\n".join(f"{i}. {' '.join(caption.split())}" for i, caption in enumerate(captions, start=1))


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


def _require_room(folder: Path) -> None:
    """Nothing, if the folder is there and takes a file: TensorBoard leaves an empty one behind where it cannot write.

    Raises: OSError
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".room"
    try:
        probe.write_bytes(bytes(ROOM_BYTES))
    finally:
        probe.unlink(missing_ok=True)
