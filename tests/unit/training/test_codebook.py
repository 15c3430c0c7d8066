"""Codes as moving averages against the formula in float64, dead codes on latents of the step, figures by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_scale.config.schema import AutoencoderLossConfig
from ldm_scale.training import codebook
from ldm_scale.training.codebook import CODEBOOK, CodebookKeeper

CODES, CHANNELS = 6, 3


class _Model:
    parameter_shapes = {CODEBOOK: (CODES, CHANNELS)}  # noqa: RUF012


class _Trained:
    """Stands for `Trained`: a codebook that is written in place."""

    def __init__(self, values: Tensor) -> None:
        self.model, self.buffers, self.values = _Model(), {}, values

    def write_rows(self, name: str, rows: Tensor, values: Tensor, restart: bool) -> None:
        # Codes that move as averages keep their own average over time; revived ones begin anew.
        assert (name, restart) == (CODEBOOK, len(rows) < len(self.values))
        self.values[rows] = values


def _keeper(**loss: Any) -> tuple[CodebookKeeper, Tensor]:
    values = torch.randn(CODES, CHANNELS, generator=torch.Generator().manual_seed(1))
    keeper = CodebookKeeper(_Trained(values), values.clone(), AutoencoderLossConfig(**loss), seed=3)  # type: ignore[arg-type]
    return keeper, values


def _step(keeper: CodebookKeeper, images: int, used: list[int]) -> tuple[dict[str, float], Tensor, Tensor]:
    """Figures, latents and codes of a step of two micro-batches of two images of 2 x 2 latents."""
    generator = torch.Generator().manual_seed(images)
    z = torch.randn(4, CHANNELS, 2, 2, generator=generator)
    indices = torch.tensor(used)[torch.randint(len(used), (4, 2, 2), generator=generator)]
    numbers = torch.arange(4) + images
    for half in (slice(0, 2), slice(2, 4)):
        keeper.observe(z[half], indices[half], numbers[half])
    return keeper.update(images, 4), z, indices


def test_codes_are_moving_averages_of_their_latents() -> None:
    keeper, values = _keeper(codebook_update="ema", codebook_decay=0.8)
    counts, sums = torch.ones(CODES).double(), values.double().clone()
    initial = values.clone()
    for step in range(5):
        _, z, indices = _step(keeper, step * 4, [0, 1, 3])
        vectors, chosen = z.permute(0, 2, 3, 1).reshape(-1, CHANNELS).double(), indices.flatten()
        for code in range(CODES):
            mine = vectors[chosen == code]
            counts[code] = 0.8 * counts[code] + 0.2 * len(mine)
            sums[code] = 0.8 * sums[code] + 0.2 * mine.sum(dim=0)
        torch.testing.assert_close(values.double(), sums / counts[:, None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values[[2, 4, 5]], initial[[2, 4, 5]])
    assert not torch.allclose(values[0], initial[0])


def test_an_unused_code_keeps_its_place_for_ever() -> None:
    keeper, values = _keeper(codebook_update="ema", codebook_decay=0.5)
    initial = values.clone()
    for step in range(200):  # 0.5 ** 200 is no fp32 number
        _step(keeper, step * 4, [0])
    torch.testing.assert_close(values[1:], initial[1:], rtol=1e-4, atol=1e-5)
    assert values.isfinite().all()


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_codes_that_nothing_chose_are_put_on_latents(update: Any) -> None:
    keeper, values = _keeper(codebook_update=update, dead_code_images=8)
    initial = values.clone()
    assert _step(keeper, 0, [0, 1, 3])[0]["codebook/revived"] == 0
    torch.testing.assert_close(values[[2, 4, 5]], initial[[2, 4, 5]])
    report, z, _ = _step(keeper, 4, [0, 1, 2, 3])
    assert report["codebook/revived"] == 2
    latents = z.permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    for code in (4, 5):
        assert (values[code] == latents).all(dim=1).any(), f"code {code} is no latent of this step"
    assert _step(keeper, 8, [0, 1, 2, 3])[0]["codebook/revived"] == 0, "they were revived a moment ago"
    again, same = _keeper(codebook_update=update, dead_code_images=8)
    _step(again, 0, [0, 1, 3])
    _step(again, 4, [0, 1, 2, 3])
    _step(again, 8, [0, 1, 2, 3])
    assert torch.equal(same, values), "another choice for the same seed and images"


def test_revived_codes_lie_on_places_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # 40 dead codes and 16 latents in a step: no two codes on one latent, the rest wait.
    monkeypatch.setattr(_Model, "parameter_shapes", {CODEBOOK: (40, CHANNELS)})
    values = torch.randn(40, CHANNELS, generator=torch.Generator().manual_seed(2))
    keeper = CodebookKeeper(_Trained(values), values.clone(), AutoencoderLossConfig(dead_code_images=4), seed=3)  # type: ignore[arg-type]
    report, z, _ = _step(keeper, 0, [0])
    assert report["codebook/revived"] == 16
    latents = z.permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    matches = (values[:, None] == latents[None]).all(dim=2)
    assert matches.sum(dim=0).tolist() == [1] * 16, "a latent got no code, or more than one"
    assert _step(keeper, 4, [0])[0]["codebook/revived"] == 16


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "ALIVE_IMAGES", 8)
    keeper, _ = _keeper()
    _step(keeper, 0, [0, 4])
    z = torch.zeros(4, CHANNELS, 2, 2)
    indices = torch.tensor([0, 0, 1, 3]).view(4, 1, 1).expand(4, 2, 2)
    keeper.observe(z, indices, torch.arange(4) + 4)
    report = keeper.update(4, 4)
    assert report["codebook/used_share"] == pytest.approx(3 / 6)
    assert report["codebook/alive_share"] == pytest.approx(4 / 6), "0, 1, 3 of this step and 4 of the one before"
    assert report["codebook/perplexity"] == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)), rel=1e-6)
