"""Small images: bicubic as Pillow's, the random chain's statistics, and that a stream decides all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.conditioning import degradation
from ldm_scale.conditioning.degradation import degrade, reduce_bicubic
from ldm_scale.engine.seeding import stream


def picture(side: int = 64, seed: int = 0) -> torch.Tensor:
    """Coloured discs on a gradient, (3, side, side): edges to blur, plains to see noise on."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[:side, :side] / side
    image = np.stack([across, down, 1 - across])
    for _ in range(6):
        x, y, radius = *rng.random(2), rng.uniform(0.08, 0.2)
        image[:, np.hypot(across - x, down - y) < radius] = rng.random((3, 1))
    return torch.from_numpy(image.astype(np.float32)) * 2 - 1


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_bicubic_is_pillows(factor: int) -> None:
    x = (picture(48) + 1) * 127.5
    eight = x.round().to(torch.uint8).permute(1, 2, 0).numpy()
    size = 48 // factor
    # Of floats: of 8 bits Pillow would cut overshoots between its two passes.
    channels = [Image.fromarray(eight[..., c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    expected = np.stack(resized, axis=-1).clip(0, 255).round()
    small = reduce_bicubic(torch.from_numpy(eight).permute(2, 0, 1)[None].float() / 127.5 - 1, factor)
    levels = (small[0].permute(1, 2, 0).numpy() + 1) * 127.5
    np.testing.assert_allclose(levels, levels.round(), atol=1e-3)
    assert np.mean(np.abs(levels - expected) > 0.01) < 0.02  # what lies half way between two levels
    np.testing.assert_allclose(levels, expected, atol=1.01)


def test_the_chain_is_a_function_of_its_stream() -> None:
    x = picture()
    first = degrade(x, 4, stream(0, "d", 5))
    assert torch.equal(first, degrade(x, 4, stream(0, "d", 5)))
    assert not torch.equal(first, degrade(x, 4, stream(0, "d", 6)))


@pytest.mark.parametrize(("side", "factor"), [(64, 4), (64, 2), (60, 3), (16, 8), (8, 8)])
def test_every_image_is_small_and_on_256_levels(side: int, factor: int) -> None:
    for number in range(20):
        small = degrade(picture(side), factor, stream(1, "d", number))
        assert small.shape == (3, side // factor, side // factor)
        assert small.isfinite().all()
        assert small.abs().max() <= 1
        levels = (small + 1) * 127.5
        assert (levels - levels.round()).abs().max() < 1e-3


def test_the_chain_loses_more_than_bicubic_and_not_everything() -> None:
    ratios, means = [], []
    for number in range(60):
        x = picture(seed=number)
        target = reduce_bicubic(x[None], 4)[0]
        small = degrade(x, 4, stream(2, "d", number))
        ratios.append(psnr(small, target))
        means.append(float((small - target).mean()))
    # Bicubic's own distance from its target is rounding, above 50 dB.
    assert max(ratios) < 45
    assert 17 < np.median(ratios) < 27
    assert min(ratios) > 12
    # Blurs, filters, noise and JPEG keep the brightness.
    assert abs(np.mean(means)) < 0.01
    # Chains differ in strength.
    assert np.std(ratios) > 1.5


@pytest.mark.parametrize("covariance", [((1.7, 0.0), (0.0, 1.7)), ((6.0, 2.0), (2.0, 3.0))])
def test_blur_of_a_point_is_the_gaussian(covariance: tuple[tuple[float, float], ...]) -> None:
    image = torch.zeros(1, 3, 41, 41)
    image[..., 20, 20] = 1
    blurred = degradation._blur(image, torch.tensor(covariance))[0, 0].double().numpy()
    offsets = np.arange(41) - 20.0
    places = np.stack(np.meshgrid(offsets, offsets, indexing="ij"), axis=-1)
    # The first axis of the covariance is the vertical one.
    exponent = np.einsum("yxi,ij,yxj->yx", places, np.linalg.inv(np.array(covariance)), places)
    expected = np.exp(-exponent / 2) / (2 * np.pi * np.sqrt(np.linalg.det(np.array(covariance))))
    np.testing.assert_allclose(blurred, expected, atol=1e-5)


def test_blur_keeps_a_plain_to_its_edges() -> None:
    plain = torch.full((1, 3, 12, 9), 0.3)
    torch.testing.assert_close(degradation._blur(plain, torch.eye(2) * 8), plain, atol=1e-5, rtol=0)


def test_noise_has_the_stated_deviations() -> None:
    plain = torch.full((1, 3, 64, 64), 0.5)
    deviations, grey, correlated = [], 0, 0
    for number in range(200):
        noise = degradation._add_noise(plain, stream(3, "n", number))[0].double() - 0.5
        deviations.append(float(noise.square().mean().sqrt()) * 255)
        correlation = torch.corrcoef(noise.flatten(start_dim=1))
        grey += bool((correlation > 0.9999).all())
        correlated += bool(0.1 < (correlation - torch.eye(3)).abs().max() < 0.9999)
    assert 60 < grey < 100  # 0.4 of them
    assert 20 < correlated < 60  # 0.2
    assert max(deviations) < 2.1
    assert 1.1 < np.mean(deviations) < 1.6  # 1 or 2, less where channels have shares
