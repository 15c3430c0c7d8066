"""Curves of runs as one picture: `python -m benchmarks.curves RUN... --out curves.png [--scalars a,b]`.

One panel for each scalar of metrics.jsonl, one line for each run that has it, over images seen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ldm_scale.telemetry.tensorboard import read_metrics

DEFAULT = "validation/psnr_db,validation/perceptual,discriminator/accuracy"
PANELS_PER_ROW = 3

Points = list[tuple[int, float]]


def read_scalars(run: Path, names: Sequence[str], from_images: int = 0) -> dict[str, Points]:
    """(images seen, value) of each of the scalars that the run has, in order."""
    scalars: dict[str, Points] = {}
    for row in read_metrics(run):
        if row["images"] >= from_images:
            for name in names:
                if row.get(name) is not None:
                    scalars.setdefault(name, []).append((row["images"], row[name]))
    return scalars


def plot(runs: Sequence[Path], names: Sequence[str], out: Path, from_images: int = 0) -> None:
    """Writes the picture; panels keep the order of `names`."""
    scalars = {run.name: read_scalars(run, names, from_images) for run in runs}
    columns = min(PANELS_PER_ROW, len(names))
    rows = -(-len(names) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(6 * columns, 4.5 * rows), squeeze=False)
    panels = list(grid.flat)
    for panel, name in zip(panels, names, strict=False):
        for run, found in scalars.items():
            if name in found:
                panel.plot(*zip(*found[name], strict=True), label=run, linewidth=1.2)
        panel.set_title(name)
        panel.set_xlabel("images seen")
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize=7)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> int:
    """0 when the picture is written, 2 if a run has none of the scalars."""
    parser = argparse.ArgumentParser(description="Plots scalars of runs over images seen.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--scalars", default=DEFAULT, help=f"names with commas ({DEFAULT})")
    parser.add_argument("--from-images", type=int, default=0, help="leave out what came before (0)")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    arguments = parser.parse_args()
    names = arguments.scalars.split(",")
    for run in arguments.runs:
        if not read_scalars(run, names):
            print(f"error: {run}/metrics.jsonl has none of {', '.join(names)}; give a run_dir", file=sys.stderr)
            return 2
    plot(arguments.runs, names, arguments.out, arguments.from_images)
    return 0


if __name__ == "__main__":
    sys.exit(main())
