"""Intervals of random halves: the textbook's for a mean, and as wide as other samples' figures really lie apart."""

from __future__ import annotations

import math

import pytest
import torch

from ldm_scale.evaluation import fidelity
from ldm_scale.evaluation.features import Gaussian
from ldm_scale.evaluation.fidelity import kernel_distance, kernel_error
from ldm_scale.evaluation.intervals import Halves
from ldm_scale.evaluation.neighbours import NAMES, neighbour_figures


@pytest.mark.parametrize("num_samples", [400, 401])
def test_of_a_mean_it_is_the_textbooks(num_samples: int) -> None:
    x = torch.randn(num_samples, generator=torch.Generator().manual_seed(0)).double()
    halves = Halves(num_samples, 400)
    interval = halves.interval(float(x.mean()), [float(x[half].mean()) for half in halves.indices()])
    error = x.std().item() / math.sqrt(num_samples)
    assert interval["standard_error"] == pytest.approx(error, rel=0.1)
    assert interval["high"] - float(x.mean()) == pytest.approx(1.966 * interval["standard_error"], rel=1e-3)
    assert interval["low"] + interval["high"] == pytest.approx(2 * float(x.mean()), rel=1e-9)


def test_halves_are_the_same_each_time_and_hold_nothing_twice() -> None:
    first, second = (Halves(21, 5).indices() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(len(half.unique()) == 10 for half in first)
    assert not torch.equal(first[0], first[1])


def test_bounds_cut_what_a_share_cannot_be() -> None:
    interval = Halves(10, 3).interval(0.99, [0.9, 1.0, 0.8], (0.0, 1.0))
    assert interval["high"] == 1.0
    assert 0 < interval["low"] < 0.9


def test_errors_are_as_large_as_figures_of_other_samples_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 sets of samples of one model the figures spread as the halves of each say, within a factor of 1.6."""
    monkeypatch.setattr(fidelity, "SUBSETS", 10)
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(150, 4, generator=generator)
    halves = Halves(200, 20)
    subsets = [torch.arange(200), *halves.indices()]
    values: dict[str, list[float]] = {name: [] for name in (*NAMES, "frechet", "kernel")}
    errors: dict[str, list[float]] = {name: [] for name in values}
    reference = Gaussian.of(real)
    for _ in range(40):
        made = 0.8 * torch.randn(200, 4, generator=generator) + 0.3
        rows = neighbour_figures(made, real, subsets)
        columns = {name: [row[name] for row in rows] for name in NAMES}
        columns["frechet"] = [Gaussian.of(made[s]).distance(reference) for s in subsets]
        values["kernel"].append(kernel_distance(made, real))
        errors["kernel"].append(kernel_error(made, real))
        for name, (whole, *over) in columns.items():
            values[name].append(whole)
            errors[name].append(halves.interval(whole, over)["standard_error"])
    for name in values:
        spread = torch.tensor(values[name]).std().item()
        claimed = torch.tensor(errors[name]).square().mean().sqrt().item()
        assert 1 / 1.6 < claimed / spread < 1.6, f"{name}: {claimed:.4f} claimed, {spread:.4f} seen"


@pytest.mark.parametrize(("num_made", "num_real", "dimensions"), [(60, 60, 32), (500, 500, 16)])
def test_intervals_of_the_kernel_distance_hold_what_they_promise(
    monkeypatch: pytest.MonkeyPatch, num_made: int, num_real: int, dimensions: int
) -> None:
    """Between equal distributions, the hardest: of 80 sets, about 76 intervals hold the mean over all sets."""
    monkeypatch.setattr(fidelity, "SUBSETS", 20)
    monkeypatch.setattr(fidelity, "SUBSET_SIZE", 50)
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(num_real, dimensions, generator=generator)
    found = []
    for _ in range(80):
        made = torch.randn(num_made, dimensions, generator=generator)
        found.append((kernel_distance(made, real), kernel_error(made, real)))
    values, errors = torch.tensor(found, dtype=torch.float64).T
    held = ((values - values.mean()).abs() <= 2.0 * errors).double().mean().item()
    assert held >= 0.92
