"""Processes of every kind against closed forms and against diffusers' schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from scipy import stats
from torch import Tensor

from ldm_scale.config.schema import DiffusionConfig
from ldm_scale.diffusion.process import build_process, offset_noise
from ldm_scale.errors import ConfigError
from tests.helpers.processes import KINDS, process_of, some_times

_DDPM: Any = DDPMScheduler
_EDM: Any = EDMEulerScheduler
_FLOW: Any = FlowMatchEulerDiscreteScheduler


def draws(count: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=generator), torch.randn(count, *shape, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_both_ends_come_back_from_the_target(kind: str) -> None:
    """With the output that training asks for, x0 and eps are those that made z_t, in float32, at every noise level."""
    process = process_of(kind)
    t = some_times(process)
    z0, noise = draws(len(t), 4, 8, 8)
    z_t, target = process.add_noise(z0, noise, t), process.target(z0, noise, t)
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in process.coefficients(t))
    # eps amplifies the rounding of z_t by 1 / alpha in x0, x0 and edm by 1 / sigma in eps.
    shown = sigma.clamp(max=1)
    torch.testing.assert_close(process.x0(z_t, target, t) * alpha, z0 * alpha, rtol=0, atol=3e-6)
    torch.testing.assert_close(process.eps(z_t, target, t) * shown, noise * shown, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_x0_and_eps_make_up_the_noised_latents_for_any_output(kind: str) -> None:
    process = process_of(kind)
    t = some_times(process)
    z_t, output = draws(len(t), 4, 8, 8)
    z_t, output = z_t.double(), output.double()
    x0, eps = process.x0(z_t, output, t), process.eps(z_t, output, t)
    torch.testing.assert_close(process.add_noise(x0, eps, t), z_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "edm_half"])
def test_what_the_network_sees_and_learns_has_unit_variance(kind: str) -> None:
    """For latents of unit variance: the input always, the target except that of flow (2)."""
    process = process_of(kind)
    t = some_times(process)
    z0, noise = draws(len(t), 4, 64, 64)
    z_t = process.network_input(process.add_noise(z0, noise, t), t)
    ones = torch.ones(len(t))
    if kind == "flow":
        alpha, sigma = process.coefficients(t)
        torch.testing.assert_close(z_t.var(dim=(1, 2, 3)), alpha**2 + sigma**2, rtol=0.05, atol=0)
    else:
        torch.testing.assert_close(z_t.var(dim=(1, 2, 3)), ones, rtol=0.05, atol=0)
    variance = process.target(z0, noise, t).var(dim=(1, 2, 3))
    torch.testing.assert_close(variance, ones * (2 if kind == "flow" else 1), rtol=0.05, atol=0)


@pytest.mark.parametrize(("kind", "theirs"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_discrete_targets_and_noising_equal_diffusers(kind: str, theirs: str) -> None:
    scheduler = _DDPM(1000, 0.00085, 0.012, beta_schedule="scaled_linear", prediction_type=theirs)
    process = process_of(kind)
    t = some_times(process)
    z0, noise = draws(len(t), 4, 8, 8)
    torch.testing.assert_close(process.add_noise(z0, noise, t), scheduler.add_noise(z0, noise, t), rtol=0, atol=1e-5)
    expected = {"epsilon": noise, "sample": z0, "v_prediction": scheduler.get_velocity(z0, noise, t)}[theirs]
    torch.testing.assert_close(process.target(z0, noise, t), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["edm", "edm_half"])
def test_edm_preconditioning_equals_diffusers(kind: str) -> None:
    process = process_of(kind)
    scheduler = _EDM(sigma_data=process.cfg.sigma_data)
    t = some_times(process)
    z_t, output = draws(len(t), 4, 8, 8)
    torch.testing.assert_close(process.network_time(t), scheduler.precondition_noise(t))
    for i, sigma in enumerate(t):
        mine = slice(i, i + 1)
        seen = scheduler.precondition_inputs(z_t[mine], sigma)
        torch.testing.assert_close(process.network_input(z_t[mine], t[mine]), seen)
        denoised = scheduler.precondition_outputs(z_t[mine], output[mine], sigma)
        torch.testing.assert_close(process.x0(z_t[mine], output[mine], t[mine]), denoised)


def test_flow_noising_and_network_time_equal_diffusers() -> None:
    process, scheduler = process_of("flow"), _FLOW()
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.25])
    z0, noise = draws(3, 4, 8, 8)
    t = scheduler.sigmas[:-1]
    torch.testing.assert_close(process.network_time(t), scheduler.timesteps)
    theirs = scheduler.scale_noise(z0, scheduler.timesteps, noise)
    torch.testing.assert_close(process.add_noise(z0, noise, t), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_log_snr_is_that_of_the_noised_latents(kind: str) -> None:
    process = process_of(kind)
    t = some_times(process)
    signal = process.add_noise(torch.ones(len(t), 1), torch.zeros(len(t), 1), t)
    noise = process.add_noise(torch.zeros(len(t), 1), torch.ones(len(t), 1), t)
    torch.testing.assert_close(process.log_snr(t), 2 * (signal / noise).log().squeeze(1), rtol=1e-4, atol=1e-4)


U = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000


def test_discrete_times_are_uniform() -> None:
    times = process_of("eps").times(U)
    assert times.dtype == torch.int64
    assert torch.equal(times.bincount(minlength=1000), torch.full((1000,), 4))
    assert process_of("eps").times(torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)).tolist() == [0, 999]


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_logit_normal_times_have_their_mean_and_deviation(kind: str) -> None:
    process = process_of(kind, time_distribution="logit_normal", logit_mean=0.4, logit_std=0.8)
    shares = process.times(U).double() / (1 if kind == "flow" else 1000)
    shares = shares if kind == "flow" else shares + 0.0005
    assert stats.kstest(torch.special.logit(shares).numpy(), "norm", (0.4, 0.8)).statistic < 0.002
    assert process.times(torch.zeros(1)).isfinite().all()


def test_edm_times_are_log_normal() -> None:
    times = process_of("edm", sigma_log_mean=-1.2, sigma_log_std=1.1).times(U)
    assert stats.kstest(times.log().numpy(), "norm", (-1.2, 1.1)).statistic < 0.001
    assert process_of("edm").times(torch.zeros(1)) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_times_rise_over_the_range_of_noise(kind: str) -> None:
    process = process_of(kind)
    times = process.evaluation_times(torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9999]))
    assert (times.diff() > 0).all()
    assert (process.log_snr(times[1:]).diff() < 0).all()
    if kind == "eps":
        assert times.tolist() == [0, 250, 500, 750, 999]
    if kind == "edm":
        assert times[2].item() == pytest.approx(math.sqrt(0.002 * 80))


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_survive_float32(kind: str) -> None:
    """alpha and sigma are rounded once: 1 - abar in float32 would have lost four digits of sigma at t = 0."""
    process = process_of(kind)
    t = some_times(process)
    for ours, exact in zip(process.coefficients(t), process._exact(t), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-7, atol=0)
    moved = process.to("cpu")
    assert torch.equal(moved.times(U), process.times(U))


def test_half_precision_latents_are_noised_in_float32() -> None:
    z0, noise = draws(6, 4, 8, 8)
    process = process_of("eps")
    t = some_times(process)
    assert process.add_noise(z0.bfloat16(), noise, t).dtype == torch.float32
    assert process.x0(z0.double(), noise, t).dtype == torch.float64


def test_offset_noise_adds_one_constant_per_channel() -> None:
    _, noise = draws(3, 4, 8, 8)
    constants = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    shifted = offset_noise(noise, constants, 0.1)
    torch.testing.assert_close(shifted - noise, 0.1 * constants[:, :, None, None].expand_as(noise), rtol=0, atol=1e-6)
    assert torch.equal(offset_noise(noise, constants, 0.0), noise)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"weighting": "p2", "loss": "l1"}, "diffusion.weighting=p2: weights are for squared errors"),
        ({"prediction": "flow", "schedule": "cosine"}, "diffusion.schedule=cosine: is of timesteps"),
        (
            {"prediction": "edm", "zero_terminal_snr": True},
            "diffusion.zero_terminal_snr=true: is of timesteps",
        ),
        ({"prediction": "edm", "time_distribution": "logit_normal"}, "diffusion.time_distribution=logit_normal"),
        ({"prediction": "edm", "sigma_min": 90.0}, "diffusion.sigma_min=90.0, diffusion.sigma_max=80.0"),
    ],
)
def test_settings_without_effect_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_process(DiffusionConfig(**overrides))
