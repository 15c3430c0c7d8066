"""SSIM against scipy's Gaussian filter and closed forms."""

import numpy as np
import pytest
import torch

from ldm_scale.errors import ConfigError
from ldm_scale.evaluation.similarity import ssim


def random_pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def scipys(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of one channel of 8-bit values, with scipy's filter cut at the window's radius of 5."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="the reference implementation is not installed")

    def blur(v: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(v, sigma=1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    upper = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return float(np.mean(upper / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))))


def test_equals_scipys_windows_on_eight_bit_images() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 3, 20, 31)).astype(np.float64)
    b = np.clip(a + rng.normal(0, 30, a.shape), 0, 255).round()
    expected = [np.mean([scipys(a[i, c], b[i, c]) for c in range(3)]) for i in range(2)]
    x, y = (torch.from_numpy(v) / 127.5 - 1 for v in (a, b))
    np.testing.assert_allclose(ssim(x, y).numpy(), expected, rtol=1e-9)


def test_equal_images_have_similarity_one() -> None:
    x = random_pixels(2, 3, 16, 16)
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_flat_images_compare_by_their_brightness() -> None:
    a, b = 51.0, 204.0
    x, y = (torch.full((1, 3, 12, 12), v / 127.5 - 1, dtype=torch.float64) for v in (a, b))
    c1 = (0.01 * 255) ** 2
    assert ssim(x, y).item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-9)


def test_images_smaller_than_the_window_are_refused() -> None:
    assert ssim(*[random_pixels(1, 3, 11, 11)] * 2).item() == pytest.approx(1)
    with pytest.raises(ConfigError, match="16x10 pixels are smaller than SSIM's window of 11x11"):
        ssim(*[random_pixels(1, 3, 16, 10)] * 2)
