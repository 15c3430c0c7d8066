"""Discrete schedules against diffusers' tables and against arithmetic in Python floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from ldm_scale.config.schema import DiffusionConfig
from ldm_scale.diffusion.schedule import alphas_cumprod, sampling_timesteps
from ldm_scale.errors import ConfigError

CFG = DiffusionConfig()


def diffusers_scheduler(num_timesteps: int = 1000, **options: Any) -> Any:
    scheduler_class: Any = DDIMScheduler
    settings = {"beta_schedule": "scaled_linear", "steps_offset": 1, "timestep_spacing": "leading"} | options
    return scheduler_class(num_timesteps, CFG.beta_start, CFG.beta_end, **settings)


@pytest.mark.parametrize(("schedule", "theirs"), [("linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize("num_timesteps", [10, 1000])
def test_schedules_equal_diffusers(schedule: Any, theirs: str, num_timesteps: int) -> None:
    ours = alphas_cumprod(DiffusionConfig(schedule=schedule, num_timesteps=num_timesteps))
    reference = diffusers_scheduler(num_timesteps, beta_schedule=theirs)
    assert ours.dtype == torch.float64
    # At the end of the cosine schedule 1 - beta is 0.001, of which float32 betas know four digits.
    torch.testing.assert_close(ours.float(), reference.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_tables_are_exact() -> None:
    roots = [math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999 for i in range(1000)]
    exact = math.prod(1.0 - root**2 for root in roots)
    assert alphas_cumprod(CFG)[-1].item() == pytest.approx(exact, rel=1e-12)


def test_cosine_follows_its_closed_form() -> None:
    products = alphas_cumprod(DiffusionConfig(schedule="cosine"))

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 100, 500, 900):
        assert products[t].item() == pytest.approx(f((t + 1) / 1000) / f(0), rel=1e-10)
    assert products[-1] > 0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_zero_terminal_snr_keeps_the_first_timestep_and_ends_in_noise(schedule: Any) -> None:
    plain = alphas_cumprod(DiffusionConfig(prediction="v", schedule=schedule))
    rescaled = alphas_cumprod(DiffusionConfig(prediction="v", schedule=schedule, zero_terminal_snr=True))
    assert rescaled[-1] == 0.0
    assert rescaled[0].item() == pytest.approx(plain[0].item(), rel=1e-14)
    assert (rescaled.diff() < 0).all()
    roots = plain.sqrt()
    betas = 1 - plain / torch.cat([torch.ones(1, dtype=torch.float64), plain[:-1]])
    theirs: torch.Tensor = rescale_zero_terminal_snr(betas)
    torch.testing.assert_close(rescaled, torch.cumprod(1 - theirs, 0), rtol=1e-9, atol=1e-12)
    # The straight line through (root_0, root_0) and (root_T, 0).
    slope = roots[0] / (roots[0] - roots[-1])
    assert rescaled.sqrt()[500].item() == pytest.approx((slope * (roots[500] - roots[-1])).item())


@pytest.mark.parametrize("num_steps", [1, 7, 9, 10, 20, 50, 333, 500, 999])
@pytest.mark.parametrize("num_timesteps", [1000, 1500])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_sampling_timesteps_equal_diffusers(num_timesteps: int, num_steps: int, spacing: str) -> None:
    reference = diffusers_scheduler(num_timesteps, timestep_spacing="trailing" if num_steps < 10 else spacing)
    reference.set_timesteps(num_steps)
    ours = sampling_timesteps(num_timesteps, num_steps, trailing=spacing == "trailing")
    # Its floating-point range runs one too far for 999 of 1500, to timestep -1.
    assert ours == reference.timesteps.tolist()[:num_steps]


@pytest.mark.parametrize("trailing", [False, True])
def test_sampling_all_timesteps_stays_inside_the_schedule(trailing: bool) -> None:
    assert sampling_timesteps(1000, 1000, trailing) == list(reversed(range(1000)))
    assert sampling_timesteps(1, 1, trailing) == [0]


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_step_counts_are_named(num_steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"num_steps={num_steps}.*num_timesteps=1000"):
        sampling_timesteps(1000, num_steps)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"beta_start": 0.0}, "beta_start=0.0"),
        ({"beta_start": 0.02}, "beta_start=0.02"),
        ({"beta_end": 1.0}, "beta_start=0.00085, diffusion.beta_end=1.0"),
        ({"num_timesteps": 0}, "num_timesteps=0"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr=true.*prediction=v or x0"),
        ({"zero_terminal_snr": True, "prediction": "v", "num_timesteps": 1}, "zero_terminal_snr=true.*at least 2"),
    ],
)
def test_impossible_schedules_are_named(overrides: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"diffusion.{key}"):
        alphas_cumprod(DiffusionConfig(**overrides))
