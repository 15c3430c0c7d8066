"""Compiled blocks compute what they did, in training alone, and one graph serves every block of its kind and shape."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_scale.config.schema import UNetConfig
from ldm_scale.errors import ConfigError
from ldm_scale.models.build import build_seeded, build_unet
from ldm_scale.models.compiled import KINDS, CompileReport, check_compiler, compile_blocks, compiled_kinds
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import set_random_outputs

CONFIG = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2), num_res_blocks=2, attention_levels=(1,), head_dim=16, norm_groups=4
)
WIDTH = 24


def _unet() -> nn.Module:
    unet = build_seeded(lambda: build_unet(CONFIG, 3, 3, WIDTH), 0)
    set_random_outputs(unet, seed=1)
    return unet


def _step(unet: nn.Module, batch: int = 2) -> tuple[float, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    z, context = torch.randn(batch, 3, 8, 8, generator=generator), torch.randn(batch, 5, WIDTH, generator=generator)
    unet.zero_grad()
    loss = unet(z, torch.arange(batch), context).square().mean()
    loss.backward()
    return float(loss), [parameter.grad.clone() for parameter in unet.parameters() if parameter.grad is not None]


def _blocks_by_shape(unet: nn.Module) -> tuple[int, int]:
    blocks = [module for module in unet.modules() if type(module) in KINDS]
    # Down, middle and up of one width meet at one resolution here: the weights' shapes tell the graphs.
    return len(blocks), len({(type(block), *(p.shape for p in block.parameters())) for block in blocks})


def _observed(_: object = None) -> dict[str, Any]:
    unet = _unet()
    names, plain = list(unet.state_dict()), _step(unet)
    report, copied = CompileReport(0), copy.deepcopy(unet)
    num_blocks = compile_blocks(unet, backend="aot_eager")
    compiled = _step(unet)
    first = str(report)
    unet.eval()
    evaluated = _step(unet, batch=3)
    after = str(report)
    twin = copy.deepcopy(unet)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    return {
        "num_blocks": num_blocks,
        "expected": _blocks_by_shape(unet),
        "same_names": names == list(unet.state_dict()),
        "plain": plain,
        "compiled": compiled,
        "evaluated": evaluated[0],
        "expected_evaluated": _step(copied.eval(), batch=3)[0],
        "reports": (first, after),
        "copy_has_weights_of_its_own": _step(twin.train())[0] == 0.0,
        "kinds": [kind.__name__ for kind in compiled_kinds(unet)],
        "kinds_before": compiled_kinds(copied),
    }


@pytest.mark.timeout(600)
def test_blocks_compute_the_same_by_one_graph_a_shape() -> None:
    (found,) = run_ranks(_observed, 1, None, timeout_s=500.0)
    blocks, shapes = found["expected"]
    assert found["num_blocks"] == blocks > shapes
    assert found["same_names"]
    (loss, gradients), (expected, expected_gradients) = found["compiled"], found["plain"]
    assert loss == pytest.approx(expected, rel=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm() + 1e-7
    first, after = found["reports"]
    assert f" {shapes} graphs" in first, "one for each kind and shape"
    assert f" {shapes} graphs" in after, "evaluation compiles nothing"
    assert found["evaluated"] == found["expected_evaluated"]
    assert found["copy_has_weights_of_its_own"]
    assert found["kinds"] == ["ResidualBlock", "SpatialTransformer"]
    assert found["kinds_before"] == []


def _broken(_: object = None) -> str:
    def backend(*_: Any) -> Any:
        raise RuntimeError("out of registers\nand more")

    unet = _unet()
    compile_blocks(unet, backend=backend)  # type: ignore[arg-type]
    try:
        _step(unet)
    except ConfigError as error:
        return str(error)
    return "no error"


@pytest.mark.timeout(300)
def test_what_cannot_be_compiled_is_an_error() -> None:
    (message,) = run_ranks(_broken, 1, None, timeout_s=200.0)
    assert "train.compile=blocks: a ResidualBlock cannot be compiled" in message
    assert "out of registers" in message
    assert "\n" not in message


@pytest.mark.parametrize(("kind", "name"), [("cpu", "g++"), ("cuda", "gcc")])
def test_a_machine_without_a_compiler_is_refused(kind: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.compile=blocks needs a compiler.*{name.replace('+', '.')}"):
        check_compiler(torch.device(kind), {"PATH": "/nowhere"})
    with pytest.raises(ConfigError, match="none of my-own-compiler"):
        check_compiler(torch.device(kind), {"PATH": "/usr/bin", "CXX": "my-own-compiler", "CC": "my-own-compiler"})
