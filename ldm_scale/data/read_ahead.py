"""Remote samples before they are needed: a chunk of the order is one request, made some micro-batches ahead.

Each process fetches what it will deliver itself, in the blocks of its lanes (data/order.py): neighbours in a shard are
one range, read once, kept until their last sample is delivered. So the ranks together read little more than the data,
a process holds about a block per lane of its own, and a resumed run fetches the rest of the blocks in which it
stopped. Where more processes than lanes share a lane, each fetches its own samples of the chunk alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import AsyncResult, ThreadPool

import numpy as np
from numpy.typing import NDArray

from ldm_scale.data.order import Block, Numbers
from ldm_scale.data.policy import Quarantine
from ldm_scale.data.shards import Dataset, UnreadableSample
from ldm_scale.data.sidecar import BLOCK
from ldm_scale.data.slots import Slot
from ldm_scale.data.stream import Stream

_MAX_GAP = 16 * 1024  # bytes between two samples up to which one request is better than two


@dataclass
class _Range:
    """Neighbouring samples of one shard."""

    shard_number: int
    start: int
    stop: int
    waiting: int = 0  # samples that are still to be delivered
    content: AsyncResult[memoryview] | None = field(default=None, repr=False)  # None: not asked for yet


class ReadAhead:
    """A stage of the pipeline that passes slots on, and holds the bytes of those that come next."""

    def __init__(
        self,
        dataset: Dataset,
        stream: Stream,
        own_slots: Callable[[], NDArray[np.bool_]],
        unwanted: Collection[str],
        quarantine: Quarantine,
        num_ahead: int,
        num_threads: int,
    ) -> None:
        """`own_slots` is asked in the process that reads: which slots of a global batch are its own."""
        self._dataset, self._stream, self._own_slots = dataset, stream, own_slots
        self._unwanted, self._quarantine = unwanted, quarantine
        self._num_ahead, self._num_threads = num_ahead, num_threads
        self._ranges: dict[tuple[int, int], _Range] = {}  # by pool and place in its stream
        self._by_shard: dict[int, list[_Range]] = {}
        self._planned: set[tuple[int, Block]] = set()

    def __call__(self, slots: Iterator[Slot]) -> Iterator[Slot]:
        own = self._own_slots()
        waiting: deque[Slot] = deque()
        # Of daemon threads: nobody waits for a server that stalls when the run is to end.
        with ThreadPool(self._num_threads) as threads:
            for slot in slots:
                self._ask_for(slot, own, threads)
                waiting.append(slot)
                if len(waiting) > self._num_ahead:
                    yield from self._delivered(waiting.popleft())
            while waiting:
                yield from self._delivered(waiting.popleft())

    def get(self, shard_number: int, start: int, stop: int) -> memoryview | None:
        """These bytes of a shard, None if they are not held.

        Raises: UnreadableSample if they could not be fetched.
        """
        for held in self._by_shard.get(shard_number, ()):
            if held.start <= start and stop <= held.stop and held.content is not None:
                return held.content.get()[start - held.start : stop - held.start]
        return None

    def _delivered(self, slot: Slot) -> Iterator[Slot]:
        yield slot
        for place in _places(slot):
            held = self._ranges.pop(place, None)
            if held is None:
                continue
            held.waiting -= 1
            if not held.waiting:
                others = self._by_shard[held.shard_number]
                others.remove(held)
                if not others:
                    del self._by_shard[held.shard_number]

    def _ask_for(self, slot: Slot, own: NDArray[np.bool_], threads: ThreadPool) -> None:
        """Begins to fetch what the slot needs, unless it is on its way."""
        for pool_number in np.unique(slot.pools).tolist():
            rows = slot.pools == pool_number
            order = self._stream.pools[pool_number].order
            places = slot.places[rows]
            for place, block in zip(places.tolist(), order.block_at(places), strict=True):
                if (pool_number, block) not in self._planned:
                    # A lane's earlier blocks have been passed.
                    self._planned = {
                        (pool, known)
                        for pool, known in self._planned
                        if pool != pool_number or known.lane != block.lane or known[::2] > block[::2]
                    }
                    self._planned.add((pool_number, block))
                    self._plan(pool_number, block, place, own)
        for place, position in zip(_places(slot), slot.positions, strict=True):
            held = self._ranges.get(place)
            if held is None or held.content is not None or self._quarantine.holds(held.shard_number, position):
                continue
            held.content = threads.apply_async(self._dataset.fetch, (held.shard_number, held.start, held.stop))

    def _plan(self, pool_number: int, block: Block, first_place: int, own: NDArray[np.bool_]) -> None:
        """Notes the ranges of what this process will deliver of a block, from a place of the pool's stream on."""
        pool = self._stream.pools[pool_number]
        places = pool.order.positions_in(block)
        places = places[(places >= first_place) & own[pool.slots[places % len(pool.slots)]]]
        samples = pool.order.locate(places).samples + pool.first
        shards = self._dataset.shards_of(samples)
        for shard_number in np.unique(shards).tolist():
            if self._dataset.shards[shard_number].is_remote:
                own_rows = shards == shard_number
                self._plan_shard(shard_number, samples[own_rows], [(pool_number, p) for p in places[own_rows].tolist()])

    def _plan_shard(self, shard_number: int, samples: Numbers, places: list[tuple[int, int]]) -> None:
        try:
            sidecar = self._dataset.sidecar(shard_number)
        except UnreadableSample:
            return  # said where the sample is read
        rows = samples - self._dataset.first_sample(shard_number)
        columns = [n for n, extension in enumerate(sidecar.extensions) if extension not in self._unwanted]
        offsets, sizes = sidecar.offsets[rows][:, columns], sidecar.sizes[rows][:, columns]
        there = offsets >= 0
        starts = np.where(there, offsets, np.iinfo(np.int64).max).min(axis=1) - BLOCK
        stops = np.where(there, offsets + sizes, -1).max(axis=1)
        current: _Range | None = None
        order = np.argsort(starts, kind="stable")
        for row, start, stop in zip(order.tolist(), starts[order].tolist(), stops[order].tolist(), strict=True):
            if stop < 0:
                continue
            if current is None or start > current.stop + _MAX_GAP:
                current = _Range(shard_number, start, stop)
                self._by_shard.setdefault(shard_number, []).append(current)
            current.stop = max(current.stop, stop)
            current.waiting += 1
            self._ranges[places[row]] = current


def _places(slot: Slot) -> list[tuple[int, int]]:
    """(pool, place in its stream) of a slot's samples."""
    return list(zip(slot.pools.tolist(), slot.places.tolist(), strict=True))
