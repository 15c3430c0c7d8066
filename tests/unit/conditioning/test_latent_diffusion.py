"""UNet and tau_theta as one model, and its sampling with guidance."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ldm_scale.conditioning.base import Conditions, Tools
from ldm_scale.conditioning.latent_diffusion import LatentDiffusion, guided_denoiser, sample_latents
from ldm_scale.config.schema import (
    ConditioningConfig,
    DiffusionConfig,
    LowResolutionConditioningConfig,
    SamplingConfig,
)
from ldm_scale.diffusion.process import build_process
from ldm_scale.diffusion.sampler import ImageNoise, Start
from ldm_scale.models.build import build_seeded
from tests.helpers.runs import TEXT, UNET, set_random_outputs

SHAPE = (3, 4, 4)
SAMPLING = SamplingConfig(num_steps=3, guidance_scale=2.0)
PROCESS = build_process(DiffusionConfig())


def _model(conditioning: ConditioningConfig) -> LatentDiffusion:
    network = build_seeded(lambda: LatentDiffusion(UNET, conditioning, SHAPE[0]), 2)
    set_random_outputs(network, seed=1)
    return network


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return _model(ConditioningConfig(text=TEXT))


def _inputs(model: LatentDiffusion, captions: list[str]) -> dict[str, Tensor]:
    return model.conditioner.prepare(Conditions(captions=captions), Tools(torch.device("cpu")))


def _sample(
    model: LatentDiffusion, captions: list[str], seeds: tuple[int, ...], sampling: SamplingConfig, **more: object
) -> Tensor:
    noise = ImageNoise(seeds, SHAPE)
    return sample_latents(model, PROCESS, _inputs(model, captions), noise, sampling, **more)  # type: ignore[arg-type]


def test_the_context_is_the_text_encoders(model: LatentDiffusion) -> None:
    z, t, inputs = torch.randn(2, *SHAPE), torch.tensor([3, 700]), _inputs(model, ["a cat", ""])
    context = model.conditioner["text"](inputs["text"], SHAPE[1:])
    assert torch.equal(model(z, t, inputs), model.unet(z, t, context))


def test_a_sample_depends_on_its_caption_and_seed_alone(model: LatentDiffusion) -> None:
    together = _sample(model, ["a cat", "a dog"], (5, 6), SAMPLING)
    alone = _sample(model, ["a dog"], (6,), SAMPLING)
    assert together.shape == (2, *SHAPE)
    assert torch.allclose(together[1:], alone, atol=1e-5)
    assert not torch.allclose(_sample(model, ["a cat"], (6,), SAMPLING), alone, atol=1e-4)
    assert not torch.allclose(_sample(model, ["a dog"], (7,), SAMPLING), alone, atol=1e-2)


def test_without_guidance_the_empty_caption_plays_no_part(model: LatentDiffusion) -> None:
    plain = dataclasses.replace(SAMPLING, guidance_scale=1.0)
    assert not torch.allclose(
        _sample(model, ["a cat"], (1,), plain), _sample(model, ["a cat"], (1,), SAMPLING), atol=1e-4
    )
    # Guidance from the empty caption towards itself goes nowhere.
    assert torch.allclose(_sample(model, [""], (1,), plain), _sample(model, [""], (1,), SAMPLING), atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_a_negative_prompt_takes_the_empty_captions_place(model: LatentDiffusion, scale: float) -> None:
    sampling = dataclasses.replace(SAMPLING, guidance_scale=scale)
    z, t = torch.randn(2, *SHAPE), torch.tensor([500, 500])
    inputs, negative = _inputs(model, ["a cat", "a dog"]), _inputs(model, ["blue", "blue"])
    outputs = guided_denoiser(model, PROCESS, inputs, SHAPE[1:], sampling, negative)(z, t)  # type: ignore[arg-type]
    given, null = model(z, t, inputs), model(z, t, negative)
    torch.testing.assert_close(outputs, null + scale * (given - null), rtol=1e-4, atol=1e-5)


def test_what_was_never_dropped_stays_in_the_unconditional_branch() -> None:
    """Caption and small image: guidance leads away from no caption, at the same small image."""
    model = _model(ConditioningConfig(text=TEXT, low_resolution=LowResolutionConditioningConfig()))
    y = Conditions(captions=["a cat"], low_resolution=torch.randn(1, 3, 4, 4))
    inputs = model.conditioner.prepare(y, Tools(torch.device("cpu")))
    empty = model.conditioner.prepare(dataclasses.replace(y, captions=[""]), Tools(torch.device("cpu")))
    z, t = torch.randn(1, *SHAPE), torch.tensor([500])
    outputs = guided_denoiser(model, PROCESS, inputs, (4, 4), SAMPLING)(z, t)
    given, null = model(z, t, inputs), model(z, t, empty)
    torch.testing.assert_close(outputs, null + 2.0 * (given - null), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(given, model(z, t, inputs | {"low_resolution": torch.zeros(1, 3, 4, 4)}), atol=1e-4)


def test_a_model_without_conditioning_is_not_guided() -> None:
    network = build_seeded(
        lambda: LatentDiffusion(dataclasses.replace(UNET, attention="self"), ConditioningConfig(), SHAPE[0]), 2
    )
    noise = ImageNoise((1, 2), SHAPE)
    plain = dataclasses.replace(SAMPLING, guidance_scale=1.0)
    first, second = (sample_latents(network, PROCESS, {}, noise, sampling) for sampling in (plain, SAMPLING))
    assert first.shape == (2, *SHAPE)
    assert torch.equal(first, second)


def test_another_unet_and_a_guide_go_around(model: LatentDiffusion) -> None:
    """The replaced UNet sees both branches at once; the guide sees the guided output."""
    batches: list[int] = []

    def unet(z: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        batches.append(len(z))
        return model.unet(z, t, context)  # type: ignore[no-any-return]

    plain = _sample(model, ["a"], (1,), SAMPLING)
    assert torch.equal(_sample(model, ["a"], (1,), SAMPLING, unet=unet), plain)
    assert batches == [2, 2, 2]
    still = _sample(model, ["a"], (1,), SAMPLING, guide=lambda denoiser: lambda z, t: 0 * denoiser(z, t))
    # Without predicted noise, DDIM only rescales: by alpha at the first timestep over alpha at the last one visited.
    assert not torch.allclose(still, plain, atol=1e-3)
    noise = ImageNoise((1,), SHAPE).initial()
    torch.testing.assert_close(still / still.norm(), noise / noise.norm())


def test_sampling_may_start_at_an_image(model: LatentDiffusion) -> None:
    z0 = torch.randn(1, *SHAPE)
    sampling = dataclasses.replace(SAMPLING, num_steps=100)
    near = _sample(model, ["a"], (1,), sampling, start=Start(z0, 0.01))
    assert (near - z0).abs().max() < 0.2
    assert (_sample(model, ["a"], (1,), sampling, start=Start(z0, 1.0)) - z0).abs().max() > 0.5


def test_no_graph_is_kept(model: LatentDiffusion) -> None:
    assert not _sample(model, ["a"], (1,), SAMPLING).requires_grad
