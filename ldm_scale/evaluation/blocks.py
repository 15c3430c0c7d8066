"""Images to measure, cut into blocks of neighbours: what a rank is given at once.

Blocks depend on the order of evaluation and their size alone, never on how many ranks there are: the same images go
through the networks together whoever measures them, so that figures are the same bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm_scale.data.decode import DecodeSettings
from ldm_scale.data.policy import BadRecord, BadSampleLog
from ldm_scale.errors import DataError

_DIGEST_BYTES = 16
ImagesT = TypeVar("ImagesT")


@dataclass(frozen=True, eq=False)
class Part:
    """What was measured of one block: rows and sums as tensors on the CPU, and values as JSON has them."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins so, by the rest of it."""
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True, eq=False)
class Block(Generic[ImagesT]):
    """Neighbours in the order of evaluation, as far as they can be used. `images` is None if none of them can."""

    number: int
    numbers: list[int]  # places of its images in the order of evaluation
    images: ImagesT | None
    digests: Tensor  # (len(numbers), 16) bytes: hash of each image's 8-bit pixels
    bad: list[BadRecord]

    @property
    def census(self) -> Part:
        """Which images came, and which did not."""
        tensors = {"images.numbers": torch.tensor(self.numbers, dtype=torch.int64), "images.digests": self.digests}
        return Part(tensors, {"bad": [[record.key, record.reason] for record in self.bad]})


def pixel_digest(pixels: NDArray[np.uint8]) -> Tensor:
    """Hash of an image's 8-bit pixels. Shapes: (H, W, 3); returns (16,) bytes."""
    digest = blake2b(pixels.tobytes(), digest_size=_DIGEST_BYTES).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)


def stacked_digests(digests: list[Tensor]) -> Tensor:
    """(n, 16) bytes of n hashes, which may be none."""
    return torch.stack(digests) if digests else torch.empty(0, _DIGEST_BYTES, dtype=torch.uint8)


class MeasuredImages(ABC, Generic[ImagesT]):
    """Images in blocks. Iterable once over the images of all blocks in their order.

    What came is known once all blocks' censuses were taken: `bad` is what was left out, `num_images` what came
    (`num_kept` of them from an earlier start), `numbers` the places of these in the order, `pixels_digest` a hash of
    their pixels.
    """

    def __init__(self, order: list[int], batch_size: int, settings: DecodeSettings, asked: str | None = None) -> None:
        self.num_images = self.num_kept = 0
        self._asked = asked  # the option that asked for so many images, with its value
        self.numbers: list[int] = []
        self.bad = BadSampleLog()
        self._order, self._batch_size, self._settings = order, batch_size, settings
        self._hash = blake2b(digest_size=_DIGEST_BYTES)

    @property
    def wanted(self) -> int:
        """How many were asked for."""
        return len(self._order)

    @property
    def order(self) -> list[int]:
        """Numbers of the images, in the order in which they are measured."""
        return list(self._order)

    @property
    def pixels_digest(self) -> str:
        """Hash of the hashes of the images' 8-bit pixels, in their order."""
        return self._hash.hexdigest()

    @property
    def num_blocks(self) -> int:
        """Blocks of all images."""
        return -(-len(self._order) // self._batch_size)

    def places(self, block: int) -> range:
        """Places of a block's images in the order, of those that cannot be used too."""
        begin = block * self._batch_size
        return range(begin, min(begin + self._batch_size, len(self._order)))

    @abstractmethod
    def read(self, blocks: Iterable[int]) -> Iterator[Block[ImagesT]]:
        """These blocks, one by one."""

    def check(self, census: Part) -> None:
        """Nothing, if a block may count as measured.

        Raises: DataError if an image of it cannot be used, and a number of images was asked for.
        """
        if self._asked is not None and census.values["bad"]:
            bad = BadSampleLog()
            bad.add(BadRecord(key, reason) for key, reason in census.values["bad"])
            raise DataError(
                f"{self._asked}: of these images {self.wanted - len(census.values['bad'])} can be used at most "
                f"({bad.describe()}), and figures depend on the number; make the others again, or leave "
                f"{self._asked.split()[0]} out to measure what can be used"
            )

    def take(self, census: Part, was_kept: bool = False) -> None:
        """Nothing; counts what came of a block, of which all before it were counted."""
        numbers = census.tensors["images.numbers"].tolist()
        self.num_images += len(numbers)
        self.num_kept += len(numbers) * was_kept
        self.numbers += numbers
        self.bad.add(BadRecord(key, reason) for key, reason in census.values["bad"])
        self._hash.update(census.tensors["images.digests"].numpy().tobytes())

    def __iter__(self) -> Iterator[ImagesT]:
        for block in self.read(range(self.num_blocks)):
            self.take(block.census)
            if block.images is not None:
                yield block.images
