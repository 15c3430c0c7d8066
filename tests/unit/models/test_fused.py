"""The policy of implementations: how it reaches the modules, what is refused, what is said afterwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from ldm_kernels.common import launch
from ldm_scale.config.schema import KernelsConfig
from ldm_scale.errors import ConfigError
from ldm_scale.models.blocks import ResidualBlock
from ldm_scale.models.build import build_autoencoder, build_seeded, build_unet
from ldm_scale.models.convolution import Conv2d
from ldm_scale.models.fused import Attention, FeedForward, GroupNorm, check_kernels, describe_kernels, set_kernels
from tests.helpers.kernels import other_layouts
from tests.helpers.runs import AUTOENCODER, UNET, set_random_outputs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_set_kernels_reaches_every_fused_module() -> None:
    unet = build_unet(UNET, 3, 3, 16)
    set_kernels(unet, KernelsConfig(group_norm_silu="reference", attention="sdpa", geglu="triton"))
    backends = {
        kind: {m.backend for m in unet.modules() if isinstance(m, kind)} for kind in (GroupNorm, Attention, FeedForward)
    }
    assert backends == {GroupNorm: {"reference"}, Attention: {"sdpa"}, FeedForward: {"triton"}}


def test_our_attention_is_refused_for_heads_that_it_does_not_serve() -> None:
    wide = dataclasses.replace(AUTOENCODER, base_channels=72, norm_groups=8)
    with pytest.raises(
        ConfigError, match=r"kernels\.attention=triton serves head dims up to 128, .* layers of 144; set"
    ):
        set_kernels(build_autoencoder(wide), KernelsConfig(attention="triton"))
    set_kernels(build_autoencoder(wide), KernelsConfig(attention="sdpa"))


def test_implementations_agree_on_a_unet() -> None:
    unet = build_seeded(lambda: build_unet(UNET, 3, 3, 16), 0)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 16)
    auto = unet(*inputs)
    set_kernels(unet, KernelsConfig(group_norm_silu="reference", attention="reference", geglu="reference"))
    torch.testing.assert_close(unet(*inputs), auto, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter runs Triton on the CPU")
@pytest.mark.parametrize(("name", "backend"), [("attention", "xformers"), ("attention", "triton"), ("geglu", "triton")])
def test_check_kernels_names_the_field_that_the_device_cannot_run(name: str, backend: str) -> None:
    kernels = dataclasses.replace(KernelsConfig(), **{name: backend})
    with pytest.raises(
        ConfigError, match=rf"kernels\.{name}={backend} needs a CUDA device, .* cpu; set kernels\.{name}=auto"
    ):
        check_kernels(kernels, CPU)
    check_kernels(KernelsConfig(), CPU)


def test_check_kernels_names_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"kernels\.attention=xformers needs the package xformers"):
        check_kernels(KernelsConfig(attention="xformers"), CUDA)


def test_describe_kernels_counts_calls_by_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_outcomes", type(launch._outcomes)())
    unet = build_unet(UNET, 3, 3, 16)
    set_kernels(unet, KernelsConfig(group_norm_silu="reference", attention="sdpa", geglu="reference"))
    unet(torch.randn(1, 3, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16))
    counts = {kind: sum(isinstance(m, kind) for m in unet.modules()) for kind in (GroupNorm, Attention, FeedForward)}
    assert describe_kernels() == (
        f"attention: sdpa x{counts[Attention]}; geglu: reference x{counts[FeedForward]}; "
        f"group_norm_silu: reference x{counts[GroupNorm]}"
    )


def test_a_residual_block_moves_its_first_bias_into_the_norm() -> None:
    block = build_seeded(lambda: ResidualBlock(8, 8, norm_groups=2, eps=1e-5), 0)
    plain = build_seeded(lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)), 0)
    assert block.conv1.bias is None
    assert block.norm2.channel_bias is not None
    assert torch.equal(block.norm2.channel_bias, plain[0].bias), "its start is the convolution's own"
    x = torch.randn(2, 8, 4, 4)
    hidden = nn.functional.conv2d(block.norm1(x), block.conv1.weight, block.norm2.channel_bias, padding=1)
    expected = x + block.conv2(nn.functional.silu(nn.functional.group_norm(hidden, 2)))
    torch.testing.assert_close(block(x), expected)


def test_autoencoder_without_policy_is_auto() -> None:
    autoencoder = build_autoencoder(AUTOENCODER)
    assert {m.backend for m in autoencoder.modules() if isinstance(m, GroupNorm | Attention)} == {"auto"}


def test_networks_stay_in_channels_last_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conv2d, "_weight_is_larger", lambda self, x: False)  # as on a GPU
    unet, autoencoder = build_unet(UNET, 3, 3, 16), build_autoencoder(AUTOENCODER)
    for network in (unet, autoencoder):
        set_random_outputs(network, seed=1)
    assert (
        other_layouts(unet, torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 16), ignore=Attention)
        == []
    )
    assert other_layouts(autoencoder, torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8), ignore=Attention) == []
