"""The webdataset pipeline of one loader process: slots -> usable samples -> its part of each micro-batch.

Every process makes a part of every micro-batch, the w-th of n equal ones, so that it reads the same lanes of the order
all along (data/order.py) and a micro-batch is ready after a n-th of the time. A loader without processes is the only
one of one. torch hands the parts over in turn, and data/loader.py joins them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds

from ldm_scale.data.annotations import MAP, MAP_EXTENSION, TEXT
from ldm_scale.data.batch import Batch, collate
from ldm_scale.data.decode import DecodedSample, DecodeSettings, decode_sample
from ldm_scale.data.latents import CONTEXTS
from ldm_scale.data.order import Numbers, micro_batches
from ldm_scale.data.policy import BadRecord, BadSample, ConsecutiveLimit, Quarantine
from ldm_scale.data.shards import Dataset, UnreadableSample
from ldm_scale.data.stream import Stream

_LOCATED_AT_ONCE = 1024  # positions: the order is computed for many at a time


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
        for positions in self._positions():
            waiting.append(positions)
            count += 1 + len(positions)  # slots are counted too: a process may have a share of no batch
            if count >= _LOCATED_AT_ONCE:
                yield from self._located(waiting)
                waiting, count = [], 0
        yield from self._located(waiting)

    def _positions(self) -> Iterator[range]:
        settings = self._settings
        worker = torch.utils.data.get_worker_info()
        number, of = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        index = settings.start_image // settings.global_batch
        while own := micro_batches(
            index, settings.global_batch, settings.micro_batch, settings.rank, settings.world_size, settings.end_image
        ):
            for positions in own:
                start, count = positions.start, len(positions)
                yield range(start + count * number // of, start + count * (number + 1) // of)
            index += 1

    def _located(self, waiting: list[range]) -> Iterator[Slot]:
        if not waiting:
            return
        found = self._stream.locate(np.concatenate([np.arange(slot.start, slot.stop) for slot in waiting]))
        ends = np.cumsum([len(slot) for slot in waiting])[:-1]
        for positions, *columns in zip(waiting, *(np.split(column, ends) for column in found), strict=True):
            yield Slot(positions, *columns)


class SlotReader:
    """Callable that reads and decodes the samples of a slot, putting others in the place of bad ones."""

    def __init__(
        self,
        dataset: Dataset,
        stream: Stream,
        settings: DecodeSettings,
        max_consecutive_bad: int,
        quarantine: Quarantine,
    ) -> None:
        self._dataset, self._stream, self._quarantine = dataset, stream, quarantine
        self._settings = {pool.size: replace(settings, size=pool.size) for pool in stream.pools}
        self._vocabulary = dataset.vocabulary
        optional = {MAP: MAP_EXTENSION, TEXT: CONTEXTS}
        self._unwanted = frozenset(member for name, member in optional.items() if name not in settings.annotations)
        self._limit = ConsecutiveLimit(max_consecutive_bad)

    def __call__(self, slot: Slot) -> Batch:
        bad: list[BadRecord] = []
        settings = self._settings[self._stream.size_at(slot.positions.start)]
        columns = (slot.samples.tolist(), slot.epochs.tolist(), slot.pools.tolist())
        samples = [
            self._usable(position, sample, epoch, pool, settings, bad)
            for position, sample, epoch, pool in zip(slot.positions, *columns, strict=True)
        ]
        return collate(samples, bad, settings)

    def _usable(
        self, position: int, sample: int, epoch: int, pool: int, settings: DecodeSettings, bad: list[BadRecord]
    ) -> DecodedSample:
        """The sample of a position or the first usable replacement; what was skipped goes to `bad`."""
        skipped: list[BadRecord] = []
        while True:
            try:
                decoded = self._decoded(position, sample, epoch, settings)
            except BadSample as error:
                record = self._dataset.bad_record(sample, str(error), position)
                skipped.append(record)
                self._limit.bad(record)
                sample = self._stream.replacement_at(position, pool, len(skipped))
            else:
                self._limit.good()
                bad += [record._replace(substitute=decoded.key) for record in skipped]
                return decoded

    def _decoded(self, position: int, sample: int, epoch: int, settings: DecodeSettings) -> DecodedSample:
        """The sample, of a cached one moments of the variant that it has in this epoch alone.

        Raises: BadSample if its shard is in quarantine, it cannot be read or does not decode.
        """
        dataset, latents = self._dataset, self._dataset.latents
        self._quarantine.check(dataset.locate(sample)[0], position)
        try:
            unwanted = self._unwanted
            if latents is not None:
                unwanted |= latents.others(latents.variant(settings, epoch, dataset.key(sample)))
            raw = dataset.read(sample, leave_out=unwanted)
        except UnreadableSample as error:
            raise BadSample(error.reason) from None
        return decode_sample(raw, settings, self._vocabulary, position, epoch, latents)


def build_pipeline(reader: SlotReader, settings: StreamSettings, stream: Stream) -> wds.DataPipeline:
    """An iterable over this process's parts of the micro-batches, in the order of the global stream."""
    return wds.DataPipeline(SlotSource(settings, stream), wds.map(reader))
