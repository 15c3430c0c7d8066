"""The autoencoder benchmark times equal functions only."""

from __future__ import annotations

import pytest
import torch

from benchmarks import autoencoder
from benchmarks.harness import Turns
from ldm_scale.config.schema import AutoencoderConfig

TINY = AutoencoderConfig(
    base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=3, norm_groups=4
)
CASE = autoencoder.Case(TINY, resolution=16, batch=2)


def test_a_case_is_measured() -> None:
    result = autoencoder.measure(CASE, torch.device("cpu"), 3, "tiny")
    assert result is not None
    for direction in ("encode", "decode"):
        assert result[direction]["output_difference"] < 1e-5
        assert result[direction]["images_per_s"]["ours"] > 0
        baseline = result[direction]["baseline"]
        assert result[direction]["ratio_images_per_s_by_layout"][baseline] == result[direction]["ratio_images_per_s"]
    assert "tiny decode" in autoencoder.table({"tiny": result})


def test_another_function_gets_no_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = autoencoder.both_autoencoders(CASE, torch.device("cpu"))
    with torch.no_grad():
        theirs.decoder.conv_out.bias += 0.1
    monkeypatch.setattr(autoencoder, "both_autoencoders", lambda case, device: (ours, theirs))
    assert autoencoder.measure(CASE, torch.device("cpu"), 3, "tiny") is None
    assert "no speed is measured" in capsys.readouterr().err


def test_the_baseline_is_the_faster_layout() -> None:
    found = autoencoder.compared(Turns({"ours": [1.0, 1.0], "plain": [3.0, 3.0], "channels_last": [2.0, 2.2]}), batch=4)
    assert found["baseline"] == "channels_last"
    assert found["ratio_images_per_s"]["median"] == pytest.approx(2.1)
    assert found["images_per_s"]["ours"] == 4.0
