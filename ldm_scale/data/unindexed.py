"""Shards without a manifest: tars streamed from front to back through webdataset's stages, and shuffled in a buffer.

Without an index nobody knows how many samples there are and where they lie, so batches are no function of a position:
they depend on ranks, processes and what was read, and a resumed run starts the streams anew, in another order.

**Who reads what.** In pass p all n readers (loader processes of all ranks) permute the S shards alike, by the seed and
the images at which the run started or went on; reader r takes the r-th of every n. Where S < n, it takes shard r mod S
and shares it with the readers of the same remainder: sample i goes to the ((i + p) mod k)-th of these k, so that each
gets samples of the smallest shard, too, in one pass of k. Every reader goes through passes without end at its own pace:
uneven shards hang nobody, and a sample may come again before another has come once.

Bad samples and tars that break off are told by data/tar_stream.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from itertools import count
from typing import NamedTuple

import numpy as np
import webdataset as wds
from numpy.typing import NDArray

from ldm_scale.config.schema import DataConfig
from ldm_scale.data.annotations import LAYOUT, MAP, Vocabulary
from ldm_scale.data.batch import Batch, collate
from ldm_scale.data.decode import DecodedSample, DecodeSettings, decode_sample
from ldm_scale.data.latents import RECORD
from ldm_scale.data.manifest import needs_manifest
from ldm_scale.data.permutation import below, key_of, permute
from ldm_scale.data.policy import BadSample, ConsecutiveLimit, SkippedSample
from ldm_scale.data.shards import IMAGE_EXTENSIONS, RawSample
from ldm_scale.data.slots import StreamSettings, loader_process, own_positions
from ldm_scale.data.storage import Storage, expand
from ldm_scale.data.tar_stream import read_samples
from ldm_scale.data.urls import names_shards, public_name, shard_stem
from ldm_scale.telemetry.log import say_once

_WANTED = frozenset({*IMAGE_EXTENSIONS, "txt", "json"})  # all that is read of a sample without a manifest
_MAX_REPORTED = 100_000  # losses that a reader remembers; what it loses beyond them is told in every pass
_OFF = (
    "the same batches at any number of ranks; every sample once an epoch; exact resumption (a run that goes on starts "
    "its streams anew); an exact account of lost samples; checksums; class names; validation and its pictures, which "
    "are left out"
)


class Unindexed:
    """The shards that a pattern names. What only an index tells is 0 or empty."""

    num_samples = 0  # not known
    shards = ()
    latents = None

    def __init__(self, pattern: str) -> None:
        """Looks up what the pattern matches.

        Raises: DataError if that is nothing, or a name is not allowed.
        """
        self.pattern = public_name(pattern)
        self.urls = expand([pattern])

    @property
    def digest(self) -> str:
        """What tells these shards from others, wherever they lie."""
        names = "\n".join(sorted(map(shard_stem, self.urls)))
        return blake2b(f"without a manifest\n{names}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    @property
    def labels(self) -> dict[str, list[str]]:
        """No names."""
        return {}

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """No sizes."""
        return np.zeros(0, dtype=np.int64)

    def warn(self) -> None:
        """Nothing; the log says once which guarantees are off."""
        say_once(
            f"no manifest {self.pattern}",
            f"warning: data.manifest={self.pattern} names {len(self.urls)} shards without a manifest, which are "
            f"streamed; off are: {_OFF}. `ldm-scale prepare index '{self.pattern}' --out MANIFEST` gives all of them",
        )


def open_unindexed(manifest: str) -> Unindexed | None:
    """The shards that data.manifest names itself; None if it is a manifest's place."""
    return Unindexed(manifest) if names_shards(manifest) else None


class _Read(NamedTuple):
    """A sample as it was read."""

    raw: RawSample
    shard: str  # its public name
    epoch: int  # what augmentation is drawn by: no two passes of one run have the same, resumed or not


class StreamReader:
    """The stages of one loader process: what it reads, and its part of each micro-batch."""

    def __init__(
        self,
        dataset: Unindexed,
        storage: Storage,
        settings: DecodeSettings,
        part: StreamSettings,
        max_consecutive_bad: int,
    ) -> None:
        self._dataset, self._storage, self._settings, self._part = dataset, storage, settings, part
        self._max_consecutive_bad = max_consecutive_bad
        self._vocabulary = Vocabulary(classes=None)
        self._lost: list[SkippedSample] = []  # since the last sample that was handed out
        self._reported: set[tuple[str, str]] = set()  # shard and key of what was lost

    def read(self) -> Iterator[_Read]:
        """The samples that this process reads, without end.

        Raises: DataError if too many in a row cannot be read; ConfigError if they are latents.
        """
        self._lost.clear()
        self._reported.clear()
        limit = ConsecutiveLimit(self._max_consecutive_bad)
        reader, num_readers = self._reader()
        num_shards = len(self._dataset.urls)
        num_groups = min(num_shards, num_readers)
        group, turn = reader % num_groups, reader // num_groups
        num_sharing = len(range(group, num_readers, num_groups))
        for number in count():
            epoch = self._part.start_image + number
            key = key_of("shards without a manifest", self._settings.seed, epoch)
            for shard in permute(np.arange(group, num_shards, num_groups), num_shards, key).tolist():
                url = self._dataset.urls[shard]
                found = read_samples(self._storage.stream(url), shard_stem(url), public_name(url))
                for place, sample in enumerate(found):
                    is_own = (place + number) % num_sharing == turn
                    if isinstance(sample, SkippedSample):
                        limit.bad(sample)
                        self._report(sample)
                        continue
                    limit.good()
                    if RECORD in sample:
                        raise needs_manifest(self._dataset.pattern, "a cache of latents, which they are,")
                    if is_own:
                        raw = {name: member for name, member in sample.items() if name in _WANTED or name == "__key__"}
                        yield _Read(raw, public_name(url), epoch)

    def _report(self, record: SkippedSample) -> None:
        """Nothing; what a tar loses counts once, since filling the buffer passes small tars many times for a batch."""
        name = (record.shard, record.key)
        if name in self._reported:
            return
        if len(self._reported) < _MAX_REPORTED:
            self._reported.add(name)
        self._lost.append(record)

    def decode(self, samples: Iterator[_Read]) -> Iterator[Batch]:
        """This process's part of each micro-batch.

        Raises: DataError if too many samples in a row cannot be used.
        """
        limit = ConsecutiveLimit(self._max_consecutive_bad)
        for positions in own_positions(self._part):
            bad: list[SkippedSample] = []
            decoded = [self._usable(position, samples, limit, bad) for position in positions]
            yield collate(decoded, bad, self._settings)

    def _usable(
        self, position: int, samples: Iterator[_Read], limit: ConsecutiveLimit, bad: list[SkippedSample]
    ) -> DecodedSample:
        """The next sample that can be used; what was skipped goes to `bad`."""
        skipped: list[SkippedSample] = []
        while True:
            sample = next(samples)
            try:
                decoded = decode_sample(sample.raw, self._settings, self._vocabulary, position, sample.epoch)
            except BadSample as error:
                skipped.append(SkippedSample(str(sample.raw["__key__"]), str(error), sample.shard))
                limit.bad(skipped[-1])
                continue
            limit.good()
            skipped += self._lost
            self._lost.clear()
            bad += [record._replace(position=position, substitute=decoded.key) for record in skipped]
            return decoded

    def _reader(self) -> tuple[int, int]:
        """Which of all readers this process is, and how many there are: those with a share of a micro-batch."""
        number, of = loader_process()
        size = self._part.micro_batch
        if of > size:
            number, of = size * number // of, size
        return self._part.rank * of + number, self._part.world_size * of


def build_unindexed_pipeline(
    dataset: Unindexed, storage: Storage, settings: DecodeSettings, part: StreamSettings, data: DataConfig
) -> wds.DataPipeline:
    """An iterable over this process's parts of the micro-batches, shuffled in a buffer that fills as it is used.

    Raises: ConfigError if boxes or maps are asked for.
    """
    if settings.annotations & {LAYOUT, MAP}:
        raise needs_manifest(dataset.pattern, "a conditioning on boxes or maps")
    if part.rank == 0:
        dataset.warn()
    settings = replace(settings, annotations=frozenset())
    reader = StreamReader(dataset, storage, settings, part, data.max_consecutive_bad)
    size = data.block_chunks * data.chunk_samples  # samples that an order with a manifest holds for each lane
    seed = below(1 << 62, "shuffle buffer", settings.seed, part.start_image)
    return wds.DataPipeline(reader.read, wds.shuffle(size, initial=max(1, size // 4), seed=seed), reader.decode)
