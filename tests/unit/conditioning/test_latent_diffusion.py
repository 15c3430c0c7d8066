"""UNet and text encoder as one model, and its sampling with guidance."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion, sample_latents
from ldm_scale.conditioning.text import tokenize
from ldm_scale.config.schema import DiffusionConfig, SamplingConfig
from ldm_scale.diffusion.sampler import ImageNoise
from ldm_scale.diffusion.schedule import build_schedule
from ldm_scale.models.build import build_seeded
from tests.helpers.runs import TEXT, UNET, set_random_outputs

SHAPE = (3, 4, 4)
SAMPLING = SamplingConfig(num_steps=3, guidance_scale=2.0)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    network = build_seeded(lambda: LatentDiffusion(UNET, TEXT, SHAPE[0]), 2)
    set_random_outputs(network, seed=1)
    return network


def _sample(
    model: LatentDiffusion, captions: list[str], seeds: tuple[int, ...], sampling: SamplingConfig
) -> torch.Tensor:
    noise = ImageNoise(seeds, SHAPE, torch.device("cpu"))
    return sample_latents(
        model, build_schedule(DiffusionConfig()), tokenize(captions, TEXT.max_tokens), noise, sampling
    )


def test_the_context_is_the_text_encoders(model: LatentDiffusion) -> None:
    z, t, tokens = torch.randn(2, *SHAPE), torch.tensor([3, 700]), tokenize(["a cat", ""], TEXT.max_tokens)
    assert torch.equal(model(z, t, tokens), model.unet(z, t, model.conditioner(tokens)))


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


def test_no_graph_is_kept(model: LatentDiffusion) -> None:
    assert not _sample(model, ["a"], (1,), SAMPLING).requires_grad
