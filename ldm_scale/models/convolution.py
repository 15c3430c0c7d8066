"""Convolution that does not copy a large weight to compute a few pixels."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """torch's convolution, which computes small features with many channels in the weight's layout on a CPU.

    Activations lie in channels_last and weights in torch's order, since ZeRO flattens them. Of such a pair a CPU copies
    the weight into the activations' layout in the forward and in the backward pass, and the weight's gradient back.
    Up to twice as many pixels in the batch as channels it costs less to copy the activations.
    """

    def forward(self, x: Tensor, any_layout: bool = False) -> Tensor:
        """Shapes: (B, C, H, W) to (B, O, H', W'), in x's layout; with `any_layout` in the one it was computed in."""
        if x.is_contiguous() or not self._weight_is_larger(x):
            return super().forward(x)
        y = super().forward(cast(Tensor, _InPlanes.apply(x)))
        return y if any_layout else y.contiguous(memory_format=torch.channels_last)

    def _weight_is_larger(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or not self.weight.is_contiguous() or torch.compiler.is_compiling():
            return False
        # Measured with one thread, fp32 and bf16 (docs/decisions.md). Never by whether gradients are asked for: a block
        # that is computed again would draw its dropout in another order.
        return x.shape[0] * x.shape[2] * x.shape[3] <= 2 * min(self.in_channels, self.out_channels)


class _InPlanes(torch.autograd.Function):
    """x in torch's order, its gradient in channels_last as x; `contiguous` would leave that as it comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous(memory_format=torch.channels_last)
