"""Curves are read from metrics.jsonl and drawn run by run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import curves


def _run(folder: Path, *rows: dict[str, float | None]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row | {"time": 0.0}) + "\n" for row in rows))
    return folder


def test_points_are_those_of_the_metrics(tmp_path: Path) -> None:
    rows: list[dict[str, float | None]] = [{"images": 8, "loss": 2.0}, {"images": 16, "loss": None, "psnr": 9.0}]
    run = _run(tmp_path / "run", *rows, {"images": 24, "loss": 1.0})
    assert curves.read_scalars(run, ["loss", "psnr", "none"]) == {"loss": [(8, 2.0), (24, 1.0)], "psnr": [(16, 9.0)]}
    assert curves.read_scalars(run, ["loss"], from_images=9) == {"loss": [(24, 1.0)]}


def test_a_picture_is_drawn_or_the_run_named_that_has_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "curves.png"
    runs = [_run(tmp_path / "a", {"images": 8, "loss": 2.0}), _run(tmp_path / "b", {"images": 8, "psnr": 2.0})]
    curves.plot(runs, ["loss", "psnr", "none", "more"], out)
    two_rows = Image.open(out).size
    monkeypatch.setattr(sys, "argv", ["curves", str(runs[0]), "--scalars", "loss", "--out", str(out)])
    assert curves.main() == 0
    assert Image.open(out).size < two_rows
    monkeypatch.setattr(sys, "argv", ["curves", *map(str, runs), "--scalars", "loss", "--out", str(out)])
    assert curves.main() == 2
    assert str(runs[1]) in capsys.readouterr().err
