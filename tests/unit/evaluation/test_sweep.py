"""Rows of a sweep as table, CSV and plot, also where some or all of their figures could not be taken."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm_scale.evaluation.sweep import FIGURES, plot_sweep, sweep_table, write_csv

NAMES = {"frechet": "FD-Net", "coverage": "coverage (Net)"}


def rows(*distances: float | None) -> list[dict[str, Any]]:
    found = []
    for steps, distance in enumerate(distances, 1):
        row: dict[str, Any] = {"weights": "raw $w$", "guidance_scale": 1.0, "num_steps": steps, "device": "cpu $x$"}
        row |= {"sampling_images_per_s": 2.0 / steps, "num_images": 8}
        for name in FIGURES:
            value = distance if name == "frechet" else 0.5
            row |= {name: value, f"{name}_low": None, f"{name}_high": None}
        found.append(row)
    return found


@pytest.mark.parametrize("distances", [(None, None), (3.0, None, 1.0), (None,), (2.0, 1.0)])
def test_what_could_not_be_taken_is_a_dash(tmp_path: Path, distances: tuple[float | None, ...]) -> None:
    found = rows(*distances)
    lines = sweep_table(found, NAMES).splitlines()[1:]
    cells = [line.split()[-3] for line in lines]
    taken = sorted(value for value in distances if value is not None)
    assert cells == [f"{value:.3f}" for value in taken] + ["-"] * distances.count(None)
    write_csv(found, tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open() as file:
        read = [row["frechet"] for row in csv.DictReader(file)]
    assert read == ["" if value is None else str(value) for value in distances]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_sweep(found, NAMES, r"a$\frac{$/run, 16 px", tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as picture:
        picture.load()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.csv", "sweep.png"]
