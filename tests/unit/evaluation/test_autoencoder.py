"""Figures of real networks against numpy and against each other: all batches, kinds, exact and broken models."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_scale.config.schema import AutoencoderConfig
from ldm_scale.errors import ConfigError, DataError, NumericsError
from ldm_scale.evaluation.autoencoder import NUM_SHOWN, Instruments, ReconstructionMeter
from ldm_scale.interchange.artifact import make_artifact
from ldm_scale.interchange.load import LoadedAutoencoder
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.models.build import build_autoencoder, build_seeded
from ldm_scale.models.perceptual import PerceptualLoss
from tests.helpers.runs import AUTOENCODER

VQ = dataclasses.replace(AUTOENCODER, kind="vq", codebook_size=16)
IDENTITY = AutoencoderConfig(kind="identity", channel_multipliers=(1,), latent_channels=3)


class PixelDistance(PerceptualLoss):
    """Mean squared difference of pixels, for speed."""

    name = "pixels"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().mean(dim=(1, 2, 3))


class PixelFeatures:
    """Ten pixels of each image."""

    weights_hash = ""

    @property
    def protocol(self) -> dict[str, str | int]:
        return {"features": "pixels"}

    def extract(self, images: Tensor) -> Tensor:
        return images.flatten(start_dim=1)[:, :10].cpu()


INSTRUMENTS = Instruments(PixelDistance(), PixelFeatures(), "FD-pixels", num_features=10, num_components=4)


def model_of(config: AutoencoderConfig) -> LoadedAutoencoder:
    network = build_seeded(lambda: build_autoencoder(config), seed=3)
    state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    if config.kind == "vq":
        # Codes at the size of the latents: the ones at the start all lie near zero, where a single one is chosen.
        state["quantizer.codebook"] = torch.randn(16, 3, generator=torch.Generator().manual_seed(1)) * 0.2
    return LoadedAutoencoder(make_artifact(state, config, LatentStatistics(scale=0.7), {"resolution": 16}))


def images(num_images: int = 20) -> Tensor:
    levels = torch.randint(0, 256, (num_images, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return levels / 127.5 - 1


def measure(model: LoadedAutoencoder, x: Tensor, batch: int = 8) -> ReconstructionMeter:
    meter = ReconstructionMeter(model, INSTRUMENTS)
    for part in x.split(batch):
        meter.add(part)
    return meter


def test_figures_equal_numpys_on_eight_bit_files() -> None:
    model, x = model_of(AUTOENCODER), images()
    figures = measure(model, x).figures()
    y = model.decode(model.encode(x))
    a = ((x.double() + 1) * 127.5).round().numpy()
    b = ((y.double().clamp(-1, 1) + 1) * 127.5).round().numpy()
    psnrs = 10 * np.log10(255**2 / ((a - b) ** 2).mean(axis=(1, 2, 3)))
    assert figures["psnr_db"]["mean"] == pytest.approx(psnrs.mean(), abs=1e-4)
    assert figures["psnr_db"]["std"] == pytest.approx(psnrs.std(), abs=1e-4)
    assert figures["mean_absolute_error"]["mean"] == pytest.approx(np.abs(a - b).mean() / 127.5, rel=1e-5)
    assert figures["perceptual"]["mean"] == pytest.approx(((a - b) ** 2).mean() / 127.5**2, rel=1e-4)
    unrelated = ((a[1:] - a[:-1]) ** 2).mean() / 127.5**2
    assert figures["perceptual"]["unrelated"] == pytest.approx(unrelated, rel=1e-4)
    assert figures["perceptual"]["name"] == "pixels"
    assert figures["rate"]["numbers_per_pixel"] == 0.75
    assert figures["exact_images"] == 0


def test_batches_change_no_figure() -> None:
    model, x = model_of(AUTOENCODER), images(11)
    whole = measure(model, x, 11).figures()
    assert whole["frechet"].pop("name") == "FD-pixels"
    assert whole["perceptual"].pop("name") == "pixels"
    interval = whole["frechet"].pop("interval")
    assert interval.pop("method").endswith("of the pairs of images")
    for batch in (1, 4):
        parts = measure(model, x, batch).figures()
        del parts["frechet"]["name"], parts["perceptual"]["name"]
        other = parts["frechet"].pop("interval")
        del other["method"]
        assert other == pytest.approx(interval, rel=1e-3)
        for name, group in whole.items():
            assert parts[name] == pytest.approx(group, rel=1e-3), name


def test_pixels_themselves_come_back_exactly() -> None:
    meter = measure(model_of(IDENTITY), images())
    figures = meter.figures()
    assert figures["psnr_db"] == {"mean": None, "std": None}
    assert figures["exact_images"] == 20
    assert figures["ssim"] == pytest.approx({"mean": 1.0, "std": 0.0})
    assert figures["mean_absolute_error"]["mean"] == figures["perceptual"]["mean"] == 0
    assert figures["frechet"]["distance"] == pytest.approx(0, abs=1e-9)
    assert figures["rate"]["stored_bits_per_pixel"] == 24
    json.dumps(figures, allow_nan=False)
    originals, reconstructions = meter.shown
    assert len(originals) == NUM_SHOWN
    torch.testing.assert_close(originals, reconstructions, rtol=0, atol=0)


def test_codes_are_counted_over_all_batches() -> None:
    model, x = model_of(VQ), images()
    figures = measure(model, x).figures()
    assert model.network.quantizer is not None
    raw = model.network.encode_moments(x)[0]
    # The nearest code by plain distances.
    nearest = torch.cdist(raw.permute(0, 2, 3, 1).reshape(-1, 3), model.network.quantizer.codebook).argmin(dim=1)
    counts = np.bincount(nearest.numpy(), minlength=16)
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log(shares)).sum()
    assert len(shares) > 1
    assert figures["codes"]["num_chosen"] == 20 * 8 * 8
    assert figures["codes"]["share_used"] == len(shares) / 16
    assert figures["codes"]["perplexity"] == pytest.approx(math.exp(entropy), rel=1e-9)
    assert figures["rate"]["code_bits_per_pixel"] == 4 / 4
    assert figures["rate"]["code_entropy_bits_per_pixel"] == pytest.approx(entropy / math.log(2) / 4, rel=1e-9)


def test_weights_that_give_no_numbers_are_refused() -> None:
    model = model_of(AUTOENCODER)
    model.network.decoder.conv_out.bias[0] = math.nan
    meter = ReconstructionMeter(model, INSTRUMENTS)
    with pytest.raises(NumericsError, match=r"5 of 5 reconstructions are not finite, the first of image 0"):
        meter.add(images(5))


def test_no_image_and_a_factor_that_does_not_divide() -> None:
    meter = ReconstructionMeter(model_of(AUTOENCODER), INSTRUMENTS)
    with pytest.raises(DataError, match="no image"):
        meter.figures()
    with pytest.raises(ConfigError, match="cannot be reduced by f = 2"):
        meter.add(images(2)[..., :15])


def test_reconstructions_have_an_inception_score_where_there_is_a_classifier() -> None:
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
    instruments = dataclasses.replace(INSTRUMENTS, classifier=logits, score_name="IS of reconstructions")
    meter = ReconstructionMeter(model_of(IDENTITY), instruments)
    meter.add(images(24))
    found = meter.figures()["inception_score"]
    probabilities = (images(24).flatten(start_dim=1)[:, :10].double() @ logits.double().T).softmax(dim=1)
    assert 1 < found["value"] < math.exp((probabilities.log() * probabilities).sum(dim=1).mean() + math.log(6)) * 1.5
    assert found["name"] == "IS of reconstructions"


@pytest.mark.parametrize("config", [AUTOENCODER, VQ])
def test_meters_of_ranks_merge_to_that_of_all_images(config: AutoencoderConfig) -> None:
    model, x = model_of(config), images(20)
    alone = measure(model, x, 5)
    ranks = [ReconstructionMeter(model, INSTRUMENTS) for _ in range(3)]
    # Blocks of neighbours, the last rank's first; each begins with the image before its own.
    for rank, (begin, end) in zip(ranks, ((10, 20), (0, 5), (5, 10)), strict=True):
        for first in range(begin, end, 5):
            before = x[begin - 1 : begin] if first == begin > 0 else None
            rank.add(x[first : first + 5], range(first, first + 5), before)
    merged = ReconstructionMeter(model, INSTRUMENTS)
    for rank in (ranks[1], ranks[2], ranks[0]):
        merged.take(rank.part)
    expected, found = alone.figures(), merged.figures()
    assert found["psnr_db"] == pytest.approx(expected["psnr_db"], rel=1e-9)
    assert found["perceptual"]["unrelated"] == pytest.approx(expected["perceptual"]["unrelated"], rel=1e-9)
    assert found["rate"] == pytest.approx(expected["rate"], rel=1e-9)
    assert found["frechet"]["distance"] == pytest.approx(expected["frechet"]["distance"], rel=1e-6)
    assert found.get("codes") == expected.get("codes")
    for mine, theirs in zip(merged.shown, alone.shown, strict=True):
        torch.testing.assert_close(mine, theirs)
    with pytest.raises(AssertionError, match="image 3 is compared with the one before it"):
        ReconstructionMeter(model, INSTRUMENTS).add(x[:2], range(3, 5))
