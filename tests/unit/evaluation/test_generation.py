"""Losses by noise level on denoisers whose losses are known, and the pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_scale.config.schema import DiffusionConfig
from ldm_scale.diffusion.schedule import build_schedule, expand_like
from ldm_scale.errors import NumericsError
from ldm_scale.evaluation.generation import captioned_grid, frechet_closure, noise_level_losses

SCHEDULE = build_schedule(DiffusionConfig())


def latents_and_contexts(num_images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, 4, 8, 8, generator=generator), torch.randn(num_images, 3, 5, generator=generator)


def predicts_zero(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
    return torch.zeros_like(z)


def test_predicting_zero_costs_the_noises_variance() -> None:
    latents, contexts = latents_and_contexts(40)
    losses = noise_level_losses(predicts_zero, latents, contexts, SCHEDULE, seed=0)
    torch.testing.assert_close(losses.denoiser, losses.zero, rtol=0, atol=0)
    assert losses.zero.shape == (8,)
    assert losses.num_images == 40
    # 40 x 256 squared standard normals per bin: standard deviation sqrt(2 / 10240) = 0.014
    assert (losses.zero - 1).abs().max() < 0.06
    assert losses.zero.unique().numel() == 8


def test_a_perfect_denoiser_costs_nothing() -> None:
    latents, contexts = latents_and_contexts(8)
    same = latents[:1].expand(8, -1, -1, -1)

    def knows_the_image(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        alpha_bar = expand_like(SCHEDULE.alphas_cumprod[t], z)
        return (z - alpha_bar.sqrt() * same[:1]) / (1 - alpha_bar).sqrt()

    losses = noise_level_losses(knows_the_image, same, contexts, SCHEDULE, seed=0)
    assert losses.denoiser.max() < 1e-6


def test_bins_are_equal_ranges_of_timesteps_evenly_filled() -> None:
    latents, contexts = latents_and_contexts(100)
    seen: list[Tensor] = []

    def off_by_its_bin(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        seen.append(t)
        return (t // 125).float().view(-1, 1, 1, 1).expand_as(z) * 10

    losses = noise_level_losses(off_by_its_bin, latents, contexts, SCHEDULE, seed=0, batch_size=48)
    # mean (eps - 10 b)^2 = 1 + 100 b^2 up to the noise's mean
    expected = 1 + 100 * torch.arange(8, dtype=torch.float64).square()
    torch.testing.assert_close(losses.denoiser, expected, rtol=0.02, atol=0.1)
    t = torch.cat(seen)
    assert t.numel() == 800
    assert torch.bincount(t // 125, minlength=8).tolist() == [100] * 8
    per_quarter = torch.bincount(t[t < 125] * 4 // 125)
    assert per_quarter.min() >= 23
    assert per_quarter.max() <= 27


def test_noise_and_timesteps_depend_on_the_images_number_alone() -> None:
    """Two ranks with half of the images each, other batches: the same figures."""
    latents, contexts = latents_and_contexts(10)

    def some_denoiser(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return 0.3 * z + context.mean(dim=(1, 2)).view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000

    whole = noise_level_losses(some_denoiser, latents, contexts, SCHEDULE, seed=3)
    ranks = [[0, 2, 4, 6, 8, 9], [7, 5, 3, 1]]
    parts = [
        noise_level_losses(some_denoiser, latents[r], contexts[r], SCHEDULE, seed=3, image_numbers=r, batch_size=16)
        for r in ranks
    ]
    combined = sum(p.denoiser * p.num_images for p in parts) / 10
    torch.testing.assert_close(combined, whole.denoiser, rtol=1e-6, atol=0)
    other_seed = noise_level_losses(some_denoiser, latents, contexts, SCHEDULE, seed=4)
    assert (other_seed.denoiser != whole.denoiser).all()


def test_images_do_not_share_noise() -> None:
    latents, contexts = latents_and_contexts(2)
    noises: list[Tensor] = []

    def listens(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        noises.append(z)
        return z

    noise_level_losses(listens, latents * 0, contexts, SCHEDULE, seed=0)
    noise = noises[0].flatten(1)
    correlation = torch.corrcoef(noise) - torch.eye(16)
    assert correlation.abs().max() < 0.3


def test_no_gradients_are_kept() -> None:
    latents, contexts = latents_and_contexts(2)
    weight = torch.ones(1, requires_grad=True)
    assert not noise_level_losses(lambda z, t, c: z * weight, latents, contexts, SCHEDULE, 0).denoiser.requires_grad


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
    captioned_grid(images, ["pizza"], 4, tmp_path / "grid.png", real=real, side_px=96)
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
