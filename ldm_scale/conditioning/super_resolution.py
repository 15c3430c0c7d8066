"""Super-resolution: the small image itself, concatenated (arXiv:2112.10752, section 4.4).

Where the enlargement's factor is the autoencoder's f, small image and latents have one size; where it is larger, the
image is enlarged to the latents' by bicubic. Training makes the small image from the large one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_scale.conditioning.base import Condition, Conditions, Tools
from ldm_scale.conditioning.degradation import degrade, reduce_bicubic
from ldm_scale.config.schema import LowResolutionConditioningConfig
from ldm_scale.engine.copies import put_on
from ldm_scale.errors import ConfigError

_CHANNELS = 3


class LowResolutionCondition(Condition):
    """Small images (B, 3, H / factor, W / factor) to (B, 3, h, w). It has no parameters."""

    role = "spatial"

    def __init__(self, config: LowResolutionConditioningConfig) -> None:
        super().__init__(_CHANNELS, config.drop_probability)
        self.factor, self.degradation = config.factor, config.degradation

    def image_size(self, low_resolution: Tensor) -> tuple[int, int]:
        """(H, W) of the images that small ones stand for."""
        return low_resolution.shape[-2] * self.factor, low_resolution.shape[-1] * self.factor

    def simulate(self, y: Conditions, x: Tensor, streams: Sequence[np.random.Generator]) -> Conditions:
        """y with x made small, unless y holds small images already."""
        if y.low_resolution is not None:
            return y
        height, width = x.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ConfigError(
                f"images of {height}x{width} pixels do not divide by conditioning.low_resolution.factor="
                f"{self.factor}; set data.resolution to a multiple of it"
            )
        if self.degradation == "bicubic":
            small = reduce_bicubic(x, self.factor)
        else:
            assert len(x) == len(streams), f"{len(x)} images, {len(streams)} streams"
            # One thread an image: its tensors are too small to be worth several.
            with ThreadPoolExecutor() as pool:
                degraded = list(pool.map(degrade, x.cpu(), [self.factor] * len(x), streams))
            small = put_on(x.device, torch.stack(degraded))
        return dataclasses.replace(y, low_resolution=small)

    def prepare(self, y: Conditions, tools: Tools) -> Tensor:
        """The small images, (B, 3, H / factor, W / factor)."""
        small = y.low_resolution
        if small is None:
            raise ConfigError("conditioning.low_resolution needs the image that is to be enlarged, and there is none")
        if small.ndim != 4 or small.shape[1] != _CHANNELS:
            raise ConfigError(
                f"low-resolution images of shape {tuple(small.shape)}: must be (images, 3, height, width); give RGB"
            )
        if y.images is not None and y.images.shape[-2:] != self.image_size(small):
            (height, width), (rows, columns) = small.shape[-2:], self.image_size(small)
            raise ConfigError(
                f"low-resolution image of {height}x{width} pixels beside an image of {y.images.shape[-2]}x"
                f"{y.images.shape[-1]}: conditioning.low_resolution.factor={self.factor} makes it {rows}x{columns}; "
                "give both in sizes that fit"
            )
        return tools.put(small).float()

    def null(self, like: Tensor) -> Tensor:
        """Medium grey."""
        return torch.zeros_like(like)

    def example(self, num_images: int, size: tuple[int, int]) -> Tensor:
        """See `Condition.example`."""
        return torch.zeros(num_images, _CHANNELS, *size)

    def forward(self, inputs: Tensor, size: tuple[int, int]) -> Tensor:
        """The small image in the latents' size."""
        height, width = inputs.shape[-2:]
        if (height, width) == size:
            return inputs
        # A small image larger than the latents cannot be: f is at most `factor`.
        if height * size[1] != width * size[0] or height > size[0]:
            rows, columns = self.image_size(inputs)
            raise ConfigError(
                f"low-resolution image of {height}x{width} pixels for latents of {size[0]}x{size[1]}: "
                f"conditioning.low_resolution.factor={self.factor} enlarges it to {rows}x{columns} pixels; sample at "
                "this size, or give an image of another one"
            )
        return F.interpolate(inputs, size=size, mode="bicubic", antialias=True)
