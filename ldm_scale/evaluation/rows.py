"""What was measured of each image, from any number of batches and ranks, in the order of the images' numbers.

Meters keep rows and make figures of all of them at once, so figures depend neither on where batches end nor on which
rank measured what: rows of other ranks are taken in before the figures are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm_scale.evaluation.blocks import Part


class Rows:
    """Tensors and lists by name, a row of each for every image. All parts have the same names."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._tensors: dict[str, list[Tensor]] = {}
        self._lists: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._lists

    def add(
        self, numbers: Sequence[int], tensors: Mapping[str, Tensor], lists: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        """Nothing; takes in the rows of some images, which no part before has had.

        Shapes: tensors (len(numbers), ...), on the CPU.
        """
        for name, tensor in tensors.items():
            assert len(tensor) == len(numbers), f"{name}: {len(tensor)} rows of {len(numbers)} images"
            self._tensors.setdefault(name, []).append(tensor)
        for name, values in (lists or {}).items():
            assert len(values) == len(numbers), f"{name}: {len(values)} rows of {len(numbers)} images"
            self._lists.setdefault(name, []).extend(values)
        self._numbers += numbers

    @property
    def part(self) -> Part:
        """All rows, to be sent and kept; lists hold what JSON has. Of no rows: nothing."""
        tensors = {f"rows.{name}": torch.cat(parts) for name, parts in self._tensors.items()}
        return Part(
            tensors | {"numbers": torch.tensor(self._numbers, dtype=torch.int64)},
            {"lists": {name: list(values) for name, values in self._lists.items()}},
        )

    def take(self, part: Part) -> None:
        """Nothing; takes in the rows of a part, if it has any."""
        if "numbers" in part.tensors:
            self.add(part.tensors["numbers"].tolist(), part.named("rows."), part.values["lists"])

    def tensor(self, name: str) -> Tensor:
        """All rows, in the order of the images' numbers."""
        rows = torch.cat(self._tensors[name])
        assert len(rows) == len(self), f"{name}: {len(rows)} rows of {len(self)} images"
        return rows[self._order()]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose name begins so, by the rest of it."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self._tensors if name.startswith(prefix)}

    def values(self, name: str) -> list[Any]:
        """All rows of a list, in the order of the images' numbers."""
        return [self._lists[name][place] for place in self._order().tolist()]

    def _order(self) -> Tensor:
        numbers = torch.tensor(self._numbers)
        assert len(set(self._numbers)) == len(self), "an image was measured twice"
        return numbers.argsort()
