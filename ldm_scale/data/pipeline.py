"""The webdataset pipeline of one loader process: slots -> usable samples -> its part of each micro-batch.

Every process makes a part of every micro-batch, the w-th of n equal ones, so that it reads the same lanes of the order
all along (data/order.py) and a micro-batch is ready after a n-th of the time. A loader without processes is the only
one of one. torch hands the parts over in turn, and data/loader.py joins them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import webdataset as wds

from ldm_scale.config.schema import DataConfig
from ldm_scale.data.annotations import MAP, MAP_EXTENSION, TEXT
from ldm_scale.data.batch import Batch, collate
from ldm_scale.data.decode import DecodedSample, DecodeSettings, decode_sample
from ldm_scale.data.latents import CONTEXTS
from ldm_scale.data.policy import BadSample, ConsecutiveLimit, InQuarantine, Quarantine, SkippedSample
from ldm_scale.data.read_ahead import ReadAhead
from ldm_scale.data.shards import Dataset, HeldBytes, UnreadableSample
from ldm_scale.data.slots import Slot, SlotSource, StreamSettings, own_slots
from ldm_scale.data.stream import Stream


class SlotReader:
    """Callable that reads and decodes the samples of a slot, putting others in the place of bad ones."""

    def __init__(
        self,
        dataset: Dataset,
        stream: Stream,
        settings: DecodeSettings,
        max_consecutive_bad: int,
        quarantine: Quarantine,
        held: HeldBytes | None = None,
    ) -> None:
        self._held = held
        self._dataset, self._stream, self._quarantine = dataset, stream, quarantine
        self._settings = {pool.size: replace(settings, size=pool.size) for pool in stream.pools}
        self._vocabulary = dataset.vocabulary
        self._unwanted = unwanted_members(settings)
        self._limit = ConsecutiveLimit(max_consecutive_bad)

    def __call__(self, slot: Slot) -> Batch:
        bad: list[SkippedSample] = []
        settings = self._settings[self._stream.size_at(slot.positions.start)]
        columns = (slot.samples.tolist(), slot.epochs.tolist(), slot.pools.tolist())
        samples = [
            self._usable(position, sample, epoch, pool, settings, bad)
            for position, sample, epoch, pool in zip(slot.positions, *columns, strict=True)
        ]
        return collate(samples, bad, settings)

    def _usable(
        self, position: int, sample: int, epoch: int, pool: int, settings: DecodeSettings, bad: list[SkippedSample]
    ) -> DecodedSample:
        """The sample of a position or the first usable replacement; what was skipped goes to `bad`."""
        skipped: list[SkippedSample] = []
        while True:
            try:
                decoded = self._decoded(position, sample, epoch, settings)
            except BadSample as error:
                # What was tried in its place is bad too, but left no place of its own.
                record = self._dataset.bad_record(sample, str(error), -1 if skipped else position)
                skipped.append(record)
                if not isinstance(error, InQuarantine):
                    self._limit.bad(record)
                sample = self._stream.replacement_at(position, pool, len(skipped))
            else:
                self._limit.good()
                if skipped:
                    bad += [skipped[0]._replace(substitute=decoded.key), *skipped[1:]]
                return decoded

    def _decoded(self, position: int, sample: int, epoch: int, settings: DecodeSettings) -> DecodedSample:
        """The sample, of a cached one moments of the variant that it has in this epoch alone.

        Raises: BadSample if its shard is in quarantine, it cannot be read or does not decode.
        """
        dataset, latents = self._dataset, self._dataset.latents
        self._quarantine.check(dataset.locate(sample)[0], position)
        try:
            unwanted = self._unwanted
            if latents is not None and len(latents.variants) > 1:
                unwanted |= latents.others(latents.variant(settings, epoch, dataset.key(sample)))
            raw = dataset.read_views(sample, unwanted, self._held)
        except UnreadableSample as error:
            raise BadSample(error.reason) from None
        return decode_sample(raw, settings, self._vocabulary, position, epoch, latents)


def unwanted_members(settings: DecodeSettings) -> frozenset[str]:
    """Extensions that no sample needs, whatever it is."""
    optional = {MAP: MAP_EXTENSION, TEXT: CONTEXTS}
    return frozenset(member for name, member in optional.items() if name not in settings.annotations)


def build_pipeline(
    dataset: Dataset,
    stream: Stream,
    decoding: DecodeSettings,
    part: StreamSettings,
    data: DataConfig,
    quarantine: Quarantine,
) -> wds.DataPipeline:
    """An iterable over this process's parts of the micro-batches, in the order of the global stream."""
    ahead: ReadAhead | None = None
    if dataset.has_remote_shards:
        ahead = ReadAhead(
            dataset,
            stream,
            partial(own_slots, part),
            unwanted_members(decoding),
            quarantine,
            data.read_ahead_batches,
            data.fetch_threads,
        )
    reader = SlotReader(dataset, stream, decoding, data.max_consecutive_bad, quarantine, ahead)
    stages = [SlotSource(part, stream), *([] if ahead is None else [ahead]), wds.map(reader)]
    return wds.DataPipeline(*stages)
