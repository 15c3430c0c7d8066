"""Inpainting: the latents of the image without its hole, and the hole, concatenated (arXiv:2112.10752, section 4.5).

The hole is medium grey before encoding. A latent cell counts as hole if any of its pixels is one: its latents hold grey
then, and no hole is too thin to be seen (the nearest pixel alone, as in the paper's code, loses those narrower than f).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_scale.conditioning.base import Condition, Conditions, Tools
from ldm_scale.conditioning.masks import random_mask
from ldm_scale.config.schema import InpaintingConditioningConfig
from ldm_scale.errors import ConfigError
from ldm_scale.telemetry.log import get_logger


class InpaintingCondition(Condition):
    """Latents of the masked image and the mask, (B, c + 1, h, w), both ways. It has no parameters."""

    role = "spatial"

    def __init__(self, config: InpaintingConditioningConfig, latent_channels: int) -> None:
        super().__init__(latent_channels + 1, config.drop_probability)
        self.masks = config.masks
        self._warned: set[str] = set()

    def simulate(self, y: Conditions, x: Tensor, streams: Sequence[np.random.Generator]) -> Conditions:
        """y with x as the images, and random holes unless y holds masks already."""
        masks = y.masks
        if masks is None:
            holes = [random_mask(x.shape[-2], x.shape[-1], self.masks, stream) for stream in streams]
            masks = torch.from_numpy(np.stack(holes))[:, None]
        return dataclasses.replace(y, images=x, masks=masks)

    def prepare(self, y: Conditions, tools: Tools) -> Tensor:
        """Latents of the masked images beside the masks, (B, c + 1, h, w)."""
        if y.images is None or y.masks is None:
            missing = "image" if y.images is None else "mask"
            raise ConfigError(
                f"conditioning.inpainting needs an image and a mask, and there is no {missing}; give both"
            )
        assert tools.encode is not None, "inpainting encodes its images"
        check_masks(y.images, y.masks)
        self._warn_about_extremes(y.masks)
        images = tools.put(y.images).float()
        hole = tools.put(y.masks).float()
        latents = tools.encode(images * (1 - hole)).float()
        return torch.cat([latents, F.adaptive_max_pool2d(hole, latents.shape[-2:])], dim=1)

    def null(self, like: Tensor) -> Tensor:
        """Nothing is known: hole everywhere, beside latents of zero (not those of a grey image: no encoder here)."""
        result = torch.zeros_like(like)
        result[:, -1:] = 1
        return result

    def example(self, num_images: int, size: tuple[int, int]) -> Tensor:
        """See `Condition.example`."""
        return torch.zeros(num_images, self.width, *size)

    def forward(self, inputs: Tensor, size: tuple[int, int]) -> Tensor:
        """The inputs."""
        if inputs.shape[-2:] != size:
            height, width = inputs.shape[-2:]
            raise ConfigError(
                f"the image to inpaint has latents of {height}x{width}, the sample {size[0]}x{size[1]}; sample at the "
                "image's size, or resize the image and its mask"
            )
        return inputs

    def _warn_about_extremes(self, masks: Tensor) -> None:
        shares = masks.float().flatten(start_dim=1).mean(dim=1)
        for share, message in (
            (1.0, "an inpainting mask is 1 everywhere: nothing of its image is kept, all of it is generated"),
            (0.0, "an inpainting mask is 0 everywhere: it has no hole, and its image stays as it is"),
        ):
            if message not in self._warned and bool((shares == share).any()):
                self._warned.add(message)
                get_logger().warning(message)


def check_masks(images: Tensor, masks: Tensor) -> None:
    """Nothing, if masks are 0 and 1, one channel each, in their images' size.

    Raises: ConfigError.
    """
    if masks.ndim != 4 or masks.shape[1] != 1 or masks.shape[0] != images.shape[0]:
        raise ConfigError(
            f"inpainting masks of shape {tuple(masks.shape)} for images of shape {tuple(images.shape)}: must be "
            "(images, 1, height, width); give one channel per image"
        )
    if masks.shape[-2:] != images.shape[-2:]:
        (height, width), (rows, columns) = masks.shape[-2:], images.shape[-2:]
        raise ConfigError(
            f"inpainting mask of {height}x{width} pixels for an image of {rows}x{columns}: must have the image's "
            "size; resize it with nearest neighbours"
        )
    other = masks[(masks != 0) & (masks != 1)]
    if len(other):
        raise ConfigError(
            f"inpainting mask with the value {float(other[0]):g}: must be 1 in the hole and 0 where the image is "
            "known; cut it at a threshold"
        )


def compose_inpainted(sample: Tensor, image: Tensor, mask: Tensor, feather: int = 0) -> Tensor:
    """The image with its hole filled from the sample; known pixels farther than `feather` from it stay exactly.

    The fade lies outside of the hole, where both are pictures of the same: inside, the image may hold anything.
    Shapes: pixels (B, 3, H, W), mask (B, 1, H, W); returns (B, 3, H, W).
    Units: feather in pixels.
    Raises: ConfigError if sizes differ.
    """
    if sample.shape != image.shape:
        raise ConfigError(
            f"sample of shape {tuple(sample.shape)} for an image of shape {tuple(image.shape)}: must be the same; "
            "sample at the image's size"
        )
    check_masks(image, mask)
    hole = mask.to(sample.device, sample.dtype)
    weight = grown = hole
    for _ in range(feather):
        grown = F.max_pool2d(grown, kernel_size=3, stride=1, padding=1)
        weight = weight + grown
    # `where`, not the sum alone: arithmetic would round pixels that are to stay.
    image = image.to(sample.device, sample.dtype)
    mixed = torch.lerp(image, sample, weight / (feather + 1))
    return torch.where(weight == 0, image, mixed)
