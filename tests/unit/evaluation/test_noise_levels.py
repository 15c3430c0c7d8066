"""Losses by noise level on predictors whose losses are known, for every kind of process."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from ldm_scale.conditioning.base import Inputs
from ldm_scale.config.schema import DiffusionConfig
from ldm_scale.diffusion.process import Process, build_process, expand_like
from ldm_scale.evaluation.noise_levels import (
    linear_predictor,
    log_snr_ranges,
    noise_level_losses,
    other_rows,
    predict_zero,
)

CONFIGS = {
    "eps": DiffusionConfig(),
    "v": DiffusionConfig(prediction="v", schedule="cosine"),
    "v, zero terminal SNR": DiffusionConfig(prediction="v", zero_terminal_snr=True),
    "x0": DiffusionConfig(prediction="x0"),
    "edm": DiffusionConfig(prediction="edm", sigma_data=0.5),
    "flow": DiffusionConfig(prediction="flow"),
}
PROCESS = build_process(CONFIGS["eps"])


@pytest.fixture(params=CONFIGS)
def process(request: pytest.FixtureRequest) -> Process:
    return build_process(CONFIGS[request.param])


def latents_and_inputs(num_images: int, seed: int = 0) -> tuple[Tensor, Inputs]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(num_images, 4, 8, 8, generator=generator)
    return latents, {"text": torch.randn(num_images, 3, 5, generator=generator)}


def test_predicting_zero_costs_the_noises_variance() -> None:
    latents, inputs = latents_and_inputs(40)
    losses = noise_level_losses(predict_zero, latents, inputs, PROCESS, seed=0)
    assert losses.shape == (40, 8)
    assert losses.dtype == torch.float64
    # 40 x 256 squared standard normals per bin: standard deviation sqrt(2 / 10240) = 0.014
    assert (losses.mean(dim=0) - 1).abs().max() < 0.06
    assert losses.unique().numel() == 40 * 8


def test_a_perfect_denoiser_costs_nothing(process: Process) -> None:
    """The target worked out from the clean latents, by `Process.x0` run backwards."""
    latents, inputs = latents_and_inputs(8)
    same = latents[:1].expand(8, -1, -1, -1)

    def knows_the_image(z: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        zero, one = torch.zeros_like(z), torch.ones_like(z)
        of_z, of_output = process.x0(z.double(), zero.double(), t), process.x0(zero, one, t).double()
        return (same[:1] - of_z) / of_output

    losses = noise_level_losses(knows_the_image, same, inputs, process, seed=0)
    assert losses.max() < 1e-6


def test_the_linear_predictor_costs_the_posterior_variance(process: Process) -> None:
    """For Gaussian latents its x0 is the conditional mean, whose error is var sigma^2 / (alpha^2 var + sigma^2)."""
    mean, variance = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([0.25, 1.0, 4.0, 0.5])
    z0 = mean.view(1, 4, 1, 1) + variance.sqrt().view(1, 4, 1, 1) * latents_and_inputs(60)[0]
    predict = linear_predictor(process, mean, variance)

    errors: list[Tensor] = []

    def listens(z: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        output = predict(z, t, inputs)
        clean = z0[inputs["number"][:, 0].long()]
        alpha, sigma = (x.view(-1, 1) for x in process.coefficients(t))
        posterior = variance * sigma**2 / (alpha**2 * variance + sigma**2)
        error = (process.x0(z, output, t) - clean).square().mean(dim=(2, 3))
        keep = (alpha > 0.02)[:, 0]  # rounding of an eps that holds no signal
        errors.append((error / posterior)[keep])
        return output

    numbers = {"number": torch.arange(60.0).view(60, 1)}
    losses = noise_level_losses(listens, z0, numbers, process, seed=0)
    ratio = torch.cat(errors)
    assert (ratio.mean(dim=0) - 1).abs().max() < 0.03
    # No other slope or offset does better.
    for other in (linear_predictor(process, mean + 0.3, variance), linear_predictor(process, mean, 2 * variance)):
        worse = noise_level_losses(other, z0, numbers, process, seed=0)
        assert worse.mean() > losses.mean()
    assert losses.mean() < noise_level_losses(predict_zero, z0, numbers, process, seed=0).mean()


def test_with_edm_zero_is_the_linear_predictor_of_its_own_deviation() -> None:
    process = build_process(CONFIGS["edm"])
    latents, inputs = latents_and_inputs(4)
    linear = linear_predictor(process, torch.zeros(4), torch.full((4,), 0.25))
    losses = [noise_level_losses(p, latents, inputs, process, 0) for p in (linear, predict_zero)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)


def test_bins_are_equal_parts_of_the_range_evenly_filled() -> None:
    latents, inputs = latents_and_inputs(100)
    seen: list[Tensor] = []

    def off_by_its_bin(z: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        seen.append(t)
        return (t // 125).float().view(-1, 1, 1, 1).expand_as(z) * 10

    losses = noise_level_losses(off_by_its_bin, latents, inputs, PROCESS, seed=0, batch_size=48)
    # mean (eps - 10 b)^2 = 1 + 100 b^2 up to the noise's mean
    expected = 1 + 100 * torch.arange(8, dtype=torch.float64).square()
    torch.testing.assert_close(losses.mean(dim=0), expected, rtol=0.02, atol=0.1)
    t = torch.cat(seen)
    assert t.numel() == 800
    assert torch.bincount(t // 125, minlength=8).tolist() == [100] * 8
    per_quarter = torch.bincount(t[t < 125] * 4 // 125)
    assert per_quarter.min() >= 23
    assert per_quarter.max() <= 27


def test_times_lie_in_the_ranges_that_label_them(process: Process) -> None:
    latents, inputs = latents_and_inputs(24)
    seen: list[Tensor] = []

    def listens(z: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        seen.append(t)
        return z

    noise_level_losses(listens, latents, inputs, process, seed=0)
    log_snr = process.log_snr(torch.cat(seen)).view(24, 8)
    ranges = log_snr_ranges(process)
    assert len(ranges) == 8
    for i, (high, low) in enumerate(ranges):
        assert log_snr[:, i].max() <= high
        assert log_snr[:, i].min() >= low
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    assert not any(map(math.isnan, sum(ranges, ())))


def test_noise_and_times_depend_on_the_images_number_alone(process: Process) -> None:
    """Two ranks with a part of the images each, other batches: the same losses."""
    latents, inputs = latents_and_inputs(10)

    def some_predictor(z: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        share = inputs["text"].mean(dim=(1, 2)) + process.coefficients(t)[1]
        return 0.3 * z + expand_like(share, z)

    whole = noise_level_losses(some_predictor, latents, inputs, process, seed=3)
    for part in ([0, 2, 4, 6, 8, 9], [7, 5, 3, 1]):
        rows = {name: given[part] for name, given in inputs.items()}
        losses = noise_level_losses(some_predictor, latents[part], rows, process, 3, part, batch_size=16)
        torch.testing.assert_close(losses, whole[part], rtol=1e-6, atol=0)
    other_seed = noise_level_losses(some_predictor, latents, inputs, process, seed=4)
    assert (other_seed != whole).all()


def test_images_do_not_share_noise() -> None:
    latents, inputs = latents_and_inputs(2)
    noises: list[Tensor] = []

    def listens(z: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        noises.append(z)
        return z

    noise_level_losses(listens, latents * 0, inputs, PROCESS, seed=0)
    noise = noises[0].flatten(1)
    correlation = torch.corrcoef(noise) - torch.eye(16)
    assert correlation.abs().max() < 0.3


def test_no_gradients_are_kept() -> None:
    latents, inputs = latents_and_inputs(2)
    weight = torch.ones(1, requires_grad=True)
    assert not noise_level_losses(lambda z, t, i: z * weight, latents, inputs, PROCESS, 0).requires_grad


def test_no_images_have_no_losses() -> None:
    latents, inputs = latents_and_inputs(0)
    assert noise_level_losses(predict_zero, latents, inputs, PROCESS, 0).shape == (0, 8)


def test_other_rows_differ() -> None:
    rows = torch.tensor([[1, 1], [1, 1], [2, 1], [1, 1]])
    partners, found = other_rows(rows)
    assert partners.tolist() == [2, 2, 3, 2]
    assert found.all()
    partners, found = other_rows(torch.zeros(3, 1, 2))
    assert partners.tolist() == [0, 1, 2]
    assert not found.any()
    assert other_rows(torch.zeros(0, 4))[0].shape == (0,)


def test_ranges_reach_the_processes_ends() -> None:
    sigmas = dataclasses.replace(CONFIGS["edm"], sigma_min=0.01, sigma_max=100.0)
    ranges = log_snr_ranges(build_process(sigmas), num_bins=4)
    assert ranges[0][0] == pytest.approx(2 * math.log(100.0))
    assert ranges[-1][1] == pytest.approx(-2 * math.log(100.0), rel=1e-4)
