"""Rates, shares and the picture of distortion over rate."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ldm_scale.errors import ConfigError, DataError
from ldm_scale.evaluation.rate_distortion import plot_rate_distortion, rate_distortion, rate_distortion_table
from ldm_scale.evaluation.results import Result
from tests.helpers.evaluations import identity_result, kl_result, vq_result


def results() -> list[Result]:
    documents = (vq_result(), kl_result(), identity_result())
    return [Result(f"{i}.json", d["model"], d["protocol"], d["figures"]) for i, d in enumerate(documents)]


def test_rows_by_hand() -> None:
    pixels, kl, vq = rate_distortion(results())
    assert [row["label"] for row in (pixels, kl, vq)] == ["identity-f1-c3", "kl-f4-c3", "vq-f8-n256-c4"]
    assert (kl["bits_per_pixel"], kl["bits_per_pixel_trained"]) == (1.2, 2.4)
    assert (vq["bits_per_pixel"], vq["bits_per_pixel_trained"]) == (0.12, 0.125)
    assert [row["bits_removed"] for row in (pixels, kl, vq)] == pytest.approx([0, 1 - 1.2 / 24, 1 - 0.12 / 24])
    assert [row["perceptual_lost"] for row in (pixels, kl, vq)] == pytest.approx([0, 0.2, 0.5])
    assert pixels["psnr_db"] is None
    table = rate_distortion_table([pixels, kl, vq]).splitlines()
    assert table[1].split() == ["identity-f1-c3", "24.0000", "3.0000", "0.00%", "exact", "0.00%"]
    assert table[3].split() == ["vq-f8-n256-c4", "0.1200", "0.0625", "99.50%", "22.00", "50.00%"]


def test_plot_is_a_picture_with_both_panels(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plot.png"
    assert plot_rate_distortion(results(), path) == rate_distortion(results())
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    for half in np.array_split(pixels, 2, axis=1):
        colours = half.max(axis=2) - half.min(axis=2)
        assert (colours > 60).sum() > 100  # points and lines, not grey axes alone


def test_a_collapsed_or_single_model_is_drawn_as_well(tmp_path: Path) -> None:
    collapsed = results()[0]
    collapsed.figures["rate"]["code_entropy_bits_per_pixel"] = 0.0
    collapsed.figures["perceptual"]["unrelated"] = None
    rows = plot_rate_distortion([collapsed], tmp_path / "plot.png")
    assert rows[0]["perceptual_lost"] is None
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_result_without_what_is_drawn_is_refused_by_name(tmp_path: Path) -> None:
    for part, name in (("model", "kind"), ("figures", "rate"), ("protocol", "data")):
        broken = results()
        for result in broken:
            getattr(result, part).pop(name)
        with pytest.raises(DataError, match=rf"^\d\.json: this result is incomplete or damaged \(KeyError: '{name}'\)"):
            plot_rate_distortion(broken, tmp_path / "plot.png")


def test_names_with_dollars_are_drawn_as_they_are(tmp_path: Path) -> None:
    odd = [replace(result, source=f"a$\\frac{{$/{i}/result.json") for i, result in enumerate(results()[:1] * 2)]
    odd[0].model["label"] = "kl $\\foo$ x"
    plot_rate_distortion(odd, tmp_path / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_a_plot_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plot.png").write_bytes(b"before")

    def full(self: Figure, file: Any, **_: object) -> None:
        if isinstance(file, Path):
            file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        plot_rate_distortion(results(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes() == b"before"


def test_mixed_protocols_and_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a name that ends in"):
        plot_rate_distortion(results(), tmp_path / "plot.svg")
    mixed = results()
    mixed[2].protocol["resolution"] = 32
    with pytest.raises(ConfigError, match="resolution is 64 and 32"):
        plot_rate_distortion(mixed, tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()
