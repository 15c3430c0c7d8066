"""Class labels: one learned embedding, a context of one token (arXiv:2112.10752, appendix E.2.1)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm_scale.conditioning.base import Condition, Conditions, Tools
from ldm_scale.config.schema import ClassConditioningConfig
from ldm_scale.errors import ConfigError

NO_CLASS = -1


class ClassCondition(Condition):
    """tau_theta for classes; the row after the last class is the null, and what images without a class get."""

    role: ClassVar[Literal["context", "spatial"]] = "context"

    def __init__(self, config: ClassConditioningConfig) -> None:
        super().__init__(config.width, config.drop_probability)
        self.num_classes = config.num_classes
        self.embedding = nn.Embedding(config.num_classes + 1, config.width)

    def prepare(self, y: Conditions, tools: Tools) -> Tensor:
        """Rows of the embedding. Shapes: returns (B,) int64."""
        if y.classes is None:
            raise ConfigError("no classes: the model is conditioned on them; give one number per image (-1 = none)")
        classes = y.classes.long()
        outside = classes[(classes < NO_CLASS) | (classes >= self.num_classes)]
        if len(outside):
            raise ConfigError(
                f"class {int(outside[0])}: conditioning.classes.num_classes={self.num_classes} numbers them from 0 to "
                f"{self.num_classes - 1}, and -1 is none; give one of these, or train with as many as the data have"
            )
        return tools.put(classes.where(classes != NO_CLASS, self.num_classes))

    def null(self, like: Tensor) -> Tensor:
        """The row after the last class."""
        return like.new_full(like.shape, self.num_classes)

    def example(self, num_images: int, size: tuple[int, int]) -> Tensor:
        """See `Condition.example`."""
        return torch.zeros(num_images, dtype=torch.int64)

    def forward(self, inputs: Tensor, size: tuple[int, int]) -> Tensor:
        """Context. Shapes: (B,) to (B, 1, width)."""
        return self.embedding(inputs)[:, None]  # type: ignore[no-any-return]
