"""Semantic maps as spatial conditioning (arXiv:2112.10752, section 4.3.2).

One-hot labels, averaged over the pixels of each latent cell, then a 1x1 convolution without bias. All three are linear,
so the convolution comes first here, as a table of its columns: no one-hot map exists, and full-sized are `channels`
planes instead of `num_labels`. At powers of two the average is what repeated bilinear halving gives. An unknown pixel
is a zero in the average. The table starts with a deviation of 1, as the latents have; a convolution's usual start
would be 1 / sqrt(3 num_labels).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_scale.conditioning.base import Condition, Conditions, Tools
from ldm_scale.config.schema import SemanticMapConditioningConfig
from ldm_scale.errors import ConfigError

UNKNOWN = 255  # label of a pixel of which nothing is known


class SemanticMapCondition(Condition):
    """Labels (B, H, W) at any resolution to (B, channels, h, w)."""

    role = "spatial"

    def __init__(self, config: SemanticMapConditioningConfig) -> None:
        super().__init__(config.channels, config.drop_probability)
        self.num_labels = config.num_labels
        self.projection = nn.Embedding(config.num_labels + 1, config.channels, padding_idx=config.num_labels)

    def prepare(self, y: Conditions, tools: Tools) -> Tensor:
        """Labels as they are given, (B, H, W)."""
        maps = y.maps
        if maps is None:
            raise ConfigError("conditioning.semantic_map needs a map of labels for each image, and there is none")
        if maps.ndim != 3 or maps.is_floating_point():
            raise ConfigError(
                f"semantic maps of shape {tuple(maps.shape)} and type {_plain(maps)}: must be whole numbers of "
                "(images, height, width); give one channel of labels"
            )
        wrong = maps[((maps < 0) | (maps >= self.num_labels)) & (maps != UNKNOWN)]
        if len(wrong):
            raise ConfigError(
                f"semantic map with label {int(wrong[0])}: labels go from 0 to {self.num_labels - 1} "
                f"(conditioning.semantic_map.num_labels={self.num_labels}), and {UNKNOWN} means unknown; correct the "
                f"map, or mark what has no label as {UNKNOWN}"
            )
        return tools.put(maps)

    def null(self, like: Tensor) -> Tensor:
        """Nothing is known of any pixel."""
        return torch.full_like(like, UNKNOWN)

    def example(self, num_images: int, size: tuple[int, int]) -> Tensor:
        """See `Condition.example`."""
        return torch.zeros(num_images, *size, dtype=torch.uint8)

    def forward(self, inputs: Tensor, size: tuple[int, int]) -> Tensor:
        """The projected shares of the labels in each cell."""
        height, width = inputs.shape[-2:]
        if height * size[1] != width * size[0]:
            raise ConfigError(
                f"semantic map of {height}x{width} pixels for latents of {size[0]}x{size[1]}: must have the same "
                "ratio of height to width; cut or scale the map to the image's"
            )
        labels = inputs.long()
        planes = self.projection(torch.where(labels == UNKNOWN, self.num_labels, labels)).movedim(-1, 1)
        return F.adaptive_avg_pool2d(planes, size)


def _plain(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
