"""PSNR against its definition, the baseline against Pillow, the report against hand-made reconstructions."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.errors import ConfigError, DataError
from ldm_scale.evaluation.reconstruction import bicubic_baseline, evaluate_reconstruction, psnr, reconstruction_grid


def random_pixels(num_images: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(num_images, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_of_a_constant_error() -> None:
    x = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    y = x + torch.tensor([0.02, 0.2], dtype=torch.float64).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(x, y), torch.tensor([40.0, 20.0], dtype=torch.float64), rtol=0, atol=1e-10)


def test_psnr_is_that_of_eight_bit_images() -> None:
    a, b = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8)).astype(np.float64)
    expected = 10 * math.log10(255**2 / np.mean((a - b) ** 2))
    x, y = (torch.from_numpy(v)[None] / 127.5 - 1 for v in (a, b))
    assert psnr(x, y).item() == pytest.approx(expected, abs=1e-10)


def test_psnr_of_equal_images_is_infinite() -> None:
    x = random_pixels(1)
    assert psnr(x, x).item() == math.inf


def test_baseline_equals_pillows_bicubic() -> None:
    x = random_pixels(1, size=24) * 0.5
    expected = [
        np.asarray(
            Image.fromarray(channel.numpy(), mode="F")
            .resize((6, 6), Image.Resampling.BICUBIC)
            .resize((24, 24), Image.Resampling.BICUBIC)
        )
        for channel in x[0]
    ]
    np.testing.assert_allclose(bicubic_baseline(x, 4)[0].numpy(), np.clip(expected, -1, 1), atol=1e-5)


def test_baseline_stays_in_range_and_keeps_flat_images() -> None:
    edges = torch.ones(1, 3, 16, 16)
    edges[..., 6:] = -1
    assert bicubic_baseline(edges, 2).abs().max() <= 1
    flat = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(bicubic_baseline(flat, 8), flat)


def test_baseline_refuses_a_factor_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="16x16 pixels cannot be reduced by f = 3"):
        bicubic_baseline(random_pixels(1), 3)


def test_report_averages_over_images_not_batches() -> None:
    x = random_pixels(5) * 0.5
    errors = torch.tensor([0.02, 0.2, 0.2, 0.2, 0.2]).view(5, 1, 1, 1)
    batches = [(x[:1], x[:1] + errors[:1]), (x[1:], x[1:] + errors[1:])]
    answers = iter([y for _, y in batches])
    report = evaluate_reconstruction(lambda _: next(answers), [batch for batch, _ in batches], factor=4)
    assert report.num_images == 5
    assert report.psnr_db == pytest.approx((40 + 4 * 20) / 5, abs=1e-4)
    assert report.mean_absolute_error == pytest.approx((0.02 + 4 * 0.2) / 5, abs=1e-6)
    assert report.bicubic_psnr_db == pytest.approx(psnr(x, bicubic_baseline(x, 4)).mean().item(), abs=1e-10)
    assert report.gain_db == pytest.approx(report.psnr_db - report.bicubic_psnr_db)


def test_report_clamps_reconstructions() -> None:
    x = torch.ones(1, 3, 8, 8)
    x[..., :4] = 0.5
    clamped = evaluate_reconstruction(lambda x: torch.where(x == 1, 9.0, x + 0.02), [x], factor=2)
    assert clamped.psnr_db == pytest.approx(40 + 10 * math.log10(2), abs=1e-4)


def test_no_images_are_an_error() -> None:
    with pytest.raises(DataError, match="no image"):
        evaluate_reconstruction(lambda x: x, [], factor=4)


def test_grid_has_reconstructions_below_their_originals() -> None:
    originals = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    grid = reconstruction_grid(originals, -originals, columns=2)
    assert grid.shape == (3, 22, 10)
    corners = grid[0, ::6, ::6].tolist()
    assert corners == [[0, 128], [255, 128], [255, 255], [0, 255]]
