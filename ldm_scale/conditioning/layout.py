"""Bounding boxes as tokens through a transformer that is trained jointly with the UNet.

Each object is three tokens: its class, and the cells of a square grid that hold its top-left and its bottom-right
corner; `max_objects` of them, then the two corners of the crop (arXiv:2112.10752, appendix E.2.1). The grid lies on the
whole picture, for objects and crop alike, mirrored where the picture is: an object keeps its cells whatever square of
it is shown. Classes and cells share the numbers from 0, the last number says "none".

Objects come in order of falling area. The sequence is then a function of the set of objects: the user's order means
nothing, no random draw is needed, and of too many objects the smallest are left out. (The paper's code shuffles
anew each time and leaves out any.)
"""

from __future__ import annotations

from math import isqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm_scale.conditioning.base import Condition, Conditions, Tools
from ldm_scale.conditioning.transformer import TokenTransformer
from ldm_scale.config.schema import LayoutConditioningConfig
from ldm_scale.data.annotations import Box, Layout, SceneObject
from ldm_scale.errors import ConfigError
from ldm_scale.telemetry.log import say_once

TOKENS_PER_OBJECT = 3
CROP_TOKENS = 2


class LayoutCondition(Condition):
    """tau_theta for boxes. `truncated` counts the layouts of which `prepare` left objects out so far."""

    role: ClassVar[Literal["context", "spatial"]] = "context"

    def __init__(self, config: LayoutConditioningConfig) -> None:
        super().__init__(config.width, config.drop_probability)
        self.config = config
        self.max_tokens = TOKENS_PER_OBJECT * config.max_objects + CROP_TOKENS
        self.side = grid_side(config.num_tokens)
        self.truncated = 0
        self.encoder = TokenTransformer(
            config.num_tokens, self.max_tokens, config.width, config.depth, config.num_heads, config.head_dim
        )

    @property
    def none(self) -> int:
        """The token that stands where there is no object, and in all places of the null."""
        return self.config.num_tokens - 1

    def tokens(self, layout: Layout) -> list[int]:
        """The `max_tokens` tokens of a layout.

        Raises: ConfigError if an object's class or box, or the crop, cannot be.
        """
        for given in layout.objects:
            self._check(given)
        _check_box(layout.crop, "crop")
        objects = sorted(layout.objects, key=lambda o: (-_area(o.box), o.label, o.box))
        if len(objects) > self.config.max_objects:
            self.truncated += 1
            say_once(
                "truncated layouts",
                f"a layout of {len(objects)} objects, where conditioning.layout.max_objects={self.config.max_objects}: "
                "the smallest are left out (said once; all such layouts are counted)",
            )
        tokens = [token for o in objects[: self.config.max_objects] for token in (o.label, *self._corners(o.box))]
        padding = [self.none] * (self.max_tokens - CROP_TOKENS - len(tokens))
        return [*tokens, *padding, *self._corners(layout.crop)]

    def prepare(self, y: Conditions, tools: Tools) -> Tensor:
        """Tokens. Shapes: returns (B, max_tokens) int64."""
        if y.layouts is None:
            raise ConfigError(
                "no layouts: the model is conditioned on boxes of objects; give one layout per image (an empty one, if "
                "there is nothing to place)"
            )
        return tools.put(torch.tensor([self.tokens(layout) for layout in y.layouts]))

    def null(self, like: Tensor) -> Tensor:
        """None in all places, the crop's too: an empty scene still says which part of the picture is shown."""
        return like.new_full(like.shape, self.none)

    def example(self, num_images: int, size: tuple[int, int]) -> Tensor:
        """See `Condition.example`."""
        return torch.zeros(num_images, self.max_tokens, dtype=torch.int64)

    def forward(self, inputs: Tensor, size: tuple[int, int]) -> Tensor:
        """Context. Shapes: tokens (B, max_tokens) to (B, max_tokens, width)."""
        return self.encoder(inputs)  # type: ignore[no-any-return]

    def _corners(self, box: Box) -> tuple[int, int]:
        """Tokens of the top-left and the bottom-right corner."""
        left, top, right, bottom = (round(fraction * (self.side - 1)) for fraction in box)
        return top * self.side + left, bottom * self.side + right

    def _check(self, given: SceneObject) -> None:
        if not 0 <= given.label < self.config.num_classes:
            raise ConfigError(
                f"object of class {given.label}: conditioning.layout.num_classes={self.config.num_classes} numbers "
                f"them from 0 to {self.config.num_classes - 1}; give one of these, or train with as many as the data "
                "have"
            )
        _check_box(given.box, f"object of class {given.label}")


def grid_side(num_tokens: int) -> int:
    """Cells along a side of the largest grid whose cells leave the last token free for "none"."""
    return isqrt(num_tokens - 1)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _check_box(box: Box, what: str) -> None:
    left, top, right, bottom = box
    # Written so that a NaN fails too.
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ConfigError(
            f"{what}: box {list(box)} is not within the image or has no area; give left, top, right, bottom as "
            "fractions of the image, 0 <= left < right <= 1 and 0 <= top < bottom <= 1"
        )
