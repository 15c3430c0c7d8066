from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_scale.data import open_manifest
from ldm_scale.data.metadata import read_metadata
from ldm_scale.errors import DataError
from ldm_scale.prepare import main

SIZE = (24, 16)  # (width, height); the centred square is x from 4 to 20
# Numbers of the segments, and their categories: the same label from two of them, and numbers in all three channels.
SEGMENTS = {7: 1, 300: 200, 70000: 84, 16777215: 1}
LABELS = {1: 0, 84: 1, 200: 2}  # by the order of the categories' numbers


def _draw(numbers: np.ndarray[Any, Any]) -> Image.Image:
    """A panoptic picture of segment numbers, by the format's definition."""
    return Image.fromarray(np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], axis=-1).astype(np.uint8))


def _numbers(seed: int) -> np.ndarray[Any, Any]:
    choices = np.array([0, *SEGMENTS])
    return choices[np.random.default_rng(seed).integers(0, len(choices), SIZE[::-1])]


def _panoptic() -> dict[str, Any]:
    segments = [
        {"id": number, "category_id": category, "iscrowd": int(number == 300), "area": 1, "bbox": [0, 0, 1, 1]}
        for number, category in SEGMENTS.items()
    ]
    return {
        "images": [],
        "categories": [
            {"id": 200, "name": "rug", "isthing": 0},
            {"id": 1, "name": "person", "isthing": 1},
            {"id": 84, "name": "tree", "isthing": 0},
        ],
        "annotations": [{"image_id": n, "file_name": f"{n}.png", "segments_info": segments} for n in (2, 1)],
    }


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "maps").mkdir()
    for number in (1, 2):
        Image.new("RGB", SIZE, "red").save(tmp_path / "images" / f"{number}.jpg")
        _draw(_numbers(number)).save(tmp_path / "maps" / f"{number}.png")
    licenses = [{"id": 4, "name": "Attribution License", "url": "u"}, {"id": 5, "name": "No known restrictions"}]
    images: list[dict[str, Any]] = [
        {"id": n, "file_name": f"{n}.jpg", "width": SIZE[0], "height": SIZE[1], "license": 3 + n} for n in (1, 2)
    ]
    instances = {
        "images": images,
        "licenses": licenses,
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "panoptic.json").write_text(json.dumps(_panoptic()))
    return tmp_path


def _prepare(coco: Path, *options: str, split: str = "train", out: str = "out") -> dict[str, Any]:
    """The manifest."""
    arguments = ["--images", str(coco / "images"), "--instances", str(coco / "instances.json"), "--split", split]
    assert main(["coco", *arguments, "--resolution", "16", "--out", str(coco / out), *options]) == 0
    manifest: dict[str, Any] = json.loads((coco / out / "manifest.json").read_text())
    return manifest


def _with_maps(coco: Path) -> list[str]:
    return ["--panoptic", str(coco / "panoptic.json"), "--panoptic-maps", str(coco / "maps")]


def test_segments_become_labels_of_their_categories(coco: Path) -> None:
    manifest = _prepare(coco, *_with_maps(coco))
    assert manifest["map_labels"] == ["person", "tree", "rug"]
    assert manifest["object_classes"] == ["person"]
    dataset = open_manifest(coco / "out", "train")
    assert dataset.num_samples == 2
    for row in range(2):
        raw = dataset.read(row)
        number = read_metadata(raw)["id"]
        shown = np.asarray(Image.open(io.BytesIO(raw["seg.png"])))  # type: ignore[arg-type]
        wanted = np.full(SIZE[::-1], 255)
        for segment, category in SEGMENTS.items():
            wanted[_numbers(number) == segment] = LABELS[category]
        assert (shown == wanted[:, 4:20]).all()
        assert set(np.unique(shown)) == {0, 1, 2, 255}
    assert _prepare(coco, *_with_maps(coco)) == manifest
    changed = _panoptic()
    changed["annotations"].pop()
    (coco / "panoptic.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match=r"prepared by another request.*panoptic=panoptic.json@"):
        _prepare(coco, *_with_maps(coco))


def test_images_whose_maps_cannot_be_used_are_left_out(coco: Path) -> None:
    numbers = _numbers(1)
    faults: list[tuple[Callable[[Path], Any], str]] = [
        (lambda path: path.unlink(), f"its label map {coco}/maps/1.png cannot be read"),
        (lambda path: path.write_bytes(b"junk"), "panoptic map does not decode"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "panoptic map does not decode"),
        (lambda path: Image.new("L", SIZE).save(path), "panoptic map is not a PNG of 8 bits and three channels"),
        (lambda path: _draw(numbers.T).save(path), "panoptic map has another size than its picture"),
        (lambda path: _draw(numbers + 1).save(path), "panoptic map shows a segment that its annotations do not list"),
    ]
    for number, (break_it, reason) in enumerate(faults):
        _draw(numbers).save(coco / "maps" / "1.png")
        break_it(coco / "maps" / "1.png")
        manifest = _prepare(coco, *_with_maps(coco), out=str(number))
        assert manifest["splits"]["train"]["num_samples"] == 1
        assert [line.startswith(f"1.jpg: {reason}") for line in manifest["left_out_names"]] == [True]
    changed = _panoptic()
    changed["annotations"].pop()
    (coco / "panoptic.json").write_text(json.dumps(changed))
    assert _prepare(coco, *_with_maps(coco), out="none")["left_out"] == {"no panoptic annotation": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), 'no list "categories"; --panoptic takes a panoptic file'),
        (lambda c: c["annotations"][0].update(file_name="../1.png"), "annotations entry .* points outside the folder"),
        (lambda c: c["annotations"][0].pop("segments_info"), "is malformed .no 'segments_info'"),
        (lambda c: c["annotations"][1].update(image_id=2), "is malformed .a second one of image 2"),
        (lambda c: c["categories"].pop(0), "its segment 300 is of category 200, which the file does not list"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(id=2**24), "segment has the number 16777216, not"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(id=300), "it lists segment 300 twice"),
        (
            lambda c: c["categories"].extend({"id": 300 + n, "name": str(n)} for n in range(253)),
            "256 categories, and a map of 8 bits tells 255 apart",
        ),
    ],
)
def test_malformed_panoptic_files_say_where(coco: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    changed = _panoptic()
    change(changed)
    (coco / "panoptic.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match=f"panoptic.json: .*{message}"):
        _prepare(coco, *_with_maps(coco))


def test_options_that_do_not_go_together(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="--panoptic and --panoptic-maps go together"):
        _prepare(coco, *_with_maps(coco)[:2])
    with pytest.raises(SystemExit):
        _prepare(coco, *_with_maps(coco), "--instance-maps")
    assert "not allowed with argument" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"--panoptic-maps .*/none: no such folder"):
        _prepare(coco, *_with_maps(coco)[:3], str(coco / "none"))


def test_licences_of_the_pictures_and_of_the_data_set(coco: Path) -> None:
    manifest = _prepare(coco, "--license", "CC-BY-4.0")
    assert manifest["license"] == "CC-BY-4.0"
    dataset = open_manifest(coco / "out", "train")
    found = {entry["id"]: entry["license"] for entry in (read_metadata(dataset.read(n)) for n in range(2))}
    assert found == {1: "Attribution License", 2: "No known restrictions"}
    manifest = _prepare(coco, "--license", "CC-BY-4.0", split="heldout")
    assert manifest["image_licenses"] == {"Attribution License": 2, "No known restrictions": 2}
    with pytest.raises(DataError, match="its split heldout and third differ in license"):
        _prepare(coco, split="third")
    content = json.loads((coco / "instances.json").read_text())
    del content["licenses"]
    (coco / "instances.json").write_text(json.dumps(content))
    manifest = _prepare(coco, out="other")
    assert manifest["license"] is None
    assert "image_licenses" not in manifest
    assert "license" not in read_metadata(open_manifest(coco / "other", "train").read(0))
