"""Figures of sets against torch-fidelity, scipy, plain numpy and closed forms; few images and equal ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ldm_scale.errors import ConfigError, NumericsError
from ldm_scale.evaluation import fidelity, neighbours, set_figures
from ldm_scale.evaluation.feature_sets import FeatureSet
from ldm_scale.evaluation.features import Gaussian
from ldm_scale.evaluation.intervals import Halves
from ldm_scale.evaluation.neighbours import neighbour_figures
from ldm_scale.evaluation.set_figures import Network

NET = Network("Net")


def random_features(num_images: int, num_features: int = 12, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, num_features, generator=generator) * scale


def figures_of(made: Tensor, real: Tensor, network: Network = NET, **options: object) -> dict[str, dict[str, object]]:
    first, second = (FeatureSet(features, {"features": "x"}, {}) for features in (made, real))
    return set_figures.set_figures(first, second, network, **options)  # type: ignore[arg-type]


def brute_force(made: NDArray[np.float64], real: NDArray[np.float64]) -> dict[str, float]:
    """Straight from the definitions, pair by pair."""

    def radius(points: NDArray[np.float64], i: int, k: int) -> float:
        return sorted(float(np.linalg.norm(points[i] - other)) for j, other in enumerate(points) if j != i)[k - 1]

    def inside(points: NDArray[np.float64], centres: NDArray[np.float64], k: int) -> NDArray[np.bool_]:
        radii = [radius(centres, i, k) for i in range(len(centres))]
        return np.array([[np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)] for p in points])

    return {
        "precision": inside(made, real, 3).any(axis=1).mean(),
        "recall": inside(real, made, 3).any(axis=1).mean(),
        "density": inside(made, real, 5).sum() / (5 * len(made)),
        "coverage": inside(made, real, 5).any(axis=0).mean(),
    }


@pytest.mark.parametrize("at_once", [2**25, 100])
def test_neighbours_are_those_of_the_definitions(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(neighbours, "_NUMBERS_AT_ONCE", at_once)
    made, real = random_features(40, 3, scale=0.8), random_features(33, 3, seed=1)
    subsets = [torch.arange(40), *Halves(40, 3).indices()]
    for subset, found in zip(subsets, neighbour_figures(made, real, subsets), strict=True):
        expected = brute_force(made[subset].double().numpy(), real.double().numpy())
        assert found == pytest.approx(expected, abs=1e-12)
        theirs = prc_features_to_metric(made[subset].double(), real.double(), verbose=False)
        assert found["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
        assert found["recall"] == pytest.approx(theirs["recall"], abs=1e-6)
        assert 0 < found["recall"] < 1


def test_frechet_equals_scipys_root_and_torch_fidelitys() -> None:
    made, real = random_features(300, 16, scale=1.3) + 0.2, random_features(400, 16, seed=1)
    value = figures_of(made, real)["frechet"]["value"]
    a, b = made.double().numpy(), real.double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert value == pytest.approx(expected, rel=1e-9)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)), verbose=False)
    assert value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


@pytest.mark.parametrize(("num_made", "num_real"), [(9, 100), (100, 9), (8, 9)])
def test_frechet_of_few_images_is_that_of_their_singular_covariances(num_made: int, num_real: int) -> None:
    made, real = random_features(num_made, 16, scale=1.3), random_features(num_real, 16, seed=1)
    first, second = (np.cov(x.double().numpy(), rowvar=False) for x in (made, real))
    eigenvalues = np.linalg.eigvals(first @ second).real.clip(min=0)
    mean = (made.double().mean(0) - real.double().mean(0)).square().sum().item()
    expected = mean + np.trace(first) + np.trace(second) - 2 * np.sqrt(eigenvalues).sum()
    # Eigenvalues that are zero come out as 1e-16 of the largest, and their roots as 1e-8.
    assert figures_of(made, real)["frechet"]["value"] == pytest.approx(expected, rel=1e-5)


def test_frechet_between_gaussians_is_the_closed_form() -> None:
    # Along the axes: sum of (m1 - m2)^2 + (s1 - s2)^2.
    deviations = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 0.5]]).double()
    means = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]]).double()
    first, second = (Gaussian(mean, torch.diag(s)) for mean, s in zip(means, deviations, strict=True))
    assert first.distance(second) == pytest.approx(1 + 4 + 1 + 0 + 6.25, rel=1e-12)


def test_kernel_distance_and_score_are_torch_fidelitys() -> None:
    made, real = random_features(60, scale=1.3), random_features(50, seed=1)
    classifier = random_features(7, 12, seed=2)
    figures = figures_of(made, real, classifier=classifier)
    theirs = kid_features_to_metric(
        made.double(), real.double(), kid_subsets=100, kid_subset_size=50, rng_seed=2020, verbose=False
    )
    assert figures["kernel"]["value"] == theirs["kernel_inception_distance_mean"]
    assert figures["kernel"]["subset_size"] == 50
    score = isc_features_to_metric(made.double() @ classifier.double().T)
    assert figures["inception_score"]["value"] == score["inception_score_mean"]
    assert figures["inception_score"]["split_deviation"] == score["inception_score_std"]


@pytest.mark.parametrize(("num_made", "num_real"), [(40, 20), (20, 20), (12, 40)])
def test_error_of_the_kernel_distance_is_the_jackknife_of_torch_fidelitys_subsets(num_made: int, num_real: int) -> None:
    """Each sample is left out of torch-fidelity's own subsets: what is left is worth less by what it adds."""
    made, real = random_features(num_made, scale=1.3).double(), random_features(num_real, seed=1).double()
    generator, size = np.random.RandomState(2020), min(num_made, num_real)
    a, b = made.numpy(), real.numpy()
    within, across, theirs = ((x @ y.T / 12 + 1) ** 3 for x, y in ((a, a), (a, b), (b, b)))
    added, values = np.zeros(num_made), []
    for _ in range(1 if num_made == num_real else 100):
        x = generator.choice(num_made, size, replace=False)
        y = generator.choice(num_real, size, replace=False)
        values.append(
            sum(
                (k[np.ix_(p, p)].sum() - np.trace(k[np.ix_(p, p)])) / size / (size - 1)
                for k, p in ((within, x), (theirs, y))
            )
            - 2 * across[np.ix_(x, y)].mean()
        )
        terms = [
            2 * sum(within[i, j] for j in x if j != i) / size / (size - 1) - 2 * across[i, y].mean() / size for i in x
        ]
        added[x] += np.array(terms) - np.mean(terms)
    assert np.mean(values) == pytest.approx(fidelity.kernel_distance(made, real), rel=1e-9), "the same subsets"
    expected = np.sqrt((added**2).sum() * size / (size - 1)) / len(values)
    assert fidelity.kernel_error(made, real) == pytest.approx(expected, rel=1e-9)


def test_equal_sets() -> None:
    x = random_features(80)
    for sets in ((x, x), (torch.cat([x[:8]] * 8), torch.cat([x[:8]] * 8))):  # the second holds eight copies of each
        figures = figures_of(*sets)
        assert figures["frechet"]["value"] == pytest.approx(0, abs=1e-9)
        assert [figures[name]["value"] for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert figures_of(x, x)["kernel"]["value"] < 0, "without bias, so that it lies around 0"


def test_collapse_keeps_precision_and_loses_the_rest() -> None:
    real = random_features(100, 4)
    made = real[:1] + 1e-3 * random_features(50, 4, seed=1)
    figures = figures_of(made, real)
    assert figures["precision"]["value"] == 1
    assert figures["recall"]["value"] <= 0.01
    assert figures["coverage"]["value"] < 0.2


def test_fewer_images_than_dimensions_are_warned_of() -> None:
    few = figures_of(random_features(12, 12), random_features(40, 12, seed=1))["frechet"]
    assert "12 samples in 12 dimensions span 11 of them alone" in str(few["warning"])
    assert "too large, by sampling and not by the model (halves of the reference are" in str(few["warning"])
    many = figures_of(random_features(400, 12), random_features(400, 12, seed=1))["frechet"]
    assert "warning" not in many
    assert isinstance(many["value"], float)
    assert isinstance(few["value"], float)
    assert few["value"] > 5 * many["value"], "what the warning says"
    other = figures_of(random_features(40, 12), random_features(12, 12, seed=1))["frechet"]
    assert "12 reference images in 12 dimensions" in str(other["warning"])


@pytest.mark.parametrize(
    ("num_made", "num_real", "missing", "reason"),
    [
        (1, 9, {"frechet", "kernel", "precision", "recall", "density", "coverage"}, "1 samples, at least"),
        (9, 5, {"precision", "recall", "density", "coverage"}, "5 reference images, at least 6 are needed"),
    ],
)
def test_what_cannot_be_taken_says_why(num_made: int, num_real: int, missing: set[str], reason: str) -> None:
    figures = figures_of(random_features(num_made), random_features(num_real, seed=1), resamples=3)
    assert {name for name, found in figures.items() if "value" not in found} == missing
    assert all(reason in str(figures[name]["not_measured"]) for name in missing)


def test_small_halves_have_no_interval() -> None:
    figures = figures_of(random_features(11), random_features(30, seed=1), resamples=4)
    assert figures["recall"]["interval"] is None
    assert figures["recall"]["no_interval"] == "halves of 11 samples have fewer than 6"
    assert figures["kernel"]["interval"] is not None


def test_shares_at_their_ends_are_not_certain() -> None:
    """12 samples of which all look real: of 12 coins that all fell on one side, Wilson's interval begins at 0.76."""
    x = random_features(12, 4)
    for figures, share in ((figures_of(x, x, resamples=4), 1.0), (figures_of(x + 100, x, resamples=4), 0.0)):
        for name in ("precision", "recall", "coverage"):
            interval = figures[name]["interval"]
            assert figures[name]["value"] == share
            assert isinstance(interval, dict)
            end = 1.959964**2 / (12 + 1.959964**2)
            assert interval["low"] <= (1 - end + 1e-6 if share else 0)
            assert interval["high"] >= (1 if share else end - 1e-6)
            assert "Wilson" in interval["method"]
    density = figures_of(x + 100, x, resamples=4)["density"]
    assert (density["value"], density["interval"]) == (0, None)
    assert "all halves of the samples have this very value" in str(density["no_interval"])
    same = figures_of(x[:1].repeat(20, 1), x, resamples=4)
    assert same["kernel"]["interval"] is same["frechet"]["interval"] is None


def test_without_torch_fidelity_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "find_spec", lambda name: None)
    figures = figures_of(random_features(20), random_features(20, seed=1))
    assert "pip install 'ldm-scale[evaluation]'" in str(figures["kernel"]["not_measured"])
    assert "value" in figures["frechet"]


def test_features_of_different_extractors_are_refused() -> None:
    made = FeatureSet(random_features(20), {"features": "x", "weights_sha256": "a"}, {})
    real = FeatureSet(random_features(20), {"features": "x", "weights_sha256": "b"}, {})
    with pytest.raises(ConfigError, match="different extractors: weights_sha256 is 'a' and 'b'"):
        set_figures.set_figures(made, real, NET)


def test_features_that_are_no_numbers_are_refused() -> None:
    broken = random_features(20)
    broken[7, 3] = math.nan
    with pytest.raises(
        NumericsError, match="reference: features of 1 of 20 images are not finite, the first of image 7"
    ):
        figures_of(random_features(20), broken)
    with pytest.raises(NumericsError, match="samples: "):
        figures_of(broken, random_features(20))


def test_names_are_published_ones_of_published_weights_alone() -> None:
    published, other = Network("InceptionV3", published=True), Network("EffNetLite0", num_components=32)
    assert [published.call(name) for name in ("frechet", "kernel", "inception_score")] == ["FID", "KID", "IS"]
    assert [other.call(name) for name in ("frechet", "kernel")] == ["FD-EffNetLite0-PCA32", "KD-EffNetLite0"]
    assert other.call("recall") == "recall (EffNetLite0)"
