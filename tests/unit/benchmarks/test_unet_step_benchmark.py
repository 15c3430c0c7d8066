"""The benchmark of the UNet's step times equal functions only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import unet_step

CPU = torch.device("cpu")


def _tiny(name: str) -> unet_step.Case:
    """The case with a small network of the same parts."""
    case = unet_step.cases()[name]
    unet = replace(case.unet, base_channels=16, channel_multipliers=(1, 2), attention_levels=(0, 1), norm_groups=4)
    unet = unet if unet.head_dim is None else replace(unet, head_dim=16)
    return unet_step.Case(unet, 2, case.latent_channels, 8, min(4, case.context_tokens), 16)


@pytest.mark.parametrize("name", ["mid", "ldm8"])
def test_a_case_is_measured(name: str) -> None:
    result = unet_step.measure(_tiny(name), CPU, 3, name)
    assert result is not None
    assert result["output_difference"] < 1e-5
    assert result["gradient_difference"] < 1e-5
    assert result["ours_step_s"]["min"] > 0
    assert result["theirs_step_s"]["min"] > 0
    assert name in unet_step.table({name: result})


def test_another_function_gets_no_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = _tiny("ldm8")
    ours, theirs, names = unet_step.both_unets(case, CPU)
    with torch.no_grad():
        theirs.conv_out.bias += 0.1
    monkeypatch.setattr(unet_step, "both_unets", lambda case, device: (ours, theirs, names))
    assert unet_step.measure(case, CPU, 3, "tiny") is None
    assert "no speed is measured" in capsys.readouterr().err


def test_the_ldm8_case_is_the_papers_at_a_quarter_of_its_width() -> None:
    case = unet_step.cases()["ldm8"]
    assert (case.unet.base_channels, case.unet.channel_multipliers, case.unet.num_heads) == (64, (1, 2, 4), 1)
    assert (case.context_tokens, case.context_width) == (1, 512)
    assert (case.latent_channels, case.latent_side) == (4, 32)
