"""The distance of reconstructions: zero for equal sets, its companions, and what too few images leave out."""

import pytest
import torch

from ldm_scale.evaluation.features import frechet_distance
from ldm_scale.evaluation.frechet import frechet_figures, frechet_protocol


def features(num_images: int, num_features: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_images, num_features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_components", [4, None])
def test_equal_sets_have_distance_zero_and_their_floor(num_components: int | None) -> None:
    x = features(40)
    figures = frechet_figures(x, x.clone(), num_components)
    assert figures["distance"] == pytest.approx(0, abs=1e-9)
    # Reconstructions that lose nothing: what is left between halves is sampling noise alone.
    assert figures["halves_reconstructed"] == pytest.approx(figures["halves_original"], abs=1e-12)
    assert figures["halves_original"] > 0.1
    assert "not_measured" not in figures


def test_all_features_give_the_plain_distance() -> None:
    x, y = features(50), features(50, seed=1) * 2 + 1
    a, b = x.double(), y.double()
    expected = frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    assert frechet_figures(x, y, None)["distance"] == pytest.approx(expected, rel=1e-12)
    halves = frechet_distance(a[::2].mean(0), torch.cov(a[::2].T), b[1::2].mean(0), torch.cov(b[1::2].T))
    assert frechet_figures(x, y, None)["halves_reconstructed"] == pytest.approx(halves, rel=1e-12)


def test_a_shift_is_seen_along_the_originals_directions() -> None:
    x = features(60)
    assert frechet_figures(x, x + 2, 6)["distance"] == pytest.approx(6 * 4, rel=1e-5)


def test_too_few_images_are_said_so() -> None:
    few = frechet_figures(features(4), features(4), 4)
    assert few["distance"] is None
    assert few["not_measured"] == "4 images, at least 5 are needed"
    half = frechet_figures(features(9), features(9), 4)
    assert half["distance"] is not None
    assert half["halves_original"] is None
    assert half["not_measured"] == "halves of 9 images have fewer than 5"


def test_originals_that_are_all_alike_have_no_explained_variance() -> None:
    assert frechet_figures(torch.ones(20, 6), torch.ones(20, 6), 4)["explained_variance"] is None


def test_protocol_says_when_covariances_are_singular() -> None:
    assert "singular" in frechet_protocol(2048, 2048, None)["bias"]
    assert "singular" not in frechet_protocol(2049, 2048, None)["bias"]
    reduced = frechet_protocol(100, 1280, 32)
    assert reduced["dimensions"] == 32
    assert "singular" not in reduced["bias"]
    assert "not seen" in reduced["bias"]


def test_the_interval_is_of_pairs() -> None:
    x, y = features(80), features(80, seed=1)
    figures = frechet_figures(x, y, 4, resamples=6)
    interval = figures["interval"]
    assert interval["low"] < figures["distance"] < interval["high"]
    assert frechet_figures(x, x.clone(), 4, resamples=6)["interval"]["standard_error"] == pytest.approx(0, abs=1e-9)
    assert "interval" not in frechet_figures(x[:9], y[:9], 4, resamples=6)
