"""The sheet of `doctor data`: what is on it, and captions and data sets that could break the drawing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ldm_scale.data.sources.tars import index_tars
from ldm_scale.operations import doctor_sheet
from ldm_scale.operations.doctor_report import Report
from tests.helpers.doctored import examine
from tests.helpers.shards import broken_png, make_dataset, png, write_tar

RED = (230, 20, 60)


def _run(manifest: Path, sheet: Path) -> Report:
    return examine(manifest, "--sheet", str(sheet))


def _data(folder: Path, colors: list[tuple[int, int, int]], captions: list[bytes] | None = None, bad: int = 0) -> Path:
    folder.mkdir(parents=True)
    samples = [
        (f"{n:03d}", {"png": png(Image.new("RGB", (40, 30), color)), "txt": captions[n] if captions else b"a caption"})
        for n, color in enumerate(colors)
    ]
    samples += [(f"bad{n}", {"png": broken_png(), "txt": b"x"}) for n in range(bad)]
    index_tars([write_tar(folder / "train-000000.tar", samples)], folder / "manifest.json", "train")
    return folder / "manifest.json"


def _share_of(sheet: Path, color: tuple[int, int, int]) -> float:
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    return float((pixels == color).all(axis=2).mean())


def _size(sheet: Path) -> tuple[int, int]:
    with Image.open(sheet) as image:
        return image.size


def test_pictures_and_look_alikes_are_drawn(tmp_path: Path) -> None:
    spread = [tuple(np.random.default_rng(n).integers(0, 255, 3).tolist()) for n in range(8)]
    one, none = tmp_path / "new" / "one.png", tmp_path / "none.png"
    report = _run(_data(tmp_path / "a", [RED, *spread]), one)
    assert report.facts["sheet"] == str(one)
    _run(_data(tmp_path / "b", spread), none)
    side = 0.75 * (doctor_sheet._SIDE * 100) ** 2  # pixels of a picture of 4 by 3 in its square
    width, height = _size(one)
    assert width == 1600
    assert _share_of(one, RED) * width * height == pytest.approx(side, rel=0.1)
    assert _share_of(none, RED) == 0
    pair = tmp_path / "pair.png"
    _run(_data(tmp_path / "c", [RED, *spread, RED]), pair)
    small = 0.75 * (doctor_sheet._ALIKE * 100) ** 2
    width, height = _size(pair)
    assert _share_of(pair, RED) * width * height == pytest.approx(2 * side + 2 * small, rel=0.1)
    assert not list(tmp_path.glob(".*"))


def test_bad_samples_are_drawn(tmp_path: Path) -> None:
    sound, bad = tmp_path / "sound.png", tmp_path / "bad.png"
    _run(_data(tmp_path / "a", [RED] * 3), sound)
    _run(_data(tmp_path / "b", [RED] * 3, bad=30), bad)
    bar = (204, 102, 115)  # red of 75% on white
    assert _share_of(sound, bar) == 0
    assert _share_of(bad, bar) > 0.001
    assert _size(bad)[1] > _size(sound)[1]


def test_any_caption_can_be_drawn(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    captions = [
        "costs 5, $\\frac{1$ or",
        "a\nb\x1b[0m\u202e",
        "\u30ab\u30e1\u30e9" * 40,
        "x" * 5000,
        " ",
        "\\$ & % _ # {}",
    ]
    _run(_data(tmp_path / "a", [RED] * 6, [caption.encode() for caption in captions]), tmp_path / "sheet.png")
    assert _share_of(tmp_path / "sheet.png", RED) > 0.06
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_a_data_set_without_a_usable_sample(tmp_path: Path) -> None:
    report = _run(_data(tmp_path / "a", [], bad=3), tmp_path / "sheet.png")
    assert report.exit_code == 1
    assert _size(tmp_path / "sheet.png")[0] == 1600


def test_a_section_for_each_split_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_dataset(tmp_path, num_samples=9, splits=("train", "heldout", "other"))
    heights = []
    for limit in (3, 2, 1):
        monkeypatch.setattr(doctor_sheet, "MAX_SECTIONS", limit)
        _run(manifest, tmp_path / "sheet.png")
        heights.append(_size(tmp_path / "sheet.png")[1])
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=2)
    assert heights[2] > 500


@pytest.mark.parametrize("name", ["sheet.jpg", "sheet", "folder.png"])
def test_another_kind_of_file_is_refused_before_anything_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    report = _run(tmp_path / "nothing", tmp_path / name)
    assert [finding.what for finding in report.findings] == [f"--sheet {tmp_path / name}: the sheet is a PNG"]


def test_a_histogram_counts_every_value() -> None:
    for values in (np.array([1, 2] * 100 + [900]), np.array([0.3, 1.0, 1.0, 7.5])):
        axes = Figure().subplots()
        doctor_sheet._draw_histogram(axes, [("", values)], values)
        assert sum(bar.get_height() for bar in axes.patches) == len(values)


def test_bins_cover_all_values() -> None:
    for values in (np.array([5]), np.array([1, 2, 900]), np.arange(3000), np.array([128] * 99 + [60])):
        edges = doctor_sheet._whole_bins(values)
        assert edges == sorted(set(edges))
        assert len(edges) <= 42
        assert edges[0] < values.min()
        assert edges[-1] > np.percentile(values, 99)
