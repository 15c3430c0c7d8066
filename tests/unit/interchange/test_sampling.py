"""Options of `LoadedDiffusion.sample`: sizes, tiles, starts and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_scale import load_diffusion
from ldm_scale.conditioning.base import Conditions
from ldm_scale.config.schema import (
    ConditioningConfig,
    InpaintingConditioningConfig,
    LowResolutionConditioningConfig,
    SemanticMapConditioningConfig,
    TextConditioningConfig,
)
from ldm_scale.errors import ConfigError, NumericsError
from ldm_scale.interchange.load import LoadedDiffusion
from tests.helpers.models import SIDE, tiny_model
from tests.helpers.runs import TEXT

NEVER_DROPPED = TextConditioningConfig(width=16, depth=1, num_heads=2, max_tokens=16, drop_probability=0.0)
SPATIAL = ConditioningConfig(semantic_map=SemanticMapConditioningConfig(num_labels=4))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> LoadedDiffusion:
    return load_diffusion(tiny_model(tmp_path_factory.mktemp("text"), ConditioningConfig(text=TEXT), eta=0.5))


def _model(folder: Path, conditioning: ConditioningConfig, **sampling: Any) -> LoadedDiffusion:
    return load_diffusion(tiny_model(folder, conditioning, **sampling))


@pytest.mark.parametrize(("height", "width"), [(32, 16), (64, 48)])
def test_sizes_beyond_training(text: LoadedDiffusion, height: int, width: int) -> None:
    whole = text.sample(["a"], [0], height=height, width=width)
    assert whole.shape == (1, 3, height, width)
    one_window = text.sample(["a"], [0], height=height, width=width, tile=max(height, width))
    assert torch.equal(whole, one_window)
    tiled = text.sample(["a"], [0], height=height, width=width, tile=16, overlap=4, max_windows=2)
    assert tiled.shape == whole.shape
    assert not torch.allclose(tiled, whole, atol=1e-3)


def test_windows_take_their_part_of_the_spatial_conditioning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(tmp_path, SPATIAL)
    # The decoder's middle sees the whole image in any case.
    monkeypatch.setattr(model.autoencoder, "decode", lambda z, tile, overlap: z)
    maps = torch.zeros(1, SIDE, 8 * SIDE, dtype=torch.uint8)
    other = maps.clone()
    other[:, :, -SIDE:] = 3
    first, second = (
        model.sample(Conditions(maps=labels), [0], tile=SIDE, overlap=4, num_steps=1) for labels in (maps, other)
    )
    assert first.shape == (1, 3, SIDE // 2, 4 * SIDE)
    # One step: what differs in the map's last eighth is not seen in windows that end before it.
    difference = (first - second).abs().amax(dim=(0, 1, 2))
    assert difference[-SIDE // 2 :].max() > 1e-3
    untiled = [model.sample(Conditions(maps=labels), [0], num_steps=1) for labels in (maps, other)]
    assert (untiled[0] - untiled[1]).abs().amax(dim=(0, 1, 2))[: 2 * SIDE].max() > 1e-5, "attention sees it everywhere"
    assert difference[: 2 * SIDE].max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 18}, r"^an image of 18 x 16 pixels: .*take 16 or 20 for 18$"),
        ({"tile": 6}, r"^tile=6: must be a multiple of 4 .*take 4 or 8$"),
        ({"tile": 16, "overlap": 3}, r"^overlap=3: must be 0 or a multiple of f=2 below tile=16"),
        ({"tile": 16, "max_windows": 0}, r"^max_windows=0"),
        ({"max_windows": 2}, r"belong to tile"),
        ({"init_images": torch.zeros(1, 3, 16, 16)}, r"needs a strength"),
        ({"init_images": torch.zeros(2, 3, 16, 16), "strength": 0.5}, r"for 1 samples"),
        ({"init_images": torch.zeros(1, 3, 16, 16), "strength": 1.5}, r"^strength=1.5: must be above 0"),
        ({"init_images": torch.zeros(1, 3, 16, 16), "strength": 0.5, "height": 32}, r"must be one each, of the sample"),
        ({"sampler": "plms", "eta": 0.5}, r"eta belongs to"),
    ],
)
def test_options_that_cannot_be(text: LoadedDiffusion, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        text.sample(["a"], [0], **options)


def test_a_models_own_eta_stays_with_its_own_sampler(text: LoadedDiffusion) -> None:
    assert text.sampling.eta == 0.5
    for sampler in ("plms", "dpmpp_2m", "ddpm", "dpmpp_2m_sde"):
        assert text.sample(["a"], [0], sampler=sampler).isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2])
def test_extremes_of_guidance_and_steps(text: LoadedDiffusion, scale: float, steps: int) -> None:
    images = text.sample(["a cat", "a dog"], [3, 3], guidance_scale=scale, num_steps=steps, eta=0.0)
    # The unconditional branch alone knows no captions.
    assert torch.allclose(images[0], images[1], atol=1e-5) == (scale == 0.0)


def test_guidance_needs_a_second_branch(tmp_path: Path) -> None:
    model = _model(tmp_path, ConditioningConfig(text=NEVER_DROPPED))
    with pytest.raises(ConfigError, match=r"^guidance_scale=3: the model was never trained without"):
        model.sample(["a"], [0], guidance_scale=3.0)
    plain = model.sample(["a"], [0])
    assert torch.equal(model.sample(["a"], [0], guidance_scale=1.0), plain)
    assert not torch.allclose(model.sample(["a"], [0], guidance_scale=3.0, negative="b"), plain, atol=1e-4)


def test_a_negative_prompt_needs_text(tmp_path: Path) -> None:
    model = _model(tmp_path, ConditioningConfig())
    with pytest.raises(ConfigError, match=r"^a negative prompt, but the model is not conditioned on text"):
        model.sample(Conditions(), [0, 1], negative="b")
    images = model.sample(Conditions(), [0, 1])
    assert images.shape == (2, 3, SIDE, SIDE)
    assert not torch.allclose(images[0], images[1], atol=1e-3)


def test_cut_captions_are_counted(text: LoadedDiffusion) -> None:
    before = text.num_truncated
    text.sample(["word " * 40, "", "a"], [0, 1, 2], num_steps=1, negative="word " * 40)
    assert text.num_truncated - before == 4  # one prompt, and the negative one of each image


def test_known_pixels_of_an_inpainted_image_stay(tmp_path: Path) -> None:
    model = _model(tmp_path, ConditioningConfig(text=TEXT, inpainting=InpaintingConditioningConfig()))
    image, mask = torch.rand(2, 3, 48, 32) * 2 - 1, torch.zeros(2, 1, 48, 32)
    mask[:, :, 10:40, 5:20] = 1
    for options in ({}, {"tile": 16, "overlap": 4}):
        y = Conditions(captions=["a", "b"], images=image, masks=mask)
        filled = model.sample(y, [0, 1], **options)  # type: ignore[arg-type]
        known = (mask == 0).expand_as(image)
        assert torch.equal(filled[known], image[known])
        assert (filled[~known] - image[~known]).abs().max() > 0.1
    everything = model.sample(Conditions(captions=["a"], images=image[:1], masks=torch.ones(1, 1, 48, 32)), [0])
    assert (everything - image[:1]).abs().mean() > 0.1
    nothing = model.sample(Conditions(captions=["a"], images=image[:1], masks=torch.zeros(1, 1, 48, 32)), [0])
    assert torch.equal(nothing, image[:1])


def test_small_images_say_how_large_the_sample_is(tmp_path: Path) -> None:
    model = _model(tmp_path, ConditioningConfig(low_resolution=LowResolutionConditioningConfig(factor=4)))
    y = Conditions(low_resolution=torch.rand(1, 3, 6, 10) * 2 - 1)
    assert model.sample(y, [0]).shape == (1, 3, 24, 40)
    assert model.sample(y, [0], height=24).shape == (1, 3, 24, 40)
    with pytest.raises(ConfigError, match=r"enlarges to 24 x 40 \(4 times\)"):
        model.sample(y, [0], height=48, width=80)


def test_what_is_not_finite_is_no_picture(text: LoadedDiffusion) -> None:
    with pytest.raises(NumericsError, match="not finite"):
        text.sample(["a"], [0], guide=lambda denoiser: lambda z, t: denoiser(z, t) * torch.inf)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_pixels_that_are_not_finite_are_no_picture(tmp_path: Path, value: float) -> None:
    model = _model(tmp_path, SPATIAL)
    model.autoencoder.network.decoder.conv_out.weight.data[0] = value
    for tile in (None, 16):
        with pytest.raises(NumericsError, match="the autoencoder's decoder gives pixels that are not finite"):
            model.sample(Conditions(maps=torch.zeros(1, 32, 32, dtype=torch.uint8)), [0], tile=tile)


def test_half_precision_runs_in_tiles(tmp_path: Path) -> None:
    model = _model(tmp_path, SPATIAL).to("cpu", torch.bfloat16)
    images = model.sample(Conditions(maps=torch.zeros(1, 32, 32, dtype=torch.uint8)), [0], tile=16)
    assert images.dtype == torch.float32
    assert images.shape == (1, 3, 32, 32)
