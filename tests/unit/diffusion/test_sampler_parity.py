"""Every sampler against the scheduler of diffusers that is meant to do the same, to 1e-5 over whole trajectories.

diffusers keeps its tables in float32; where a test runs so long or near such an edge that their rounding shows, its
scheduler is given the same numbers in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

from ldm_scale.diffusion.process import CLEAN, Level, Process
from ldm_scale.diffusion.sampler import ImageNoise, sample
from ldm_scale.diffusion.schedule import alphas_cumprod, sampling_timesteps
from ldm_scale.interchange.diffusers_scheduler import make_scheduler
from tests.helpers.processes import process_of, toy_denoiser

# diffusers ships no types for its constructors.
_DDIM: Any = DDIMScheduler
_DDPM: Any = DDPMScheduler
_PNDM: Any = PNDMScheduler
_DPM: Any = DPMSolverMultistepScheduler
_EDM_DPM: Any = EDMDPMSolverMultistepScheduler
_FLOW_EULER: Any = FlowMatchEulerDiscreteScheduler
_FLOW_HEUN: Any = FlowMatchHeunDiscreteScheduler
_HEUN: Any = HeunDiscreteScheduler

SHAPE = (2, 3, 4, 4)
NOISE = ImageNoise((11, 12), SHAPE[1:])
THEIR_NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def ours(process: Process, sampler: Any, num_steps: int, eta: float = 0.0) -> Tensor:
    denoiser = toy_denoiser(process)
    return sample(
        denoiser, NOISE.initial(), process, sampler=sampler, num_steps=num_steps, eta=eta, step_noise=NOISE.step
    )


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert float(error) < 1e-5


def stable_diffusion(scheduler_class: Any, process: Process, **options: Any) -> Any:
    """A scheduler of diffusers with the process's schedule and Stable Diffusion's settings."""
    return scheduler_class(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="squaredcos_cap_v2" if process.cfg.schedule == "cosine" else "scaled_linear",
        prediction_type=THEIR_NAMES[process.cfg.prediction],
        **options,
    )


@pytest.mark.parametrize(("num_steps", "eta"), [(1, 0.0), (8, 0.5), (12, 0.0), (50, 0.0), (50, 1.0)])
@pytest.mark.parametrize("kind", ["eps", "v", "x0", "cosine_v"])
def test_ddim(kind: str, num_steps: int, eta: float) -> None:
    process = process_of(kind)
    _check_ddim(process, make_scheduler(process.cfg), num_steps, eta)


def test_ddim_over_all_timesteps() -> None:
    process = process_of("eps")
    scheduler = make_scheduler(process.cfg)
    # An offset of 1 would index timestep 1000, where diffusers fails.
    scheduler.register_to_config(steps_offset=0)
    _check_ddim(process, scheduler, 1000, 0.5)


@pytest.mark.parametrize(("num_steps", "eta"), [(1, 0.0), (8, 0.5), (50, 0.0), (50, 1.0)])
@pytest.mark.parametrize("kind", ["zero_v", "zero_x0"])
def test_ddim_of_zero_terminal_snr(kind: str, num_steps: int, eta: float) -> None:
    process = process_of(kind)
    _check_ddim(process, make_scheduler(process.cfg), num_steps, eta)


def space(scheduler: Any, num_steps: int) -> None:
    """Few steps are visited from the end."""
    if num_steps < 10:
        scheduler.register_to_config(timestep_spacing="trailing")


def _check_ddim(process: Process, scheduler: Any, num_steps: int, eta: float) -> None:
    space(scheduler, num_steps)
    scheduler.alphas_cumprod = alphas_cumprod(process.cfg)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(num_steps)
    z = NOISE.initial()
    for index, t in enumerate(scheduler.timesteps):
        output = toy_denoiser(process)(z, t.expand(2))
        z = scheduler.step(output, int(t), z, eta=eta, variance_noise=NOISE.step(index)).prev_sample
    assert_equal(ours(process, "ddim", num_steps, eta), z)


def test_exported_ddim_tables_are_close_in_float32() -> None:
    """Without the float64 tables of the test above: what a user of the export gets."""
    process = process_of("eps")
    scheduler = make_scheduler(process.cfg)
    scheduler.set_timesteps(20)
    z = NOISE.initial()
    for t in scheduler.timesteps:
        z = scheduler.step(toy_denoiser(process)(z, t.expand(2)), int(t), z).prev_sample
    assert_equal(ours(process, "ddim", 20), z)


@pytest.mark.parametrize(
    ("kind", "num_steps"), [("eps", 1), ("eps", 50), ("eps", 1000), ("v", 8), ("v", 50), ("x0", 8), ("x0", 50)]
)
def test_ddpm(kind: str, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    process = process_of(kind)
    options: dict[str, Any] = {"clip_sample": False, "timestep_spacing": "leading", "variance_type": "fixed_small"}
    scheduler = stable_diffusion(_DDPM, process, steps_offset=int(num_steps < 1000), **options)
    # It rounds 1 - abar_t / abar_prev, some 1e-3, in float32; a thousand such steps drift by 2e-5.
    scheduler.alphas_cumprod = alphas_cumprod(process.cfg)
    space(scheduler, num_steps)
    scheduler.set_timesteps(num_steps)
    z = NOISE.initial()
    for index, t in enumerate(scheduler.timesteps):
        step_noise = NOISE.step(index)
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, step_noise=step_noise, **__: step_noise)
        z = scheduler.step(toy_denoiser(process)(z, t.expand(2)), t, z).prev_sample
    assert_equal(ours(process, "ddpm", num_steps), z)


@pytest.mark.parametrize("num_steps", [2, 4, 20, 50])
def test_plms(num_steps: int) -> None:
    process = process_of("eps")
    options: dict[str, Any] = {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
    scheduler = stable_diffusion(_PNDM, process, **options)
    scheduler.alphas_cumprod = alphas_cumprod(process.cfg)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    space(scheduler, num_steps)
    scheduler.set_timesteps(num_steps)
    z = NOISE.initial()
    for t in scheduler.timesteps:
        z = scheduler.step(toy_denoiser(process)(z, t.expand(2)), int(t), z).prev_sample
    assert_equal(ours(process, "plms", num_steps), z)


@pytest.mark.parametrize(("sampler", "theirs"), [("dpmpp_2m", "dpmsolver++"), ("dpmpp_2m_sde", "sde-dpmsolver++")])
@pytest.mark.parametrize("num_steps", [1, 2, 20])
@pytest.mark.parametrize("kind", ["eps", "v", "x0", "cosine_v"])
def test_dpmpp_over_timesteps(kind: str, num_steps: int, sampler: str, theirs: str) -> None:
    process = process_of(kind)
    scheduler = stable_diffusion(_DPM, process, algorithm_type=theirs)
    exact = alphas_cumprod(process.cfg)
    scheduler.alphas_cumprod = exact
    # Its own spacing differs from DDIM's; the timesteps are ours.
    scheduler.set_timesteps(timesteps=sampling_timesteps(1000, num_steps))
    z = NOISE.initial()
    for index, t in enumerate(scheduler.timesteps):
        output = toy_denoiser(process)(z, t.expand(2))
        z = scheduler.step(output, t, z, variance_noise=NOISE.step(index)).prev_sample
    assert_equal(ours(process, sampler, num_steps), z)


# One step from 80 to 0 in its order of float32 operations is 1.1e-5 off; from 5 on nothing of that is left.
@pytest.mark.parametrize("num_steps", [5, 20])
@pytest.mark.parametrize("kind", ["edm", "edm_half"])
def test_euler_of_edm_is_the_exported_scheduler(kind: str, num_steps: int) -> None:
    process = process_of(kind)
    scheduler = make_scheduler(process.cfg)
    assert isinstance(scheduler, EDMEulerScheduler)
    scheduler.set_timesteps(num_steps)
    z = NOISE.initial() * scheduler.init_noise_sigma
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        seen = scheduler.scale_model_input(z, t)
        torch.testing.assert_close(seen, process.network_input(z, sigma.expand(2)), rtol=1e-5, atol=1e-6)
        z = scheduler.step(toy_denoiser(process)(z, sigma.expand(2)), t, z).prev_sample
    assert_equal(ours(process, "euler", num_steps), z)


@pytest.mark.parametrize(("sampler", "theirs"), [("dpmpp_2m", "dpmsolver++"), ("dpmpp_2m_sde", "sde-dpmsolver++")])
@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_dpmpp_of_edm(num_steps: int, sampler: str, theirs: str) -> None:
    process = process_of("edm")
    scheduler = _EDM_DPM(sigma_min=0.002, sigma_max=80.0, sigma_data=1.0, algorithm_type=theirs, solver_order=2)
    scheduler.set_timesteps(num_steps)
    z = NOISE.initial() * scheduler.init_noise_sigma
    for index, (t, sigma) in enumerate(zip(scheduler.timesteps, scheduler.sigmas, strict=False)):
        output = toy_denoiser(process)(z, sigma.expand(2))
        scheduler.scale_model_input(z, t)
        z = _with_noise(scheduler, NOISE.step(index), output, t, z)
    assert_equal(ours(process, sampler, num_steps), z)


def _with_noise(scheduler: Any, noise: Tensor, output: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """A step of a scheduler that draws its own noise."""
    from diffusers.schedulers import scheduling_edm_dpmsolver_multistep as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: noise)
        result: Tensor = scheduler.step(output, t, z).prev_sample
    return result


@pytest.mark.parametrize("num_steps", [2, 3, 20])
def test_heun_of_edm(num_steps: int) -> None:
    """HeunDiscreteScheduler works in sigma on predictions of the noise, which `eps` makes of our outputs."""
    process = process_of("edm")
    scheduler = _HEUN(prediction_type="epsilon")
    levels = process.levels(num_steps)
    scheduler.set_timesteps(num_steps)
    sigmas = torch.tensor([level.sigma for level in levels], dtype=torch.float64)
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    z = NOISE.initial() * float(sigmas[0] ** 2 + 1) ** 0.5
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        times = sigma.float().expand(2)
        eps = process.eps(z, toy_denoiser(process)(z, times), times)
        z = scheduler.step(eps, t, z).prev_sample.float()
    assert_equal(ours(process, "heun", num_steps), z)


@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_euler_of_flow(num_steps: int) -> None:
    process, scheduler = process_of("flow"), _FLOW_EULER()
    scheduler.set_timesteps(sigmas=[1.0 - i / num_steps for i in range(num_steps)])
    z = NOISE.initial()
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        z = scheduler.step(toy_denoiser(process)(z, sigma.expand(2)), t, z).prev_sample
    assert_equal(ours(process, "euler", num_steps), z)


@pytest.mark.parametrize("num_steps", [2, 3, 20])
def test_heun_of_flow(num_steps: int) -> None:
    process, scheduler = process_of("flow"), _FLOW_HEUN()
    scheduler.set_timesteps(num_steps)
    sigmas = torch.tensor([level.sigma for level in process.levels(num_steps)])
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    z = NOISE.initial()
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        z = scheduler.step(toy_denoiser(process)(z, sigma.expand(2)), t, z).prev_sample
    assert_equal(ours(process, "heun", num_steps), z)


@pytest.mark.parametrize(("sampler", "theirs"), [("dpmpp_2m", "dpmsolver++"), ("dpmpp_2m_sde", "sde-dpmsolver++")])
@pytest.mark.parametrize("num_steps", [2, 3, 20])
def test_dpmpp_of_flow(num_steps: int, sampler: str, theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its noise levels, which begin at 0.999: it has no step from no signal."""
    process = process_of("flow")
    scheduler = _DPM(algorithm_type=theirs, prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(num_steps)
    scheduler.sigmas = scheduler.sigmas.double()
    levels = [Level(sigma, 1.0 - sigma, sigma) for sigma in scheduler.sigmas.tolist()]
    levels[-1] = CLEAN
    monkeypatch.setattr(process, "levels", lambda *_, **__: levels)
    z = NOISE.initial() * (levels[0].alpha ** 2 + levels[0].sigma ** 2) ** 0.5
    for index, sigma in enumerate(scheduler.sigmas[:-1]):
        output = toy_denoiser(process)(z, sigma.float().expand(2))
        z = scheduler.step(output, scheduler.timesteps[index], z, variance_noise=NOISE.step(index)).prev_sample
    assert_equal(ours(process, sampler, num_steps), z)
