"""How much training closes a distance, and the pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.errors import NumericsError
from ldm_scale.evaluation.generation import captioned_grid, frechet_closure


def test_closure() -> None:
    assert frechet_closure(untrained=100.0, trained=100.0, real=4.0) == 0
    assert frechet_closure(untrained=100.0, trained=4.0, real=4.0) == 1
    assert frechet_closure(untrained=100.0, trained=28.0, real=4.0) == pytest.approx(0.75, abs=1e-12)
    with pytest.raises(NumericsError, match=r"untrained samples \(4\) does not exceed .* \(4\)"):
        frechet_closure(untrained=4.0, trained=4.0, real=4.0)


def test_captioned_grid_places_images_and_captions(tmp_path: Path) -> None:
    images = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1) * torch.tensor([1.0, 1.0, 0.0]).view(1, 3, 1, 1)
    images = images.expand(3, 3, 4, 4).clone()
    images[0, :, 0, 0] = 1
    path = tmp_path / "new" / "grid.png"
    captioned_grid(images, ["red heart", "pizza", ""], 2, path, side_px=80)
    pixels = np.asarray(Image.open(path))
    left, top = 12, 12
    assert (pixels[:top] == 255).all()
    assert (pixels[top + 1 : top + 19, left + 1 : left + 19] == 255).all()  # one pixel is 20 x 20, unsmoothed
    assert (pixels[top + 21 : top + 79, left + 1 : left + 79] == (0, 0, 128)).all()
    assert (pixels[top : top + 80, left + 92 : left + 172] == 128).all()
    below = pixels[top + 80 : top + 100]
    assert below[:, left : left + 80].min() < 128
    assert below[:, left + 92 : left + 172].min() < 128
    second_row = next(y for y in range(100, len(pixels)) if (pixels[y, left] == (255, 255, 128)).all())
    assert (pixels[second_row : second_row + 80, left : left + 80] == (255, 255, 128)).all()
    assert (pixels[second_row + 80 :] == 255).all()


def test_captioned_grid_shows_real_images_beside(tmp_path: Path) -> None:
    images, real = torch.full((1, 3, 8, 8), -1.0), torch.zeros(1, 3, 8, 8)
    captioned_grid({"real image": real, "sample": images}, ["pizza"], 4, tmp_path / "grid.png", side_px=96)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    row = pixels[80]
    assert (row[12:108] == 128).all()
    assert (row[108:112] == 255).all()
    assert (row[112:208] == 0).all()


def test_long_and_accented_captions_fit(tmp_path: Path) -> None:
    images = torch.ones(1, 3, 8, 8)
    drawn = {}
    for caption in ("pinata", "pi\u00f1ata", "a very long caption about many things " * 5):
        captioned_grid(images, [caption], 1, tmp_path / "grid.png")
        drawn[caption] = np.asarray(Image.open(tmp_path / "grid.png"))
    first, second, long = drawn.values()
    np.testing.assert_array_equal(first, second)
    assert long.shape[1] == first.shape[1]
    lines = (long[108:] < 255).any(axis=(1, 2))  # below the image; a gap ends a line
    assert np.diff(lines.astype(int)).tolist().count(-1) == 2
    assert (long[:, 0] == 255).all()
    assert (long[:, -1] == 255).all()


def test_captions_must_match(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="2 images, 1 captions"):
        captioned_grid(torch.zeros(2, 3, 8, 8), ["one"], 2, tmp_path / "grid.png")
