"""One interface for all of tau_theta: from what the user gives (y) to the context and the spatial conditioning.

A kind of conditioning is a `Condition`: a part of the trained model (so that one engine shards it), with three steps
around its network. `simulate` makes what training itself makes from an image (a low-resolution version, a mask);
`prepare` turns y into one tensor per kind, the network's input; `null` is the input that says "not given", put in the
place of dropped ones in training and used by the unconditional branch of guidance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ldm_scale.data.annotations import Layout
from ldm_scale.engine.copies import put_on

Inputs = dict[str, Tensor]  # section of the configuration -> what its network takes, one row per image


@dataclass(frozen=True, eq=False)
class Conditions:
    """y of a batch of images. What no kind of the model asks for may stay None."""

    captions: Sequence[str] | None = None
    text_contexts: Tensor | None = None  # (B, M, d): frozen_text's output, where a cache holds it
    classes: Tensor | None = None  # (B,) int64; -1 = no class
    layouts: Sequence[Layout] | None = None
    maps: Tensor | None = None  # (B, H, W) uint8 labels; 255 = unknown
    low_resolution: Tensor | None = None  # (B, 3, H / factor, W / factor) in [-1, 1]
    images: Tensor | None = None  # (B, 3, H, W) in [-1, 1]: what is to be inpainted
    masks: Tensor | None = None  # (B, 1, H, W): 1 where the image is to be filled, 0 where it is known

    def rows(self, part: slice) -> Conditions:
        """y of some of the images."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return Conditions(**{name: None if values is None else values[part] for name, values in given.items()})


@dataclass(frozen=True)
class Tools:
    """Frozen networks that `prepare` may need, and where its results shall lie."""

    device: torch.device
    encode: Callable[[Tensor], Tensor] | None = None  # pixels (B, 3, H, W) -> latents (B, c, H/f, W/f): modes
    encode_text: Callable[[Sequence[str]], Tensor] | None = None  # captions -> frozen_text's context (B, M, d)

    def put(self, x: Tensor) -> Tensor:
        """See `put_on`; where results shall lie."""
        return put_on(self.device, x)


class Condition(nn.Module, ABC):
    """One kind of conditioning."""

    role: ClassVar[Literal["context", "spatial"]]

    def __init__(self, width: int, drop_probability: float) -> None:
        super().__init__()
        self.width = width  # context: d_tau; spatial: channels added to the UNet's input
        self.drop_probability = drop_probability

    def simulate(self, y: Conditions, x: Tensor, streams: Sequence[np.random.Generator]) -> Conditions:
        """y with what training makes itself of the images x (B, 3, H, W), by one random stream per image."""
        return y

    @abstractmethod
    def prepare(self, y: Conditions, tools: Tools) -> Tensor:
        """The network's input, one row per image, on `tools.device`.

        Raises: ConfigError if y lacks it, or holds what cannot be used.
        """

    @abstractmethod
    def null(self, like: Tensor) -> Tensor:
        """The input that stands for "not given", in the shape of `like` (rows of `prepare`)."""

    @abstractmethod
    def example(self, num_images: int, size: tuple[int, int]) -> Tensor:
        """Some input for latents of size (h, w), on the current default device: to count and to time with."""

    @abstractmethod
    def forward(self, inputs: Tensor, size: tuple[int, int]) -> Tensor:
        """Context (B, M, width), or spatial conditioning (B, width, h, w) for latents of that size (h, w)."""


@dataclass(frozen=True, eq=False)
class Conditioned:
    """What the UNet takes: context (B, M, d_tau) and spatial conditioning (B, C, h, w); None where there is none."""

    context: Tensor | None
    spatial: Tensor | None


class Conditioner(nn.ModuleDict):
    """tau_theta: the kinds of a model by the names of their sections."""

    @property
    def conditions(self) -> dict[str, Condition]:
        """The kinds, in the order in which their outputs are concatenated."""
        return dict(self.items())  # type: ignore[arg-type]

    @property
    def context_dim(self) -> int | None:
        """d_tau, None without context."""
        return next((c.width for c in self.conditions.values() if c.role == "context"), None)

    @property
    def spatial_channels(self) -> int:
        """Channels that the UNet takes beside the latents."""
        return sum(c.width for c in self.conditions.values() if c.role == "spatial")

    def simulate(self, y: Conditions, x: Tensor, streams: Sequence[np.random.Generator]) -> Conditions:
        """See `Condition.simulate`; every kind draws from the same streams, in order."""
        for condition in self.conditions.values():
            y = condition.simulate(y, x, streams)
        return y

    def prepare(self, y: Conditions, tools: Tools) -> Inputs:
        """See `Condition.prepare`."""
        return {name: condition.prepare(y, tools) for name, condition in self.conditions.items()}

    def example(self, num_images: int, size: tuple[int, int]) -> Inputs:
        """See `Condition.example`."""
        return {name: condition.example(num_images, size) for name, condition in self.conditions.items()}

    def null_inputs(self, inputs: Mapping[str, Tensor]) -> Inputs:
        """Inputs of the unconditional branch: null where the kind was trained without, as they are elsewhere."""
        return {
            name: condition.null(inputs[name]) if condition.drop_probability > 0 else inputs[name]
            for name, condition in self.conditions.items()
        }

    @property
    def num_uniforms(self) -> int:
        """Uniform numbers that `drop` takes per image: one of each kind, then a shared one if several are dropped."""
        return len(self) + self._drops_together

    @property
    def _drops_together(self) -> bool:
        return sum(condition.drop_probability > 0 for condition in self.conditions.values()) > 1

    def drop(self, inputs: Mapping[str, Tensor], uniforms: Tensor) -> Inputs:
        """Inputs in which each kind's null stands in a share of its drop probability p of the rows.

        A kind that is dropped alone goes where its own number falls below p. Of several, each goes where the shared
        number falls below p / 2, and elsewhere by its own number as often as makes p in all: independent numbers would
        leave guidance's unconditional branch, which has none of them, next to untrained.
        Shapes: uniforms (B, num_uniforms) in [0, 1).
        Source: arXiv:2211.09800, section 3.2.1 (two kinds: one, the other or both in 5% of the images each).
        """
        assert uniforms.shape[1] == self.num_uniforms, f"{uniforms.shape[1]} numbers, not {self.num_uniforms}"
        result = dict(inputs)
        for column, (name, condition) in enumerate(self.conditions.items()):
            given, p = inputs[name], condition.drop_probability
            if self._drops_together:
                dropped = (uniforms[:, -1] < p / 2) | (uniforms[:, column] < p / 2 / (1 - p / 2))
            else:
                dropped = uniforms[:, column] < p
            if dropped.any():
                where = put_on(given.device, dropped).view(-1, *(1,) * (given.ndim - 1))
                result[name] = torch.where(where, condition.null(given), given)
        return result

    def forward(self, inputs: Mapping[str, Tensor], size: tuple[int, int]) -> Conditioned:
        """Context and spatial conditioning for latents of size (h, w)."""
        outputs: dict[str, list[Tensor]] = {"context": [], "spatial": []}
        for name, condition in self.conditions.items():
            outputs[condition.role].append(condition(inputs[name], size))
        context, spatial = (torch.cat(parts, dim=1) if parts else None for parts in outputs.values())
        return Conditioned(context, spatial)
