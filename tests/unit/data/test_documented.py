"""What docs/data.md shows works as it is written."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image

from ldm_scale.data import open_manifest
from ldm_scale.operations.prepare_arguments import build_parser
from ldm_scale.prepare import main

TEXT = (Path(__file__).parents[3] / "docs" / "data.md").read_text("utf-8")


def test_every_command_is_one_that_the_program_takes() -> None:
    commands = re.findall(r"^ldm-scale prepare ((?:.*\\\n)*.*)$", TEXT, flags=re.MULTILINE)
    assert len(commands) > 8
    for command in commands:
        build_parser().parse_args(shlex.split(command.replace("\\\n", " ")))


def test_open_images_are_converted(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "images").mkdir()
    for name in ("a1", "b2"):
        Image.new("RGB", (40, 20)).save(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "classes.csv").write_text("/m/01,Toy, large\n/m/02,Cat\n".replace("Toy, large", '"Toy, large"'))
    (tmp_path / "boxes.csv").write_text(
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
        "a1,xclick,/m/01,1,0.25,0.75,0.5,1,0,0,0,0,0\n"
        "a1,xclick,/m/02,1,0.5,0.5,0.5,1,0,0,0,0,0\n"
    )
    (tmp_path / "convert.py").write_text(code)
    command = [sys.executable, "convert.py", "images", "boxes.csv", "classes.csv"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    names = tmp_path / "openimages_classes.txt"
    arguments = ["--resolution", "10", "--heldout-percent", "0", "--object-classes", str(names)]
    assert main(["image-folder", str(tmp_path / "images"), *arguments, "--out", str(tmp_path / "out")]) == 0
    dataset = open_manifest(tmp_path / "out", "train")
    assert dataset.object_classes == ("Cat", "Toy, large")
    objects = [json.loads(dataset.read(n)["json"])["objects"] for n in range(2)]
    # The square is x from 10 to 30, at half the size: the box covers its lower half.
    assert objects == [[{"class": 1, "box": [0.0, 5.0, 10.0, 5.0]}], []]
