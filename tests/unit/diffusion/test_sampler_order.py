"""Orders of convergence, measured on the probability flow of a Gaussian mixture whose best denoiser is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_scale.diffusion.process import DiscreteProcess, Level, Process
from ldm_scale.diffusion.sampler import sample
from tests.helpers.processes import mixture_denoiser, process_of

MEANS = torch.tensor([-1.0, 0.3, 1.2], dtype=torch.float64)
STD = 0.5
INITIAL = torch.linspace(-1.5, 1.5, 16, dtype=torch.float64).reshape(-1, 1, 1, 1)


def ends(process: Process, sampler: Any, num_steps: int) -> Tensor:
    return sample(mixture_denoiser(process, MEANS, STD), INITIAL, process, sampler=sampler, num_steps=num_steps)


def order(process: Process, sampler: Any, reference: Tensor, coarse: int) -> float:
    """log2 of what halving the steps' length gains."""
    errors = [(ends(process, sampler, num_steps) - reference).abs().max().item() for num_steps in (coarse, 2 * coarse)]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(("sampler", "expected"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("kind", ["edm", "flow"])
def test_over_continuous_time(kind: str, sampler: str, expected: int) -> None:
    process = process_of(kind)
    reference = ends(process, "heun", 600)
    # From no signal at all (flow), the logarithm in which dpmpp_2m steps costs it a little of its order.
    slack = 0.3 if (kind, sampler) == ("flow", "dpmpp_2m") else 0.2
    assert order(process, sampler, reference, 60) == pytest.approx(expected, abs=slack)


@pytest.mark.parametrize(("sampler", "expected"), [("ddim", 1), ("plms", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_over_timesteps(kind: str, sampler: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the noisiest to a quarter of the timesteps: below, sigma goes as sqrt(t), and even steps are long ones."""
    num_timesteps = 8193
    scale = 1000 / num_timesteps
    schedule = {"num_timesteps": num_timesteps, "beta_start": 0.00085 * scale, "beta_end": 0.012 * scale}
    process = process_of(kind, **schedule)
    assert isinstance(process, DiscreteProcess)
    alpha, sigma = process._alpha.tolist(), process._sigma.tolist()

    def levels(_: Process, num_steps: int, **__: Any) -> list[Level]:
        visited = [8192 - i * 6 * 1024 // num_steps for i in range(num_steps)]
        return [*(Level(t, alpha[t], sigma[t]) for t in visited), Level(None, alpha[2048], sigma[2048])]

    monkeypatch.setattr(DiscreteProcess, "levels", levels)
    reference = ends(process, "dpmpp_2m", 1024)
    assert order(process, sampler, reference, 32) == pytest.approx(expected, abs=0.15)
