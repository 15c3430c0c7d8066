"""Blocks are their formulas; where no gradient is asked for they reuse memory: same values, inputs stay as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_kernels import group_norm_silu
from ldm_scale.models.blocks import Resampling, ResidualBlock, place_biases


def block(out_channels: int, time_dim: int | None = None) -> ResidualBlock:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResidualBlock(8, out_channels, norm_groups=4, eps=1e-6, time_dim=time_dim)
        assert network.norm2.channel_bias is not None
        torch.nn.init.normal_(network.norm2.channel_bias)
    return network


def features() -> Tensor:
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("out_channels", [8, 12])
@pytest.mark.parametrize("time_dim", [None, 5])
def test_a_residual_block_is_the_same_without_gradients(out_channels: int, time_dim: int | None) -> None:
    network, x = block(out_channels, time_dim), features()
    time = None if time_dim is None else torch.ones(2, time_dim)
    expected, before = network(x, time), x.clone()
    with torch.no_grad():
        found = network(x, time)
        again = network(x, time)
    assert torch.equal(found, expected.detach())
    assert torch.equal(again, found), "nothing that a call needs was overwritten by the one before"
    assert torch.equal(x, before)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("resampling", [None, "down", "up"])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_residual_block_is_its_formula_in_float64(scale_shift: bool, resampling: Resampling | None) -> None:
    network = ResidualBlock(8, 12, 4, 1e-5, time_dim=5, scale_shift=scale_shift, resampling=resampling).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, time = torch.randn(2, 8, 6, 4, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    weights = dict(network.named_parameters())

    def resampled(x: Tensor) -> Tensor:
        if resampling == "down":
            return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) if resampling == "up" else x

    def norm(x: Tensor, name: str) -> Tensor:
        grouped = x.reshape(2, 4, -1)
        grouped = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, False, keepdim=True) + 1e-5).sqrt()
        return grouped.view_as(x) * weights[f"{name}.weight"].view(-1, 1, 1) + weights[f"{name}.bias"].view(-1, 1, 1)

    h = resampled(F.silu(norm(x, "norm1")))
    h = F.conv2d(h, weights["conv1.weight"], weights["norm2.channel_bias"], padding=1)
    moved = (time @ weights["time_projection.weight"].T + weights["time_projection.bias"])[:, :, None, None]
    h = norm(h, "norm2") * (1 + moved[:, :12]) + moved[:, 12:] if scale_shift else norm(h + moved, "norm2")
    h = F.conv2d(F.silu(h), weights["conv2.weight"], weights["conv2.bias"], padding=1)
    expected = F.conv2d(resampled(x), weights["skip.weight"], weights["skip.bias"]) + h
    torch.testing.assert_close(network(x, time), expected, rtol=1e-10, atol=1e-10)


def test_a_bias_is_the_same_in_either_place() -> None:
    network, x = block(12), features()
    names = set(network.state_dict())
    with torch.no_grad():
        expected = network(x)
        place_biases(network, torch.device("cpu"))
        assert network.norm2.channel_bias is None
        torch.testing.assert_close(network(x), expected)
        place_biases(network, torch.device("cpu"))
        place_biases(network, torch.device("cuda"))
        assert set(network.state_dict()) == names
        assert torch.equal(network(x), expected)


def test_mixed_types_are_added_in_the_wider_one() -> None:
    network, x = block(8), features()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert network(x).dtype == torch.float32


def test_a_group_norm_leaves_its_input_alone() -> None:
    x = features()
    before = x.clone()
    with torch.no_grad():
        group_norm_silu(x, 4, torch.ones(8), torch.zeros(8), channel_bias=torch.ones(8))
    assert torch.equal(x, before)
