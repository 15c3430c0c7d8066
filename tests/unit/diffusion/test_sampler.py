"""Samplers against diffusers' schedulers, step by step and over trajectories, and against Gaussian closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

from ldm_scale.config.schema import DiffusionConfig
from ldm_scale.diffusion.sampler import ImageNoise, ddim_step, sample
from ldm_scale.diffusion.schedule import NoiseSchedule, build_schedule, sampling_timesteps
from ldm_scale.errors import ConfigError

SHAPE = (2, 4, 8, 8)
SCHEDULE = build_schedule(DiffusionConfig())


def toy_denoiser(z: Tensor, t: Tensor) -> Tensor:
    """A smooth, bounded function of latents and time that is no noise predictor."""
    phase = t.reshape(-1, 1, 1, 1).to(z.dtype) / 150.0
    return torch.tanh(z + 0.3 * z.roll(1, dims=-1)) + 0.2 * torch.sin(phase)


def gaussian_denoiser(schedule: NoiseSchedule, mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact E[eps | z_t] for data N(mean, std^2)."""

    def predict(z: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alphas_cumprod[t].to(z.dtype).reshape(-1, 1, 1, 1)
        variance = alpha_bar * std**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (z - alpha_bar.sqrt() * mean) / variance

    return predict


def diffusers_scheduler(scheduler_class: Any, num_steps: int, **options: Any) -> Any:
    """A scheduler with Stable Diffusion's settings, ready for `num_steps` steps."""
    scheduler = scheduler_class(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        # At 1000 steps an offset of 1 would index timestep 1000, where diffusers fails.
        steps_offset=int(num_steps < 1000),
        timestep_spacing="leading",
        **options,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [1, 7, 20, 50, 999, 1000])
def test_ddim_follows_diffusers(num_steps: int, eta: float) -> None:
    noise = ImageNoise((11, 12), SHAPE[1:])
    trajectory: list[Tensor] = []

    def recording_denoiser(z: Tensor, t: Tensor) -> Tensor:
        trajectory.append(z)
        return toy_denoiser(z, t)

    ours = sample(
        recording_denoiser,
        noise.initial(),
        SCHEDULE,
        sampler="ddim",
        num_steps=num_steps,
        eta=eta,
        step_noise=noise.step,
    )
    trajectory.append(ours)

    scheduler = diffusers_scheduler(DDIMScheduler, num_steps, set_alpha_to_one=False)
    z = noise.initial()
    for index, t in enumerate(scheduler.timesteps):
        variance_noise = noise.step(index)

        def diffusers_step(z: Tensor, t: Tensor = t, variance_noise: Tensor = variance_noise) -> Tensor:
            eps = toy_denoiser(z, t.expand(z.shape[0]))
            result: Tensor = scheduler.step(eps, int(t), z, eta=eta, variance_noise=variance_noise).prev_sample
            return result

        assert relative_error(trajectory[index + 1], diffusers_step(trajectory[index])) < 1e-5, f"step {index}"
        z = diffusers_step(z)
        assert relative_error(trajectory[index + 1], z) < 1e-5, f"trajectory up to step {index}"


@pytest.mark.parametrize("num_steps", [1, 7, 20, 50, 999, 1000])
def test_ddpm_follows_diffusers(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = ImageNoise((11, 12), SHAPE[1:])
    ours = sample(toy_denoiser, noise.initial(), SCHEDULE, sampler="ddpm", num_steps=num_steps, step_noise=noise.step)

    scheduler = diffusers_scheduler(DDPMScheduler, num_steps, variance_type="fixed_small")
    if num_steps > 50:
        # diffusers rounds 1 - abar_t / abar_prev, some 1e-3, in float32; a thousand such steps drift by 2e-5.
        scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod.double()
    z = noise.initial()
    for index, t in enumerate(scheduler.timesteps):
        step_noise = noise.step(index)
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, step_noise=step_noise, **__: step_noise)
        z = scheduler.step(toy_denoiser(z, t.expand(z.shape[0])), t, z).prev_sample
    assert relative_error(ours, z) < 1e-5


def test_ddim_converges_to_the_gaussian_it_samples() -> None:
    """With the exact eps, deterministic DDIM is an affine map of z_T: its slope and offset give std and mean."""
    mean, std = 0.7, 0.4
    denoiser = gaussian_denoiser(SCHEDULE, mean, std)
    alpha_bar = SCHEDULE.alphas_cumprod[0].item()  # DDIM ends at the noise level of t = 0
    final_mean = math.sqrt(alpha_bar) * mean
    final_std = math.sqrt(alpha_bar * std**2 + 1 - alpha_bar)
    errors = []
    for num_steps in (10, 100, 1000):
        ends = sample(
            denoiser,
            torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1),
            SCHEDULE,
            sampler="ddim",
            num_steps=num_steps,
        ).flatten()
        errors.append(max(abs((ends[1] - ends[0]).item() / final_std - 1), abs(ends[0].item() - final_mean)))
    # The offset keeps a floor: z_T is drawn from N(0, 1), but the exact marginal there still holds sqrt(abar_T) mean.
    assert errors[0] > 2 * errors[1] > 2 * errors[2]
    assert errors[2] < 0.03


def test_ddpm_samples_have_the_mean_and_variance_of_the_data() -> None:
    mean, std = 0.7, 0.4
    noise = ImageNoise((0, 1), (4, 32, 64))
    ends = sample(
        gaussian_denoiser(SCHEDULE, mean, std),
        noise.initial(),
        SCHEDULE,
        sampler="ddpm",
        num_steps=1000,
        step_noise=noise.step,
    )
    assert ends.mean().item() == pytest.approx(mean, abs=0.02)
    assert ends.std().item() == pytest.approx(std, rel=0.03)


def test_a_full_ddim_step_with_the_true_noise_returns_the_data() -> None:
    z0 = torch.full(SHAPE, 0.3, dtype=torch.float64)
    eps = torch.linspace(-1, 1, z0.numel(), dtype=torch.float64).reshape(SHAPE)
    z_t = math.sqrt(0.1) * z0 + math.sqrt(0.9) * eps
    torch.testing.assert_close(ddim_step(z_t, eps, 0.1, 1.0, 0.0, None), z0)


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_an_image_depends_on_its_own_seed_only(sampler: Literal["ddim", "ddpm"], eta: float) -> None:
    def run(*seeds: int) -> Tensor:
        noise = ImageNoise(seeds, SHAPE[1:])
        return sample(
            toy_denoiser,
            noise.initial(),
            SCHEDULE,
            sampler=sampler,
            num_steps=5,
            eta=eta,
            step_noise=noise.step,
        )

    batch = run(3, 4, 5)
    assert torch.equal(run(4)[0], batch[1])
    assert torch.equal(run(5, 3)[1], batch[0])
    assert not torch.allclose(batch[0], batch[1])


def test_image_noise_draws_are_independent() -> None:
    noise = ImageNoise((0, 1), (1, 64, 64))
    draws = torch.cat([noise.initial(), noise.step(0), noise.step(1)]).flatten(start_dim=1)
    assert torch.corrcoef(draws).triu(1).abs().max().item() < 0.08
    assert torch.equal(noise.step(1), noise.step(1))


def test_progress_counts_the_steps_and_no_gradients_are_recorded() -> None:
    done: list[int] = []
    weight = torch.ones((), requires_grad=True)
    result = sample(
        lambda z, t: weight * toy_denoiser(z, t),
        ImageNoise((0,), SHAPE[1:]).initial(),
        SCHEDULE,
        sampler="ddim",
        num_steps=4,
        progress=done.append,
    )
    assert done == [1, 2, 3, 4]
    assert not result.requires_grad


def test_the_denoiser_sees_one_timestep_per_image() -> None:
    seen: list[list[int]] = []

    def denoiser(z: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        seen.append(t.tolist())
        return z

    sample(denoiser, torch.zeros(SHAPE), SCHEDULE, sampler="ddim", num_steps=20)
    assert seen == [[t, t] for t in sampling_timesteps(1000, 20)]


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", -0.1), ("ddim", 1.1), ("ddpm", 0.5)])
def test_unusable_eta_is_named(sampler: Literal["ddim", "ddpm"], eta: float) -> None:
    with pytest.raises(ConfigError, match=f"sampling.eta = {eta}"):
        sample(toy_denoiser, torch.zeros(SHAPE), SCHEDULE, sampler=sampler, num_steps=5, eta=eta)
