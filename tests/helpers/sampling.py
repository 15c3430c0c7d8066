"""`ldm-scale sample` with tiny models of every kind, what they are given, and what the command leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_scale.__main__ import main
from ldm_scale.config.schema import (
    ClassConditioningConfig,
    ConditioningConfig,
    InpaintingConditioningConfig,
    LayoutConditioningConfig,
    LowResolutionConditioningConfig,
    SemanticMapConditioningConfig,
)
from tests.helpers.models import SIDE, tiny_model
from tests.helpers.runs import TEXT

LAYOUT = LayoutConditioningConfig(num_classes=3, num_tokens=64, max_objects=2, width=16, depth=1, num_heads=2)
CLASSES = ClassConditioningConfig(num_classes=3, width=16)
KINDS = {
    "text": ConditioningConfig(text=TEXT),
    "nothing": ConditioningConfig(),
    "classes": ConditioningConfig(classes=CLASSES),
    "layout": ConditioningConfig(layout=LAYOUT),
    "map": ConditioningConfig(semantic_map=SemanticMapConditioningConfig(num_labels=4)),
    "small": ConditioningConfig(low_resolution=LowResolutionConditioningConfig(factor=4)),
    "fill": ConditioningConfig(text=TEXT, inpainting=InpaintingConditioningConfig()),
}
LABELS = {"classes": ["red", "green", "blue"], "object_classes": ["apple", "ball", "cat"]}


def make_models(folder: Path, *names: str) -> dict[str, Path]:
    """Folders of models by kind; without names, of all kinds."""
    return {name: tiny_model(folder / name, KINDS[name], LABELS) for name in names or KINDS}


def write_inputs(folder: Path) -> dict[str, str]:
    """Paths of a picture, its mask, a map, a layout and others in the folder, by name."""
    generator = np.random.default_rng(0)

    def save(name: str, array: np.ndarray) -> None:
        Image.fromarray(array.astype(np.uint8)).save(folder / name)

    mask = np.zeros((SIDE, SIDE))
    mask[4:12, 2:9] = 255
    labels = np.zeros((SIDE, SIDE))
    labels[:, 8:] = 2
    save("picture.png", generator.integers(0, 256, (SIDE, SIDE, 3)))
    save("wide.png", generator.integers(0, 256, (SIDE, 2 * SIDE, 3)))
    save("odd.png", generator.integers(0, 256, (SIDE, 21, 3)))
    save("small.png", generator.integers(0, 256, (SIDE // 4, SIDE // 4, 3)))
    save("mask.png", mask)
    save("map.png", labels)
    save("unknown.png", labels + 7)
    apple = {"class": "apple", "box": [0, 0, 32, 32]}
    layouts: dict[str, Any] = {
        "layout.json": {"objects": [apple, {"class": 1, "box": [32, 32, 32, 32]}], "size": [64, 64]},
        "fractions.json": {"objects": [{"class": "apple", "box": [0.7, 0.1, 0.3, 0.9]}]},
        "outside.json": {"objects": [{"class": "apple", "box": [40, 0, 32, 32]}], "size": [64, 64]},
        "flat.json": {"objects": [{"class": "apple", "box": [4, 4, 0, 9]}], "size": [64, 64]},
        "dog.json": {"objects": [{"class": "dog", "box": [0, 0, 1, 1]}]},
        "list.json": [1, 2],
    }
    for name, layout in layouts.items():
        (folder / name).write_text(json.dumps(layout))
    return {path.name: str(path) for path in folder.iterdir()}


def read_images(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]


def sampled(source: Path, folder: Path, *arguments: str) -> list[np.ndarray]:
    """The images that the command writes."""
    common = ["sample", str(source), "--device", "cpu", "--out", str(folder / "grid.png")]
    assert main([*common, *arguments, "--images-dir", str(folder / "images")]) == 0
    return read_images(folder / "images")


def refusal(capsys: pytest.CaptureFixture[str], source: Path, folder: Path, *arguments: str) -> str:
    """The one line that the command prints when it refuses its arguments."""
    capsys.readouterr()
    assert main(["sample", str(source), "--device", "cpu", *arguments, "--out", str(folder / "x.png")]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert "Traceback" not in errors
    assert not (folder / "x.png").exists()
    return line
