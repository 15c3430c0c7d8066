"""Curves of finished runs as one picture: `python -m benchmarks.curves RUN... --out curves.png [--scalars a,b]`.

One panel for each TensorBoard scalar, one line for each run, over images seen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DEFAULT = "validation/psnr_db,validation/perceptual,discriminator/accuracy"


def read_scalars(run: Path) -> dict[str, dict[int, float]]:
    """Scalar name -> images seen -> value, from all event files of a run; the later file wins."""
    scalars: dict[str, dict[int, float]] = {}
    for events in sorted(run.rglob("*tfevents*")):
        accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0})
        accumulator.Reload()
        for name in accumulator.Tags()["scalars"]:
            scalars.setdefault(name, {}).update({event.step: event.value for event in accumulator.Scalars(name)})
    return scalars


def main() -> int:
    """0 when the picture is written, 2 if a run has none of the scalars."""
    parser = argparse.ArgumentParser(description="Plots TensorBoard scalars of runs over images seen.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--scalars", default=DEFAULT, help=f"names with commas ({DEFAULT})")
    parser.add_argument("--from-images", type=int, default=0, help="leave out what came before (0)")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    arguments = parser.parse_args()
    names = arguments.scalars.split(",")
    figure, panels = plt.subplots(1, len(names), figsize=(6 * len(names), 4.5), squeeze=False)
    for run in arguments.runs:
        scalars = read_scalars(run)
        if not any(name in scalars for name in names):
            print(f"error: {run} has no TensorBoard scalar of {', '.join(names)}; give a run_dir", file=sys.stderr)
            return 2
        for panel, name in zip(panels[0], names, strict=True):
            points = sorted((k, v) for k, v in scalars.get(name, {}).items() if k >= arguments.from_images)
            if points:
                panel.plot(*zip(*points, strict=True), label=run.name, linewidth=1.2)
    for panel, name in zip(panels[0], names, strict=True):
        panel.set_title(name)
        panel.set_xlabel("images seen")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
