"""`ldm-scale evaluate sweep`: every cell, CSV and plot, finished cells reused, other models and requests refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm_scale.__main__ import main
from ldm_scale.config.schema import ClassConditioningConfig, ConditioningConfig
from ldm_scale.data import open_manifest
from ldm_scale.evaluation.features import EfficientNetFeatures
from ldm_scale.operations import evaluate_sweep
from tests.helpers.models import SIDE, tiny_model
from tests.helpers.scenes import make_squares
from tests.helpers.small_features import taken_for_evaluation


@pytest.fixture(scope="module", autouse=True)
def one_network() -> Iterator[None]:
    with taken_for_evaluation():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_squares(tmp_path_factory.mktemp("squares"), 34, SIDE)


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    classes = ConditioningConfig(classes=ClassConditioningConfig(num_classes=3, width=16))
    return tiny_model(tmp_path_factory.mktemp("model"), classes, open_manifest(data, "heldout").labels)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cells that were sampled."""
    names: list[str] = []
    plain = evaluate_sweep.evaluate_diffusion

    def counted(arguments: Any, **options: Any) -> dict[str, Any]:
        document = plain(arguments, **options)
        names.append(arguments.out.name)
        return document

    monkeypatch.setattr(evaluate_sweep, "evaluate_diffusion", counted)
    return names


def command(model: Path, data: Path, out: Path, *arguments: str) -> list[str]:
    fixed = ["--data", str(data), "--device", "cpu", "--out", str(out), "--resamples", "0", "--batch", "32"]
    return ["evaluate", "sweep", str(model), *fixed, *arguments]


GRID = ("--guidance", "1", "2", "--steps", "1", "2")


def test_a_sweep_measures_every_cell_and_goes_on_where_it_was(
    model: Path, data: Path, tmp_path: Path, sampled: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    looked_at: list[int] = []
    extract = EfficientNetFeatures.extract

    def counted(self: EfficientNetFeatures, images: torch.Tensor) -> torch.Tensor:
        looked_at.append(len(images))
        return extract(self, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EfficientNetFeatures, "extract", counted)
        assert main(command(model, data, out, *GRID)) == 0
    assert sum(looked_at) == (2 + 4) * 34, "real images and their reconstructions once, the samples of every cell"
    table = capsys.readouterr().out
    assert "FD-EffNetLite0-PCA32" in table
    assert table.count("raw") == 4
    cells = [f"raw-w{w}-steps{s}" for w in (1, 2) for s in (1, 2)]
    assert sampled == cells
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["guidance_scale"], row["num_steps"]) for row in rows] == [
        ("1.0", "1"),
        ("1.0", "2"),
        ("2.0", "1"),
        ("2.0", "2"),
    ]
    for row, cell in zip(rows, cells, strict=True):
        document = json.loads((out / "cells" / cell / "result.json").read_text())
        assert float(row["frechet"]) == document["figures"]["samples"]["frechet"]["value"]
        assert float(row["sampling_images_per_s"]) == document["machine"]["sampling_images_per_s"] > 0
    with Image.open(out / "sweep.png") as picture:
        picture.load()
        assert picture.width > 1000

    # Killed within a cell: the cell has no result, or a damaged one.
    (out / "cells" / cells[1] / "result.json").unlink()
    (out / "cells" / cells[2] / "result.json").write_text("{")
    sampled.clear()
    assert main([*command(model, data, out, "--guidance", "1", "2", "--steps", "1", "2", "3"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert sampled == [cells[1], "raw-w1-steps3", cells[2], "raw-w2-steps3"]
    assert len(document["cells"]) == 6

    sampled.clear()
    assert main(command(model, data, out, "--guidance", "1", "--steps", "1", "--seed", "1")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "holds a sweep of another request: seed was 0 and is 1" in line
    other = tmp_path / "cells-of-others"
    other.mkdir()
    (out / "sweep.json").rename(other / "sweep.json")
    (out / "cells").rename(other / "cells")
    path = other / "cells" / cells[0] / "result.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"model": content["model"] | {"content_sha256": "ab" * 32}}))
    assert main(command(model, data, other, *GRID)) == 2
    assert "is of other weights (abababababab) than" in capsys.readouterr().err.splitlines()[-1]
    assert sampled == []
    assert main(command(model, data, other, "--guidance", "1", "--steps", "1", "--overwrite")) == 0
    assert sampled == [cells[0]]


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--num-images", "32"], 2, "a sweep of 32 samples has no distance to plot, which takes 33"),
        (["--guidance", "1", "-2"], 2, "--guidance -2"),
        (["--steps", "10", "0"], 2, "--steps 0"),
        (["--weights", "raw", "ema"], 2, "holds raw weights alone"),
        (["--batch", "0"], 2, "--batch 0"),
        (["--resamples", "1"], 2, "--resamples 1"),
        (["--out", "FILE"], 2, "is a file; give a folder for sweep.csv"),
        (["--split", "test"], 3, "no split 'test'"),
    ],
)
def test_mistakes_are_found_before_the_first_cell(
    model: Path,
    data: Path,
    tmp_path: Path,
    sampled: list[str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    expected: str,
) -> None:
    (tmp_path / "file").touch()
    arguments = [str(tmp_path / "file") if argument == "FILE" else argument for argument in arguments]
    assert main(command(model, data, tmp_path / "sweep", *arguments)) == status
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert expected in line
    assert sampled == []
    assert not (tmp_path / "sweep").exists()
