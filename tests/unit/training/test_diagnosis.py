"""Each rule of the diagnosis on figures at both sides of its limit. Real trainings: integration/test_diagnosis.py."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from ldm_scale.training.diagnosis import Figures, Gap, diagnose, gradient_history

HEALTHY = Figures(
    images=60_000,
    total_images=100_000,
    global_batch=64,
    warmup_images=1_000,
    raw=0.30,
    zero=1.0,
    latent_std=1.02,
    expected_std=1.0,
    log_snr=(7.1, -5.4),
    movement=0.1,
    peak_lr=1e-4,
    ema=0.29,
    ema_half_life_images=2_000.0,
    gaps={"text": Gap(0.02, 0.001, 0.1), "layout": Gap(0.01, 0.001, 0.1)},
    without_conditioning=(0.30, 0.32),
    overfit=(0.29, 0.30, 0.01),
    recent_gradient_norms=(0.3, 0.2) * 20,
)


def _names(**changes: Any) -> list[str]:
    return [finding.name for finding in diagnose(dataclasses.replace(HEALTHY, **changes))]


def _text(name: str, **changes: Any) -> str:
    (text,) = [str(f) for f in diagnose(dataclasses.replace(HEALTHY, **changes)) if f.name == name]
    return text


def test_a_healthy_run_has_no_findings() -> None:
    assert diagnose(HEALTHY) == []
    bare = Figures(60_000, 100_000, 64, 0, 0.3, 1.0, 1.0, 1.0, (7.0, -5.0), 0.1, 1e-4)
    assert diagnose(bare) == []


def test_a_finding_says_what_why_and_what_to_do() -> None:
    assert _text("overfit", overfit=(0.1, 0.3, 0.01)) == (
        "overfit: the loss is 0.1000 on images that are trained on and 0.3000 on others (standard error of the "
        "difference 0.01). The model begins to know its training images by heart; samples will repeat them. What to "
        "do: train on more images, augment (data.horizontal_flip, data.crop_scale_min), make the model smaller, raise "
        "unet.dropout, or stop where the validation loss was lowest"
    )


@pytest.mark.parametrize(
    ("changes", "suspect"),
    [
        ({"latent_std": 30.0}, "the latents' scale: their deviation is 30 where 1 is right"),
        ({"movement": 5e-5}, "add up to 5.0e-05, which is as far as AdamW can have moved a weight; raise"),
        ({"raw": 1.5}, "a learning rate that is too large: the loss is 1.50 times that of predicting zero"),
        ({"recent_gradient_norms": [0.1] * 20 + [5.0] * 20}, "the gradient's norm went from 0.1 to 5 in the last"),
        ({"log_snr": (7.0, 1.0)}, "the noise schedule: log-SNR from 7.0 to 1.0 with these latents"),
        ({}, "scale, schedule and learning rate look right"),
    ],
)
def test_suspects_of_a_stuck_loss(changes: dict[str, Any], suspect: str) -> None:
    text = _text("loss stuck", **({"raw": 0.99, "latent_std": 1.0} | changes))
    assert text.count(";") - text.count("; raise") - text.count("; lower") <= 2, "one suspect alone was expected"
    assert suspect in text
    if changes:
        assert "look right" not in text


def test_the_limits_of_a_stuck_loss() -> None:
    assert "loss stuck" in _names(raw=0.951)
    assert "loss stuck" not in _names(raw=0.949)
    assert "loss stuck" not in _names(raw=0.99, images=99 * 64), "too early"
    assert "loss stuck" not in _names(raw=0.99, warmup_images=70_000), "still warming up"
    assert "loss stuck" in _names(raw=1.95, zero=2.0), "relative to predicting zero, as in flow"
    assert "loss stuck" not in _names(raw=1.5, zero=2.0)


def test_the_latents_scale_and_what_it_does_to_the_schedule() -> None:
    assert _names(latent_std=2.1) == _names(latent_std=0.49) == ["latent scale"]
    assert _names(latent_std=1.9) == _names(latent_std=0.51) == []
    assert _names(latent_std=0.5, expected_std=0.5) == [], "EDM's sigma_data"
    assert "log-SNR runs from 16.3 to 3.8" in _text("latent scale", latent_std=100.0)  # 2 ln 100 = 9.2


@pytest.mark.parametrize(("log_snr", "found"), [((7, -1.9), 1), ((1.9, -5), 1), ((2.1, -2.1), 0), ((9, -math.inf), 0)])
def test_the_noise_range(log_snr: tuple[float, float], found: int) -> None:
    assert _names(log_snr=log_snr) == ["noise range"] * found


def test_ignored_conditioning_is_named_by_kind() -> None:
    gaps = {"text": Gap(0.02, 0.001, 0.1), "layout": Gap(0.0015, 0.001, 0.1)}
    assert _names(gaps=gaps) == ["conditioning ignored: layout"]
    assert _names(gaps={"text": Gap(0.0, 0.0, 0.1)}) == ["conditioning ignored: text"], "exactly equal losses"
    assert _names(gaps={"text": Gap(-0.1, 0.01, 0.1)}) == ["conditioning ignored: text"]
    assert _names(gaps=gaps, images=24_000) == [], "too early"
    text = _text("conditioning ignored: text", gaps={"text": Gap(0.0, 0.001, 0.9)})
    assert "it is 0.3000 with the true conditioning and 0.3200 with none" in text
    assert "lower conditioning.text.drop_probability=0.9, 0.1 is usual" in text


def test_a_lagging_average() -> None:
    assert _names(ema=0.32) == ["EMA lags"]
    assert _names(ema=0.31) == _names(ema=None) == _names(ema=0.9, images=49_000) == []
    assert "lower ema.half_life_images" in _text("EMA lags", ema=0.32)
    profiles_alone = _text("EMA lags", ema=0.32, ema_half_life_images=0.0)
    assert "ema.power_stds" in profiles_alone
    assert "half" not in profiles_alone


def test_overfitting_needs_a_factor_and_certainty() -> None:
    assert _names(overfit=(0.20, 0.30, 0.01)) == ["overfit"]
    assert _names(overfit=(0.25, 0.30, 0.01)) == _names(overfit=(0.20, 0.30, 0.05)) == _names(overfit=None) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite(value: float) -> None:
    assert "of the averaged weights is not finite" in _text("not finite", ema=value)
    assert "of the raw and averaged weights is not finite" in _text("not finite", raw=value, ema=value)
    assert "not finite" in _names(raw=math.nan, latent_std=math.nan, gaps={"text": Gap(math.nan, math.nan, 0.1)})


def test_the_gradients_history() -> None:
    assert gradient_history([]) == ""
    assert gradient_history([1.0, 2.0, 800.0]) == "gradient norm of the last 3 steps: median 2, last 800"
