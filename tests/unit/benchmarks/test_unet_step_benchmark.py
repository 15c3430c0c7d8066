"""The benchmark of the UNet's step times equal functions only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import unet_step
from benchmarks.measured import own_bytes
from ldm_scale.config.networks import check_unet
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")


def _tiny(name: str) -> unet_step.Case:
    """The case with a small network of the same parts."""
    case = unet_step.cases()[name]
    levels = (0, 1) if case.unet.attention_levels else ()
    unet = replace(case.unet, base_channels=16, channel_multipliers=(1, 2), attention_levels=levels, norm_groups=4)
    unet = replace(unet, num_heads=1) if unet.head_dim is None else replace(unet, head_dim=16)
    width = None if case.context_width is None else 16
    return replace(
        case, unet=unet, batch=2, latent_side=8, context_tokens=min(4, case.context_tokens), context_width=width
    )


@pytest.mark.parametrize(
    "name", ["mid", "ldm8", "sd1", "sd2", "unconditional", "layout", "semantic", "superres", "inpaint"]
)
def test_a_case_is_measured(name: str) -> None:
    result = unet_step.measure(_tiny(name), CPU, 3, name)
    assert result is not None
    assert result["output_difference"] < 1e-5
    assert result["gradient_difference"] < 1e-5
    assert result["ours_step_s"]["min"] > 0
    theirs = result["theirs_step_s"]
    assert theirs.keys() == {unet_step.CHANNELS_LAST, unet_step.AS_IT_COMES}
    assert result["baseline"] == min(theirs, key=lambda way: float(theirs[way]["median"])), "the faster of the two"
    faster, ours = theirs[result["baseline"]], result["ours_step_s"]
    assert faster["min"] / ours["max"] <= result["ratio_images_per_s"]["median"] <= faster["max"] / ours["min"]
    assert name in unet_step.table({name: result})


def _compiled() -> dict[str, Any]:
    result = unet_step.measure(_tiny("sd2"), CPU, 3, "sd2", backend="eager")
    assert result is not None
    return result


@pytest.mark.rest
def test_both_may_be_compiled() -> None:
    (result,) = run_ranks(_compiled, 1)
    assert result["compiled"]
    assert result["ours_step_s"]["min"] > 0


def test_a_networks_own_bytes_are_its_weights_gradients_and_moments() -> None:
    network = torch.nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    assert own_bytes(network, optimizer) == 400
    network(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert own_bytes(network, optimizer) == 4 * 400 + 4  # the step's count


def test_the_goals_have_their_cases() -> None:
    full = unet_step.full_cases()
    assert {name: (case.batch, case.latent_side) for name, case in full.items()} == {
        "sd2_512": (32, 64),
        "sd2_256": (32, 32),
    }
    assert not full.keys() & unet_step.cases().keys()


def test_another_function_gets_no_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = _tiny("ldm8")
    ours, theirs, names = unet_step.both_unets(case, CPU)
    with torch.no_grad():
        theirs.conv_out.bias += 0.1
    monkeypatch.setattr(unet_step, "both_unets", lambda case, device: (ours, theirs, names))
    assert unet_step.measure(case, CPU, 3, "tiny") is None
    assert "no speed is measured" in capsys.readouterr().err


def test_every_family_of_the_paper_has_a_case() -> None:
    cases = unet_step.cases()
    assert {case.unet.attention for case in cases.values()} == {"transformer", "self"}
    assert {case.unet.linear_projection for case in cases.values()} == {True, False}
    assert {case.unet.residual_resampling for case in cases.values()} == {True, False}
    assert {case.spatial_channels for case in cases.values()} == {0, 3, 4}
    assert {case.context_tokens for case in cases.values()} >= {0, 1, 77, 92}
    for name, case in cases.items():
        check_unet(case.unet)
        assert (case.context_width is None) == (case.unet.attention == "self"), name


def test_the_ldm8_case_is_the_papers_at_a_quarter_of_its_width() -> None:
    case = unet_step.cases()["ldm8"]
    assert (case.unet.base_channels, case.unet.channel_multipliers, case.unet.num_heads) == (64, (1, 2, 4), 1)
    assert (case.context_tokens, case.context_width) == (1, 512)
    assert (case.latent_channels, case.latent_side) == (4, 32)
