"""Guidance: the mixture, its rescaling and its interval, at as few passes as each needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from ldm_scale.diffusion.guidance import classifier_free_guidance, combine_guidance
from ldm_scale.errors import ConfigError
from tests.helpers.processes import process_of

Z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([5, 500, 999])
PROCESS = process_of("eps")


class Passes:
    """Two denoisers whose results depend on every argument of their own image, and a count of who was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def conditional(self, z: Tensor, t: Tensor) -> Tensor:
        self.asked.append("conditional")
        return 0.3 * z + t.reshape(-1, 1, 1, 1) / 1000

    def unconditional(self, z: Tensor, t: Tensor) -> Tensor:
        self.asked.append("unconditional")
        return torch.sin(z)

    def paired(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append("paired")
        return Passes().conditional(z, t), Passes().unconditional(z, t)

    def guided(self, **options: Any) -> Any:
        return classifier_free_guidance(self.conditional, self.unconditional, PROCESS, **options)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.5, 1.0, 3.0, 7.5])
@pytest.mark.parametrize("doubled", [False, True])
def test_guidance_mixes_the_two_passes(scale: float, doubled: bool) -> None:
    passes = Passes()
    result = passes.guided(scale=scale, paired=passes.paired if doubled else None)(Z, T)
    conditional, unconditional = Passes().paired(Z, T)
    torch.testing.assert_close(result, (1 - scale) * unconditional + scale * conditional)
    alone = {0.0: ["unconditional"], 1.0: ["conditional"]}
    assert passes.asked == alone.get(scale, ["paired"] if doubled else ["conditional", "unconditional"])


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
def test_rescaling_equals_diffusers(rescale: float) -> None:
    conditional, unconditional = Passes().paired(Z, T)
    mixed = combine_guidance(conditional, unconditional, 5.0)
    expected = rescale_noise_cfg(mixed, conditional, guidance_rescale=rescale)
    torch.testing.assert_close(combine_guidance(conditional, unconditional, 5.0, rescale), expected)


def test_full_rescaling_gives_each_image_the_deviation_of_its_conditional_output() -> None:
    conditional, unconditional = Passes().paired(Z, T)
    result = combine_guidance(conditional, unconditional, 9.0, 1.0)
    torch.testing.assert_close(result.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)))


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_a_constant_output_is_guided_without_rescaling(rescale: float) -> None:
    conditional, unconditional = Passes().paired(Z, T)
    conditional[0], unconditional[0] = 0.3, 0.1
    # Powers of two, so that the mixture is exact: the conditional output varies, 4 (c - u) + u does not.
    conditional[1] = torch.tensor([0.0, 3.0]).repeat(4 * 8 * 4).view(4, 8, 8)
    unconditional[1] = torch.tensor([0.0, 4.0]).repeat(4 * 8 * 4).view(4, 8, 8)
    result = combine_guidance(conditional, unconditional, 4.0, rescale)
    torch.testing.assert_close(result[0], torch.full_like(Z[0], 0.9))
    assert not result[1].any()
    assert torch.equal(result[2], combine_guidance(conditional[2:], unconditional[2:], 4.0, rescale)[0])


def test_guidance_acts_inside_its_interval_only() -> None:
    """sigma / alpha is about 0.05, 1.4 and 14.6 at the three times."""
    conditional, unconditional = Passes().paired(Z, T)
    everywhere = combine_guidance(conditional, unconditional, 3.0, 0.5)
    passes = Passes()
    result = passes.guided(scale=3.0, rescale=0.5, interval=(0.3, 5.0), paired=passes.paired)(Z, T)
    torch.testing.assert_close(result[1], everywhere[1])
    assert torch.equal(result[[0, 2]], conditional[[0, 2]])
    assert passes.asked == ["paired"]


@pytest.mark.parametrize(("interval", "asked"), [((20.0, 30.0), ["conditional"]), ((0.0, 20.0), ["paired"])])
def test_steps_outside_the_interval_cost_one_pass(interval: tuple[float, float], asked: list[str]) -> None:
    passes = Passes()
    passes.guided(scale=3.0, interval=interval, paired=passes.paired)(Z, T)
    assert passes.asked == asked


def test_noise_alone_lies_above_every_interval_but_an_infinite_one() -> None:
    process = process_of("flow")
    for high, asked in ((1e9, "conditional"), (float("inf"), "paired")):
        passes = Passes()
        denoiser = classifier_free_guidance(
            passes.conditional, passes.unconditional, process, scale=2.0, interval=(0.1, high), paired=passes.paired
        )
        denoiser(Z, torch.ones(3))
        assert passes.asked == [asked]


@pytest.mark.parametrize("interval", [(2.0, 1.0), (1.0, 1.0), (-1.0, 1.0)])
def test_empty_intervals_are_named(interval: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"sampling.guidance_interval=\[.*rising noise levels"):
        Passes().guided(scale=3.0, interval=interval)
