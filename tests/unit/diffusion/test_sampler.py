"""Samplers: image by image, against Gaussian closed forms, at the edges, and in their refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_scale.diffusion.process import DiscreteProcess, Level, Process
from ldm_scale.diffusion.sampler import ImageNoise, Start, check_sampler, sample, steps_taken
from ldm_scale.diffusion.schedule import sampling_timesteps
from ldm_scale.diffusion.steps import ddim_step
from ldm_scale.errors import ConfigError
from tests.helpers.processes import KINDS, mixture_denoiser, process_of, toy_denoiser

SHAPE = (2, 4, 8, 8)
NOISE = ImageNoise((11, 12), SHAPE[1:])
TIMESTEP_SAMPLERS = ("ddim", "ddpm", "plms", "dpmpp_2m", "dpmpp_2m_sde")
CONTINUOUS_SAMPLERS = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde")


def samplers_of(process: Process) -> tuple[str, ...]:
    return TIMESTEP_SAMPLERS if isinstance(process, DiscreteProcess) else CONTINUOUS_SAMPLERS


ALL_PAIRS = [(kind, sampler) for kind in KINDS for sampler in samplers_of(process_of(kind))]


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize(("kind", "sampler"), ALL_PAIRS)
def test_the_right_denoiser_of_one_point_ends_at_it(kind: str, sampler: Any, num_steps: int) -> None:
    """Data that are one number: every step, however long, has x0 right, so that only the end's noise remains."""
    process = process_of(kind)
    point = torch.tensor([0.7], dtype=torch.float64)
    denoiser = mixture_denoiser(process, point, 0.0)
    initial = NOISE.initial().double()
    end = sample(denoiser, initial, process, sampler=sampler, num_steps=num_steps, step_noise=NOISE.step)
    alpha, sigma = process.levels(num_steps, keep_first_noise=sampler in ("ddim", "plms"))[-1][1:]
    if sigma == 0.0:
        torch.testing.assert_close(end, torch.full_like(end, 0.7), rtol=0, atol=1e-6)
    else:
        first = process.levels(num_steps)[0]
        eps = (initial - first.alpha * 0.7) / first.sigma
        torch.testing.assert_close(end, alpha * 0.7 + sigma * eps, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "sampler"), [pair for pair in ALL_PAIRS if pair[0] in ("eps", "zero_v", "edm", "flow")]
)
def test_samples_of_a_mixture_have_its_moments(kind: str, sampler: Any) -> None:
    """Of the best denoiser, the samples are the data: two normals, of unit variance together."""
    process = process_of(kind)
    means, std = torch.tensor([-0.9, 0.9]), math.sqrt(1 - 0.81)
    noise = ImageNoise((0, 1, 2, 3), (1, 32, 32))
    denoiser = mixture_denoiser(process, means, std)
    num_steps = 50 if sampler in ("plms", "dpmpp_2m", "heun") else 200
    ends = sample(denoiser, noise.initial(), process, sampler=sampler, num_steps=num_steps, step_noise=noise.step)
    assert ends.mean().item() == pytest.approx(0.0, abs=0.04)
    assert ends.var().item() == pytest.approx(1.0, rel=0.04)
    # The fourth moment tells two modes (1.92) from one normal (3).
    exact = 0.9**4 + 6 * 0.81 * std**2 + 3 * std**4
    assert ends.pow(4).mean().item() == pytest.approx(exact, rel=0.08)


def test_ddim_converges_to_the_gaussian_it_samples() -> None:
    """With the exact eps, deterministic DDIM is an affine map of z_T: its slope and offset give std and mean."""
    process, mean, std = process_of("eps"), 0.7, 0.4
    end = process.levels(1, keep_first_noise=True)[-1]
    final_std = math.sqrt((end.alpha * std) ** 2 + end.sigma**2)
    errors = []
    for num_steps in (10, 50, 250):
        ends = sample(
            mixture_denoiser(process, torch.tensor([mean], dtype=torch.float64), std),
            torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1),
            process,
            sampler="ddim",
            num_steps=num_steps,
        ).flatten()
        errors.append(max(abs((ends[1] - ends[0]).item() / final_std - 1), abs(ends[0].item() - end.alpha * mean)))
    # The offset keeps a floor: z_T is drawn from N(0, 1), but the exact marginal there still holds alpha_T mean.
    assert errors[0] > 2 * errors[1] > 2 * errors[2]
    assert errors[2] < 0.05


def test_only_zero_terminal_snr_reaches_the_mean_of_the_data() -> None:
    """The flaw that arXiv:2305.08891 describes, in numbers: data of mean 3 and deviation 0.1, from N(0, 1)."""
    means = {}
    for kind in ("v", "zero_v"):
        process = process_of(kind)
        denoiser = mixture_denoiser(process, torch.tensor([3.0]), 0.1)
        means[kind] = sample(denoiser, torch.zeros(1, 1, 1, 1), process, sampler="ddim", num_steps=250).item()
    assert abs(means["zero_v"] - 3.0) < 0.01
    assert abs(means["v"] - 3.0) > 0.02


@pytest.mark.parametrize("kind", ["zero_v", "zero_x0"])
@pytest.mark.parametrize("num_steps", [1, 3, 20])
def test_zero_terminal_snr_is_sampled_from_the_last_timestep(kind: str, num_steps: int) -> None:
    levels = process_of(kind).levels(num_steps)
    assert (levels[0].t, levels[0].alpha, levels[0].sigma) == (999, 0.0, 1.0)


@pytest.mark.parametrize(("kind", "sampler"), [pair for pair in ALL_PAIRS if pair[0] in ("eps", "edm", "flow")])
def test_an_image_depends_on_its_own_seed_only(kind: str, sampler: Any) -> None:
    process = process_of(kind)

    def run(*seeds: int) -> Tensor:
        noise = ImageNoise(seeds, SHAPE[1:])
        denoiser = toy_denoiser(process)
        return sample(denoiser, noise.initial(), process, sampler=sampler, num_steps=5, step_noise=noise.step)

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
    process = process_of("eps")
    result = sample(
        lambda z, t: weight * toy_denoiser(process)(z, t),
        NOISE.initial(),
        process,
        sampler="ddim",
        num_steps=4,
        progress=done.append,
    )
    assert done == [1, 2, 3, 4]
    assert not result.requires_grad


@pytest.mark.parametrize(
    ("kind", "sampler", "calls"),
    [("eps", "ddim", 20), ("eps", "plms", 21), ("v", "dpmpp_2m", 20), ("edm", "heun", 39), ("flow", "euler", 20)],
)
def test_the_denoiser_sees_one_time_per_image_as_often_as_the_configuration_says(
    kind: str, sampler: Any, calls: int
) -> None:
    process = process_of(kind)
    seen: list[float] = []

    def denoiser(z: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == process.time_dtype
        assert t.shape == (2,)
        assert t[0] == t[1]
        seen.append(t[0].item())
        return z

    sample(denoiser, torch.zeros(SHAPE), process, sampler=sampler, num_steps=20)
    assert len(seen) == calls
    if sampler == "ddim":
        assert seen == sampling_timesteps(1000, 20)


@pytest.mark.parametrize("kind", ["eps", "zero_v", "edm", "flow"])
@pytest.mark.parametrize(("strength", "taken"), [(0.01, 1), (0.5, 5), (0.79, 7), (1.0, 10)])
def test_a_start_takes_its_share_of_the_steps_from_its_own_level(kind: str, strength: float, taken: int) -> None:
    process = process_of(kind)
    z0 = torch.linspace(-1, 1, 512).reshape(SHAPE)
    seen: list[tuple[float, Tensor]] = []

    def denoiser(z: Tensor, t: Tensor) -> Tensor:
        seen.append((t[0].item(), z))
        return toy_denoiser(process)(z, t)

    done: list[int] = []
    sample(
        denoiser,
        NOISE.initial(),
        process,
        sampler="dpmpp_2m",
        num_steps=10,
        start=Start(z0, strength),
        progress=done.append,
    )
    assert done == list(range(1, taken + 1))
    level = process.levels(10)[10 - taken]
    assert seen[0][0] == pytest.approx(level.t)
    first = level.alpha * z0 + level.sigma * NOISE.initial()
    if strength == 1.0:  # noise alone, of the deviation that latents have at that level
        first = math.hypot(level.alpha, level.sigma) * NOISE.initial()
    torch.testing.assert_close(seen[0][1], first)


@pytest.mark.parametrize(("num_steps", "strength", "taken"), [(100, 0.29, 29), (50, 0.58, 29), (50, 0.59, 29)])
def test_shares_of_the_steps_are_not_lost_to_rounding(num_steps: int, strength: float, taken: int) -> None:
    assert steps_taken(num_steps, strength) == taken


@pytest.mark.parametrize(("kind", "sampler"), [pair for pair in ALL_PAIRS if pair[0] in ("eps", "v", "x0")])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_few_steps_end_near_the_data(kind: str, sampler: Any, num_steps: int) -> None:
    """Data about one number: a start at a timestep that still shows the image would leave the noise as it is."""
    process = process_of(kind)
    denoiser = mixture_denoiser(process, torch.tensor([0.7]), 0.1)
    end = sample(denoiser, NOISE.initial(), process, sampler=sampler, num_steps=num_steps, step_noise=NOISE.step)
    assert end.mean().item() == pytest.approx(0.7, abs=0.1)
    assert end.std().item() < 0.5


@pytest.mark.parametrize("kind", ["v", "edm", "flow"])
def test_a_start_keeps_as_much_of_its_image_as_its_noise_left(kind: str) -> None:
    process = process_of(kind)
    denoiser = mixture_denoiser(process, torch.tensor([-1.0, 1.0]), 0.1)
    z0 = torch.where(torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)

    for strength in (0.2, 0.6):
        start = Start(z0, strength)
        end = sample(denoiser, NOISE.initial(), process, sampler="dpmpp_2m", num_steps=40, start=start)
        # Elements keep their sign where the noise of the first level did not overcome it.
        level = process.levels(40)[40 - int(40 * strength)]
        expected = torch.special.ndtr(torch.tensor(level.alpha / level.sigma)).item()
        assert (end.sign() == z0).float().mean().item() == pytest.approx(expected, abs=0.06)
        assert expected < 1 if strength == 0.6 else expected > 0.9


@pytest.mark.parametrize("strength", [0.0, 1.1, -0.2])
def test_unusable_strengths_are_named(strength: float) -> None:
    start = Start(torch.zeros(SHAPE), strength)
    with pytest.raises(ConfigError, match=f"strength={strength}: must be above 0"):
        sample(lambda z, t: z, torch.zeros(SHAPE), process_of("eps"), sampler="ddim", num_steps=5, start=start)


def test_a_full_ddim_step_with_the_true_noise_returns_the_data() -> None:
    z0 = torch.full(SHAPE, 0.3, dtype=torch.float64)
    eps = torch.linspace(-1, 1, z0.numel(), dtype=torch.float64).reshape(SHAPE)
    now, then = Level(500, math.sqrt(0.1), math.sqrt(0.9)), Level(None, 1.0, 0.0)
    torch.testing.assert_close(ddim_step(z0, eps, now, then), z0)


@pytest.mark.parametrize(("kind", "sampler"), [("eps", "euler"), ("v", "heun"), ("edm", "ddim"), ("flow", "plms")])
def test_samplers_that_do_not_fit_the_process_name_those_that_do(kind: str, sampler: Any) -> None:
    with pytest.raises(ConfigError, match=rf"sampling.sampler={sampler}: .*set sampling.sampler=.*dpmpp_2m") as caught:
        check_sampler(sampler, process_of(kind))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", -0.1), ("ddim", 1.1), ("ddpm", 0.5), ("plms", 1.0)])
def test_unusable_eta_is_named(sampler: Any, eta: float) -> None:
    with pytest.raises(ConfigError, match=f"sampling.eta={eta}"):
        sample(lambda z, t: z, torch.zeros(SHAPE), process_of("eps"), sampler=sampler, num_steps=5, eta=eta)


@pytest.mark.parametrize("kind", ["eps", "edm", "flow"])
def test_no_steps_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"sampling.num_steps=0"):
        process_of(kind).levels(0)


@pytest.mark.parametrize(("kind", "sampler"), ALL_PAIRS)
def test_predictions_are_told_in_every_step(kind: str, sampler: Any) -> None:
    """Of the right denoiser of one point, each is that point, whatever the level of noise."""
    process = process_of(kind)
    denoiser = mixture_denoiser(process, torch.tensor([0.7], dtype=torch.float64), 0.0)
    told: list[tuple[int, Tensor]] = []

    def run(observe: Any, start: Start | None = None) -> Tensor:
        initial = NOISE.initial().double()
        options: dict[str, Any] = {"sampler": sampler, "num_steps": 6, "step_noise": NOISE.step, "start": start}
        return sample(denoiser, initial, process, observe=observe, **options)

    end = run(lambda step, x0: told.append((step, x0)))
    assert [step for step, _ in told] == list(range(6))
    for _, x0 in told:
        torch.testing.assert_close(x0, torch.full_like(x0, 0.7), rtol=0, atol=1e-6)
    assert torch.equal(end, run(None)), "looking on changes nothing"
    told.clear()
    run(lambda step, x0: told.append((step, x0)), Start(torch.zeros_like(end), 0.5))
    assert [step for step, _ in told] == [0, 1, 2]
