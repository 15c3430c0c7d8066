"""The noise schedule against diffusers' tables and against arithmetic in Python floats."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from diffusers import DDIMScheduler

from ldm_scale.config.schema import DiffusionConfig
from ldm_scale.diffusion.loss import diffusion_loss
from ldm_scale.diffusion.prediction import eps_from_x0, training_target, x0_from_eps
from ldm_scale.diffusion.schedule import build_schedule, sampling_timesteps
from ldm_scale.errors import ConfigError

CFG = DiffusionConfig()


def diffusers_scheduler(num_timesteps: int = 1000) -> Any:
    scheduler_class: Any = DDIMScheduler
    return scheduler_class(
        num_timesteps,
        CFG.beta_start,
        CFG.beta_end,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )


def test_linear_schedule_equals_diffusers_scaled_linear() -> None:
    schedule = build_schedule(CFG)
    reference = diffusers_scheduler()
    torch.testing.assert_close(schedule.betas, reference.betas, rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.alphas_cumprod, reference.alphas_cumprod, rtol=1e-5, atol=0)


def test_tables_are_exact_to_float32() -> None:
    schedule = build_schedule(CFG)
    roots = [math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999 for i in range(1000)]
    exact = math.prod(1.0 - root**2 for root in roots)
    assert schedule.alphas_cumprod.dtype == torch.float32
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(exact, rel=6e-8)


def test_add_noise_equals_diffusers_and_keeps_unit_variance() -> None:
    schedule = build_schedule(CFG)
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(5, 4, 64, 64, generator=generator)
    noise = torch.randn(5, 4, 64, 64, generator=generator)
    t = torch.tensor([0, 1, 500, 998, 999])
    z_t = schedule.add_noise(z0, noise, t)
    reference = diffusers_scheduler().add_noise(z0, noise, t)
    torch.testing.assert_close(z_t, reference, rtol=0, atol=1e-5)
    torch.testing.assert_close(z_t.var(dim=(1, 2, 3)), torch.ones(5), rtol=0.05, atol=0)


def test_snr_is_that_of_the_noised_latents() -> None:
    schedule = build_schedule(CFG)
    t = torch.tensor([0, 250, 999])
    signal = schedule.add_noise(torch.ones(3, 1), torch.zeros(3, 1), t)
    noise = schedule.add_noise(torch.zeros(3, 1), torch.ones(3, 1), t)
    torch.testing.assert_close(schedule.snr(t), (signal / noise).square().squeeze(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_steps", [1, 7, 20, 50, 333, 500, 999])
@pytest.mark.parametrize("num_timesteps", [1000, 1500])
def test_sampling_timesteps_equal_diffusers(num_timesteps: int, num_steps: int) -> None:
    reference = diffusers_scheduler(num_timesteps)
    reference.set_timesteps(num_steps)
    assert sampling_timesteps(num_timesteps, num_steps) == reference.timesteps.tolist()


def test_sampling_all_timesteps_stays_inside_the_schedule() -> None:
    assert sampling_timesteps(1000, 1000) == list(reversed(range(1000)))
    assert sampling_timesteps(1, 1) == [0]


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_step_counts_are_named(num_steps: int) -> None:
    with pytest.raises(ConfigError, match=f"num_steps = {num_steps}.*num_timesteps = 1000"):
        sampling_timesteps(1000, num_steps)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [({"beta_start": 0.0}, "beta_start"), ({"beta_end": 1.0}, "beta_end"), ({"num_timesteps": 0}, "num_timesteps")],
)
def test_impossible_schedules_are_named(overrides: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError, match=f"diffusion.{key}"):
        build_schedule(DiffusionConfig(**overrides))  # type: ignore[arg-type]


def test_x0_and_eps_are_recovered_from_the_noised_latents() -> None:
    schedule = build_schedule(CFG)
    generator = torch.Generator().manual_seed(1)
    z0 = torch.randn(3, 4, 8, 8, generator=generator)
    noise = torch.randn(3, 4, 8, 8, generator=generator)
    t = torch.tensor([0, 400, 999])
    z_t = schedule.add_noise(z0, noise, t)
    alpha_bar = schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x0_from_eps(z_t, noise, alpha_bar), z0, rtol=0, atol=1e-5)
    torch.testing.assert_close(eps_from_x0(z_t, z0, alpha_bar), noise, rtol=0, atol=1e-4)
    assert training_target("eps", z0, noise) is noise


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_loss_is_each_images_mean_in_float32(kind: Literal["l2", "l1"]) -> None:
    generator = torch.Generator().manual_seed(2)
    prediction = torch.randn(3, 4, 8, 8, generator=generator).bfloat16()
    target = torch.randn(3, 4, 8, 8, generator=generator)
    loss = diffusion_loss(prediction, target, kind)
    reference = torch.nn.functional.mse_loss if kind == "l2" else torch.nn.functional.l1_loss
    expected = torch.stack([reference(p.double(), q.double()) for p, q in zip(prediction, target, strict=True)])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float())
