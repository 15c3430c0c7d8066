"""A convolution in either layout is torch's, and takes the layout in which less is copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_scale.models.blocks import ResidualBlock
from ldm_scale.models.convolution import Conv2d

CHANNELS = (32, 48)


class _Layouts(TorchDispatchMode):
    """Whether features came to a convolution in channels_last, one call after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.channels_last = list[bool]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.channels_last.append(args[0].is_contiguous(memory_format=torch.channels_last))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("batch", "side", "in_channels_last"), [(2, 4, False), (1, 8, False), (2, 6, True)])
def test_it_is_torchs_in_the_layout_of_less_copying(batch: int, side: int, in_channels_last: bool, stride: int) -> None:
    convolution = Conv2d(*CHANNELS, 3, padding=1, stride=stride).double()
    x = torch.randn(batch, CHANNELS[0], side, side, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with _Layouts() as layouts:
        y = convolution(x)
        gradient = torch.randn_like(y)
        y.backward(gradient)
    assert layouts.channels_last == [in_channels_last]
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert convolution.bias is not None
    plain = [tensor.detach().clone().requires_grad_() for tensor in (x, convolution.weight, convolution.bias)]
    expected = F.conv2d(*plain, padding=1, stride=stride)
    expected.backward(gradient)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip((x, convolution.weight, convolution.bias), plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_weight_in_channels_last_has_nothing_to_copy() -> None:
    convolution = Conv2d(*CHANNELS, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(1, CHANNELS[0], 4, 4).contiguous(memory_format=torch.channels_last)
    with _Layouts() as layouts:
        convolution(x)
    assert layouts.channels_last == [True]


def test_the_layout_does_not_depend_on_whether_gradients_are_asked_for() -> None:
    """Dropout is drawn in the order of memory, and a block that is computed again begins without gradients."""
    convolution, x = Conv2d(*CHANNELS, 3, padding=1), torch.randn(1, CHANNELS[0], 8, 8)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), _Layouts() as layouts:
        convolution(x)
    assert layouts.channels_last == [False]


@pytest.mark.parametrize("out_channels", [16, 32])
def test_a_residual_block_goes_to_the_other_layout_once_and_back_once(out_channels: int) -> None:
    block = ResidualBlock(32, out_channels, norm_groups=4, eps=1e-5, time_dim=8).double()
    norms: list[str] = []
    block.norm2.register_forward_hook(lambda _, inputs, y: norms.append(f"{inputs[0].stride()} {y.stride()}"))
    x = torch.randn(1, 32, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    time = torch.randn(1, 8, dtype=torch.float64)
    with _Layouts() as layouts:
        y = block(x, time)
        gradient = torch.randn_like(y)
        y.backward(gradient)
    assert layouts.channels_last == [False, False] + [True] * (out_channels != 32)  # the skip is 1x1
    planes = (16 * out_channels, 16, 4, 1)
    assert norms == [f"{planes} {planes}"]
    assert y.is_contiguous(memory_format=torch.channels_last)
    found = {name: parameter.grad for name, parameter in block.named_parameters()} | {"x": x.grad}
    block.zero_grad()
    block.to(memory_format=torch.channels_last)  # then nothing is converted
    plain = x.detach().clone().requires_grad_()
    expected = block(plain, time)
    expected.backward(gradient)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        found, {name: parameter.grad for name, parameter in block.named_parameters()} | {"x": plain.grad}
    )
