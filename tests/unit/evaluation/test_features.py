"""Frechet distances against closed forms, scipy and sampling; the feature space against plain eigenvalues."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_scale.errors import ConfigError
from ldm_scale.evaluation.features import (
    FEATURE_RESOLUTION,
    EfficientNetFeatures,
    FeatureSpace,
    frechet_distance,
    frechet_from_features,
)
from ldm_scale.telemetry.log import get_logger


def random_covariance(num_dims: int, seed: int) -> Tensor:
    root = torch.randn(num_dims, num_dims, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / num_dims


def random_features(num_images: int, num_features: int, seed: int) -> Tensor:
    return torch.randn(num_images, num_features, generator=torch.Generator().manual_seed(seed))


def test_distance_of_diagonal_gaussians() -> None:
    mu1, mu2 = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    std1, std2 = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 0.5, 2.0])
    distance = frechet_distance(mu1, std1.square().diag(), mu2, std2.square().diag())
    assert distance == pytest.approx((1 + 9 + 0) + (4 + 2.25 + 4), abs=1e-10)


def test_distance_under_rotation_and_scaling() -> None:
    mean, covariance = torch.zeros(8, dtype=torch.float64), random_covariance(8, seed=0)
    scaled = frechet_distance(mean, covariance, mean, 4 * covariance)
    assert scaled == pytest.approx(covariance.trace().item(), abs=1e-10)  # (2 - 1)^2 tr(sigma)
    rotation = torch.linalg.qr(random_covariance(8, seed=1)).Q
    other = random_covariance(8, seed=2)
    rotated = frechet_distance(mean, rotation @ covariance @ rotation.T, mean, rotation @ other @ rotation.T)
    assert rotated == pytest.approx(frechet_distance(mean, covariance, mean, other), abs=1e-10)


def test_distance_equals_scipys_matrix_root() -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="the reference implementation is not installed")
    sigma1, sigma2 = random_covariance(32, seed=0), random_covariance(32, seed=1)
    mu1, mu2 = random_features(2, 32, seed=2).double()
    root = linalg.sqrtm(sigma1.numpy() @ sigma2.numpy()).real
    expected = (mu1 - mu2).square().sum().item() + np.trace(sigma1.numpy() + sigma2.numpy() - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, abs=1e-10)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, abs=1e-10)


def test_distance_of_equal_gaussians_is_zero_even_when_singular() -> None:
    covariance = random_covariance(16, seed=0)
    covariance[8:], covariance[:, 8:] = 0, 0
    mean = torch.ones(16)
    assert 0 <= frechet_distance(mean, covariance, mean, covariance) < 1e-10


def test_space_finds_the_directions_of_largest_variance() -> None:
    axes = torch.linalg.qr(random_features(20, 20, seed=0).double()).Q
    scales = torch.tensor([9.0, 5.0, 3.0] + [0.1] * 17, dtype=torch.float64)
    features = random_features(4000, 20, seed=1).double() * scales @ axes.T + 7.0
    space = FeatureSpace.fit(features, num_components=3)
    assert space.name == "FD-EffNetLite0-PCA3"
    assert space.num_fitted == 4000
    torch.testing.assert_close((space.components @ axes[:, :3]).abs(), torch.eye(3).double(), rtol=0, atol=0.05)
    eigenvalues = np.linalg.eigvalsh(np.cov(features.numpy().T))[::-1]
    assert space.explained_variance == pytest.approx(eigenvalues[:3].sum() / eigenvalues.sum(), abs=1e-10)
    coordinates = space.project(features)
    np.testing.assert_allclose(torch.cov(coordinates.T).numpy(), np.diag(eigenvalues[:3]), atol=1e-9)


def test_distance_within_the_space_is_that_of_the_projected_sets() -> None:
    a, b = random_features(300, 12, seed=0), 1.5 * random_features(200, 12, seed=1) + 0.3
    # With as many components as features nothing is projected away.
    space = FeatureSpace.fit(torch.cat([a, b]), num_components=12)
    expected = frechet_distance(
        a.double().mean(0), torch.cov(a.double().T), b.double().mean(0), torch.cov(b.double().T)
    )
    assert frechet_from_features(a, b, space) == pytest.approx(expected, rel=1e-10)


def test_distance_ignores_what_the_space_does_not_span() -> None:
    a = random_features(100, 6, seed=0).double()
    a[:, 3:] = 0
    space = FeatureSpace.fit(a, num_components=3)
    b = a.clone()
    b[:, 5] = 10
    assert frechet_from_features(a, b, space) == pytest.approx(0, abs=1e-10)
    b[:, 0] += 2
    assert frechet_from_features(a, b, space) == pytest.approx(4, abs=1e-10)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"32 images with 64 features have at most 31 .* but 32 are wanted"):
        FeatureSpace.fit(random_features(32, 64, seed=0))
    space = FeatureSpace.fit(random_features(40, 64, seed=0))
    with pytest.raises(ConfigError, match=r"FD-EffNetLite0-PCA32: 32 images give no covariance.*at least 33"):
        frechet_from_features(random_features(40, 64, seed=1), random_features(32, 64, seed=2), space)


@pytest.fixture(scope="module")
def extractor() -> EfficientNetFeatures:
    return EfficientNetFeatures(resolution=32, batch_size=2)


def test_features_keep_the_order_whatever_the_batches(
    extractor: EfficientNetFeatures, capsys: pytest.CaptureFixture[str]
) -> None:
    get_logger(0)  # the rank that shows progress
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = extractor(images)
    assert features.shape == (5, 1280)
    assert features.dtype == torch.float32
    batches = extractor([images[:1], images[1:]], num_images=5)
    torch.testing.assert_close(features, batches, rtol=1e-4, atol=1e-5)
    assert (torch.cdist(features, batches).argmin(dim=1) == torch.arange(5)).all()
    out, err = capsys.readouterr()
    assert out == ""
    assert "5/5" in err


def test_features_are_those_of_the_image_as_a_file(extractor: EfficientNetFeatures) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    stored = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    torch.testing.assert_close(extractor(images), extractor(stored.float() / 127.5 - 1), rtol=0, atol=0)


def test_features_have_a_fixed_resolution(extractor: EfficientNetFeatures) -> None:
    """An image and its enlargement look alike; without the resize the network would see other structures."""
    small = torch.nn.functional.interpolate(
        torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1, size=32, mode="bilinear"
    )
    large = torch.nn.functional.interpolate(small, size=128, mode="bilinear")
    a, b = extractor(small), extractor(large)
    assert (a - b).norm(dim=1).max() < 0.25 * (a[0] - a[1]).norm()
    assert extractor.protocol["resolution"] == 32
    assert FEATURE_RESOLUTION == 128
