"""`ldm-scale doctor data` on boxes and label maps: counted, and what cannot be used is named."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_scale.data.sources.tars import index_tars
from ldm_scale.operations import doctor_data
from ldm_scale.operations.doctor_report import Report
from tests.helpers.shards import png, write_tar

Members = dict[str, bytes]


def _run(folder: Path, samples: list[tuple[str, Members]], labels: int = 3) -> Report:
    """The report on these samples; three classes of objects."""
    names = [f"label {n}" for n in range(labels)]
    index_tars([write_tar(folder / "a.tar", samples)], folder / "manifest.json", "train", ["cat", "dog", "cow"], names)
    parser = argparse.ArgumentParser()
    doctor_data.add_arguments(parser)
    return doctor_data.run(parser.parse_args([str(folder), "--resolution", "32"]))


def _sample(number: int, objects: Any, label_map: Image.Image) -> tuple[str, Members]:
    noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    metadata = {"captions": [f"picture {number}", "another"], "objects": objects}
    members = {"png": png(Image.fromarray(noise)), "json": json.dumps(metadata).encode()}
    return f"s{number:02d}", {**members, "seg.png": png(label_map)}


def _lines(report: Report, level: str) -> list[str]:
    return [f"{finding.where}: {finding.what}" for finding in report.findings if finding.level == level]


def test_objects_and_labels_are_counted(tmp_path: Path) -> None:
    half = Image.new("L", (32, 32), 1)
    half.paste(255, (0, 0, 32, 8))
    cat, dog = ({"class": name, "box": [1, 2, 3, 4]} for name in (0, "dog"))
    far = {"class": "dog", "box": [40, 2, 3, 4]}
    report = _run(tmp_path, [_sample(0, [cat, dog], half), _sample(1, [], half), _sample(2, [dog, far, dog], half)])
    facts = report.facts["splits"]["train"]
    assert facts["objects"] == {
        "images": 3,
        "total": 5,
        "most_in_an_image": 3,
        "outside_or_too_small": 1,
        "classes": {"cat": 1, "dog": 4},
    }
    assert facts["maps"] == {"images": 3, "unknown_share": 0.25, "share_of_pixels": {"label 1": 0.75}}
    assert facts["annotation_faults"] == {}
    assert facts["captions_missing"] == 0
    assert _lines(report, "warning") == [
        "train: 1 objects lie outside their picture or are too small, and are left out"
    ]
    assert "train: objects: 1.7 an image, 0 to 3; 2 of 3 classes in the sample" in _lines(report, "ok")
    assert "train: label maps: 1 of 3 labels in the sample, 25.0% of the pixels unknown" in _lines(report, "ok")


def test_annotations_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    plain = Image.new("L", (32, 32), 255)
    samples = [
        _sample(0, [{"class": "horse", "box": [1, 2, 3, 4]}], plain),
        _sample(1, [{"class": "cat", "box": [1, 2, 0, 4]}], Image.new("L", (32, 32), 3)),
        _sample(2, [], Image.new("L", (16, 32))),
        _sample(3, [], plain),
    ]
    del samples[3][1]["seg.png"]
    report = _run(tmp_path, samples)
    warnings = _lines(report, "warning")
    assert warnings[:4] == [
        "train a/s00: an object's class is not in the manifest's object_classes",
        "train a/s01: an object's box has no area: width and height must be above 0",
        "train a/s02: label map has another size than its picture",
        "train a/s03: no label map (seg.png)",
    ]
    assert "4 samples cannot be used with boxes or maps: " in warnings[4]
    assert "100.0% of the pixels unknown" in warnings[5]
    faults = report.facts["splits"]["train"]["annotation_faults"]
    assert sum(faults.values()) == 5
    assert faults["label map has a value that is neither in the manifest's map_labels nor 255 (unknown)"] == 1
    assert report.exit_code == 0  # they are good samples for everything else
