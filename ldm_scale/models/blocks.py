"""Convolutional blocks that the UNet and the autoencoder share."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_scale.models.convolution import Conv2d
from ldm_scale.models.fused import GroupNorm

Resampling = Literal["down", "up"]


class ResidualBlock(nn.Module):
    """norm-SiLU-conv twice around a skip connection; the timestep acts at the second norm.

    It shifts the features before that norm or, with `scale_shift`, scales and shifts after it. With `resampling` the
    block halves or doubles the resolution: its branch between the first norm and convolution, its skip alike.
    Source: arXiv:2006.11239, appendix B (the DDPM block, in the form that VQGAN and LDM use); arXiv:2105.05233,
    section 3 (scale and shift, resampling blocks).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_groups: int,
        eps: float,
        time_dim: int | None = None,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resampling: Resampling | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resampling = scale_shift, resampling
        self.norm1 = GroupNorm(norm_groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        time_channels = 2 * out_channels if scale_shift else out_channels
        self.time_projection = nn.Linear(time_dim, time_channels) if time_dim is not None else None
        self.norm2 = GroupNorm(norm_groups, out_channels, eps)
        self.norm2.take_bias(self.conv1)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Shapes: x (B, in, H, W), time (B, time_dim) already through its SiLU; returns (B, out, H', W')."""
        moved = self.time_projection(time) if self.time_projection is not None else None
        h = self.norm1(x)
        if self.resampling is not None:
            h, x = resample(h, self.resampling), resample(x, self.resampling)
        channels_last = h.is_contiguous(memory_format=torch.channels_last)
        h = self.conv1(h, any_layout=True)  # the norm and the second convolution keep what they get
        if self.scale_shift and moved is not None:
            scale, shift = moved.chunk(2, dim=1)
            h = self.norm2(h, scale=scale, shift=shift)
        else:
            h = self.norm2(h, sample_shift=moved)
        h = self.conv2(self.dropout(h))
        if channels_last:
            h = h.contiguous(memory_format=torch.channels_last)
        return add_to(h, x if self.skip is None else self.skip(x))


def resample(x: Tensor, resampling: Resampling) -> Tensor:
    """x at half the resolution (means of 2x2 pixels) or twice (nearest). Shapes: (B, C, H, W) to (B, C, H', W')."""
    if resampling == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def place_biases(network: nn.Module, device: torch.device) -> None:
    """Nothing; biases between a block's first convolution and its norm lie where this kind of device adds them faster.

    For networks that only compute: names in the state dict change with the place.
    """
    for module in network.modules():
        if not isinstance(module, ResidualBlock):
            continue
        if device.type == "cpu" and module.norm2.channel_bias is not None:
            module.norm2.give_bias(module.conv1)
        elif device.type != "cpu" and module.conv1.bias is not None:
            module.norm2.take_bias(module.conv1)


def add_to(own: Tensor, x: Tensor) -> Tensor:
    """own + x; in the memory of `own`, which nobody else needs, where no gradient is asked for.

    A new tensor costs a CPU as much as the addition.
    """
    if torch.is_grad_enabled() or own.dtype != x.dtype:
        return own + x
    return own.add_(x)


class Downsample(nn.Module):
    """Stride-2 3x3 convolution.

    The autoencoder pads only right and below (the asymmetric padding of VQGAN), the UNet on all sides.
    """

    def __init__(self, channels: int, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=2 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) to (B, C, H/2, W/2)."""
        y = self.conv(x)
        if not self.asymmetric:
            return y  # type: ignore[no-any-return]
        # Padded by 2 on all sides, the first row and column are what the asymmetric padding has not; all others are
        # the same. That spares a padded copy of x, of which backward would keep another.
        # Cropped by negative padding: the gradient of a slice would leave channels_last.
        height, width = x.shape[2] // 2, x.shape[3] // 2
        return F.pad(y, (-1, width + 1 - y.shape[3], -1, height + 1 - y.shape[2]))


class Upsample(nn.Module):
    """Nearest-neighbour doubling followed by a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) to (B, C, 2H, 2W)."""
        return self.conv(resample(x, "up"))  # type: ignore[no-any-return]
