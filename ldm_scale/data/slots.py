"""Which part of each micro-batch one loader process makes, and what stands there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ldm_scale.data.order import Numbers, micro_batches
from ldm_scale.data.stream import Stream

_LOCATED_AT_ONCE = 4096  # positions: the order is computed for many at a time


@dataclass(frozen=True)
class StreamSettings:
    """Which part of the global stream a rank reads. All counts are images."""

    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    start_image: int = 0
    end_image: int | None = None  # None: endless


class Slot(NamedTuple):
    """What one process makes of one micro-batch: its positions, and what stands there. Shapes: (n,) each."""

    positions: range
    samples: Numbers
    epochs: Numbers
    pools: Numbers
    places: Numbers  # positions in the pools' own streams


class SlotSource:
    """Iterable over the slots of this process."""

    def __init__(self, settings: StreamSettings, stream: Stream) -> None:
        self._settings, self._stream = settings, stream

    def __call__(self) -> Iterator[Slot]:
        waiting: list[range] = []
        count = 0
        for positions in own_positions(self._settings):
            waiting.append(positions)
            count += 1 + len(positions)  # slots are counted too: a process may have a share of no batch
            if count >= _LOCATED_AT_ONCE:
                yield from self._located(waiting)
                waiting, count = [], 0
        yield from self._located(waiting)

    def _located(self, waiting: list[range]) -> Iterator[Slot]:
        if not waiting:
            return
        found = self._stream.locate(np.concatenate([np.arange(slot.start, slot.stop) for slot in waiting]))
        ends = np.cumsum([len(slot) for slot in waiting])[:-1]
        for positions, *columns in zip(waiting, *(np.split(column, ends) for column in found), strict=True):
            yield Slot(positions, *columns)


def own_positions(settings: StreamSettings) -> Iterator[range]:
    """This process's positions in each micro-batch of its rank."""
    number, of = loader_process()
    index = settings.start_image // settings.global_batch
    while own := micro_batches(
        index, settings.global_batch, settings.micro_batch, settings.rank, settings.world_size, settings.end_image
    ):
        for positions in own:
            yield _share(positions, number, of)
        index += 1


def own_slots(settings: StreamSettings) -> NDArray[np.bool_]:
    """Which slots of a whole global batch this process fills."""
    number, of = loader_process()
    own = np.zeros(settings.global_batch, dtype=bool)
    for positions in micro_batches(0, settings.global_batch, settings.micro_batch, settings.rank, settings.world_size):
        share = _share(positions, number, of)
        own[share.start : share.stop] = True
    return own


def loader_process() -> tuple[int, int]:
    """(number, how many) of this process among its rank's loader processes."""
    worker = torch.utils.data.get_worker_info()
    return (worker.id, worker.num_workers) if worker is not None else (0, 1)


def _share(positions: range, number: int, of: int) -> range:
    """The part of a micro-batch that one of so many processes makes."""
    start, count = positions.start, len(positions)
    return range(start + count * number // of, start + count * (number + 1) // of)
