"""Tar shards by index: a manifest names the shards, a sidecar per shard says where each member lies.

webdataset reads a tar from front to back and shuffles in a buffer; that neither resumes at an image count nor gives
the same batches at another number of ranks, and a damaged tar loses samples without a word. Here any sample is one
ranged read. The price is a pass over each tar when it is indexed (`ldm-scale prepare`). What is read is checked against
the index (or, where that has no checksum, against the tar's own header), so that bytes which have parted from their
manifest are never a wrong image. The tars stay plain webdataset shards.

A manifest may also list latent shards (data/latents.py), beside image shards or instead of them. They hold the samples
of the image shards that they were encoded from, and stand for them: keys, numbers and digest are those of the source.
"""

from __future__ import annotations

import os
import resource
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ldm_scale import faults
from ldm_scale.data.annotations import Vocabulary
from ldm_scale.data.latents import LatentCache
from ldm_scale.data.manifest import Split, manifest_path, read_split
from ldm_scale.data.members import is_header_of, neighbours
from ldm_scale.data.policy import SkippedSample
from ldm_scale.data.shard import Shard, Shards
from ldm_scale.data.sidecar import BLOCK, IndexedSample, Sidecar
from ldm_scale.data.storage import Storage, StorageError
from ldm_scale.data.urls import public_name
from ldm_scale.errors import DataError
from ldm_scale.telemetry.log import say_once

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
# extension -> bytes, or a view of a mapped file; "__key__" -> shard stem / sample name
RawSample = dict[str, bytes | memoryview | str]

_MAX_OPEN = 1024  # files and mapped sidecars (a descriptor each) that a process keeps, where it may have so many
# Shards whose sizes are looked at: to find a wrong mount or folder, not every loss. Remote ones take a request each.
_CHECKED_AT_OPENING, _REMOTE_CHECKED_AT_OPENING = 64, 4
_RETRY_AFTER_S = 60.0
NOT_AS_INDEXED = "bytes are not those that were indexed"
BAD_INDEX = "its shard's index cannot be used"


class UnreadableSample(DataError):
    """A sample whose bytes are not there, or not those that were indexed; `reason` is the same for all of a kind."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)  # both, since loader processes hand it over by pickling
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class HeldBytes(Protocol):
    """Parts of shards that were read ahead."""

    def get(self, shard_number: int, start: int, stop: int) -> memoryview | None:
        """These bytes, None if they are not held."""


class Dataset:
    """The samples of one split by number. Safe to use after a fork: reads carry their own offsets."""

    def __init__(self, split: Split, storage: Storage | None = None) -> None:
        self._split = split
        self.storage = storage or Storage()
        # A quarter of what the system allows, for each of the two; torch's shared memory takes descriptors as well.
        self._max_open = min(_MAX_OPEN, max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._failed_at: dict[int, float] = {}  # shard number -> when it could not be read
        self.manifest_path, self.split = split.path, split.name
        self.parts = split.parts
        self.shards = Shards(split.parts)
        self.class_names = split.class_names
        self.object_classes = split.object_classes  # of the boxes; empty where the manifest lists none
        self.map_labels = split.map_labels  # of the label maps
        self.latents: LatentCache | None = split.latents  # provenance of the latent shards; None where there is none
        self._ends = np.cumsum(np.concatenate([part.rows.num_samples for part in split.parts]), dtype=np.int64)
        self.num_samples = int(self._ends[-1])
        self._sidecars: OrderedDict[int, Sidecar] = OrderedDict()  # shard number -> its, least recently used first
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor, alike

    @property
    def labels(self) -> dict[str, list[str]]:
        """The manifest's lists of names that are not empty, for those who will use a model without the data."""
        lists = {"classes": self.class_names, "object_classes": self.object_classes, "map_labels": self.map_labels}
        return {name: list(names) for name, names in lists.items() if names}

    @property
    def vocabulary(self) -> Vocabulary:
        """The numbers of the manifest's names."""
        classes, objects = (
            {name: n for n, name in enumerate(names)} for names in (self.class_names, self.object_classes)
        )
        return Vocabulary(classes, objects, len(self.map_labels))

    @property
    def digest(self) -> str:
        """What the samples' numbers refer to: names of shards and samples, wherever they lie, and how parts are drawn.

        Of latent shards, what their source is: a run may go on with the latents of its images.
        """
        digest = blake2b(digest_size=16)
        for part in self.parts:
            rows = part.rows
            digest.update(f"part {part.size} {part.weight} {len(rows)}\n".encode())
            sizes = np.where(rows.source_bytes >= 0, rows.source_bytes, rows.num_bytes).tolist()
            for file, keys, count, size in zip(rows.files, rows.keys, rows.num_samples.tolist(), sizes, strict=True):
                shown = public_name(file) if "://" in file else file
                name = shown.rpartition("/")[2].removesuffix(".tar")
                digest.update(f"{name} {count} {keys or size}\n".encode())
        return digest.hexdigest()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def locate(self, number: int) -> tuple[int, int]:
        """(shard number, row in it) of a sample."""
        assert 0 <= number < self.num_samples, f"sample {number} of {self.num_samples}"
        shard_number = int(self._ends.searchsorted(number, side="right"))
        return shard_number, number - (int(self._ends[shard_number - 1]) if shard_number else 0)

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Samples of each shard."""
        return np.diff(self._ends, prepend=0)

    def shard_of(self, number: int) -> Shard:
        """The shard that holds a sample."""
        return self.shards[self.locate(number)[0]]

    def _indexed(self, shard_number: int, row: int) -> IndexedSample:
        """What the index says of a sample. Raises: UnreadableSample if that makes no sense."""
        sidecar = self.sidecar(shard_number)
        try:
            return sidecar.sample(row)
        except (ValueError, IndexError) as error:
            path = self.shards[shard_number].index_path
            raise UnreadableSample(f"{path}: damaged ({error}); index the shard anew", BAD_INDEX) from None

    @property
    def has_remote_shards(self) -> bool:
        """Whether any shard is no local file."""
        return any("://" in file for part in self.parts for file in part.rows.files)

    def shards_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard numbers of samples."""
        return np.asarray(np.searchsorted(self._ends, samples, side="right"), dtype=np.int64)

    def first_sample(self, shard_number: int) -> int:
        """Number of the first sample of a shard."""
        return int(self._ends[shard_number - 1]) if shard_number else 0

    def sidecar(self, shard_number: int) -> Sidecar:
        """The index of a shard, one of the last that were used.

        Raises: UnreadableSample if it cannot be used.
        """
        if shard_number not in self._sidecars:
            if len(self._sidecars) >= self._max_open:
                self._sidecars.popitem(last=False)
            try:
                self._sidecars[shard_number] = self.shards[shard_number].load_index()
            except DataError as error:
                raise UnreadableSample(str(error), BAD_INDEX) from None
        self._sidecars.move_to_end(shard_number)
        return self._sidecars[shard_number]

    def key(self, number: int) -> str:
        """The sample's key: the shard's name without ending, a slash, its name in the shard."""
        shard_number, row = self.locate(number)
        return f"{self.shards[shard_number].stem}/{self._indexed(shard_number, row).name}"

    def of_shards(self, numbers: Collection[int]) -> Dataset:
        """The samples of some of the shards alone."""
        parts, first = [], 0
        for part in self.parts:
            kept = [number - first for number in sorted(numbers) if first <= number < first + len(part.rows)]
            first += len(part.rows)
            if kept:
                parts.append(replace(part, rows=part.rows.select(kept)))
        return Dataset(replace(self._split, parts=tuple(parts)), self.storage)

    def bad_record(self, number: int, reason: str, position: int = -1) -> SkippedSample:
        """What is to be said of a sample that cannot be used."""
        shard_number, row = self.locate(number)
        shard = self.shards[shard_number]
        try:
            key = self.key(number)
        except UnreadableSample:
            key = f"{shard.stem}/(sample {row})"
        return SkippedSample(key, reason, shard.shown, shard_number, position)

    def keys(self) -> Iterator[str]:
        """The keys of all samples in their order."""
        for shard_number, shard in enumerate(self.shards):
            sidecar = self.sidecar(shard_number)
            for row in range(shard.num_samples):
                yield f"{shard.stem}/{sidecar.name(row)}"

    def read(self, number: int, leave_out: Collection[str] = frozenset()) -> RawSample:
        """The bytes of a sample's members but those to leave out, by extension, and its key under "__key__".

        Raises: UnreadableSample if the shard cannot be read, or does not hold at that place what its index says.
        """
        views = self.read_views(number, leave_out)
        return {name: bytes(member) if isinstance(member, memoryview) else member for name, member in views.items()}

    def read_views(
        self, number: int, leave_out: Collection[str] = frozenset(), held: HeldBytes | None = None
    ) -> RawSample:
        """As `read`, without a copy: views of what was read. Bytes that are `held` are taken from there.

        Raises: UnreadableSample
        """
        shard_number, row = self.locate(number)
        indexed = self._indexed(shard_number, row)
        sample: RawSample = {"__key__": f"{self.shards[shard_number].stem}/{indexed.name}"}
        places = [
            (extension, member.offset, member.size)
            for extension, member in indexed.members.items()
            if extension not in leave_out
        ]
        for group in neighbours(places):
            start, stop = group[0][1] - BLOCK, group[-1][1] + group[-1][2]
            content = held.get(shard_number, start, stop) if held is not None else None
            if content is None:
                content = self.fetch(shard_number, start, stop)
            damaged = _damaged(content, start, group, indexed)
            if damaged is not None and self.shards[shard_number].is_remote:
                # What came over the network may be right the next time; past the cache, which may hold it.
                content = self.fetch(shard_number, start, stop, partial(_is_intact, start, group, indexed))
            elif damaged is not None:
                raise self._not_as_indexed(shard_number, *damaged)
            for extension, offset, size in group:
                sample[extension] = content[offset - start : offset - start + size]
        return sample

    def fetch(
        self, shard_number: int, start: int, stop: int, accept: Callable[[memoryview], bool] | None = None
    ) -> memoryview:
        """Bytes of a shard; of a local one fewer where it ends before. Remote ones that `accept` refuses are fetched
        anew.

        Raises: UnreadableSample if they cannot be had.
        """
        shard = self.shards[shard_number]
        if not shard.is_remote:
            return memoryview(self._pread(shard_number, start, stop - start))
        # A shard that is gone takes its whole budget of time to say so: not once per sample.
        if time.monotonic() - self._failed_at.get(shard_number, -_RETRY_AFTER_S) < _RETRY_AFTER_S:
            raise UnreadableSample(f"{shard.shown}: could not be read a moment ago", "its shard cannot be read")
        try:
            check = None if accept is None else lambda data: accept(memoryview(data))
            return memoryview(self.storage.read(shard.location, start, stop, check))
        except StorageError as error:
            if accept is None:
                self._failed_at[shard_number] = time.monotonic()
                say_once(f"unreadable {shard.shown}", f"{error}; its samples are replaced")
            reason = "its shard cannot be read" if accept is None else NOT_AS_INDEXED
            raise UnreadableSample(str(error), reason) from None

    def _not_as_indexed(self, shard_number: int, member: str, offset: int, size: int) -> UnreadableSample:
        shard = self.shards[shard_number]
        return UnreadableSample(
            f"{shard.shown}: the {size} bytes of {member} at byte {offset} are not those that were indexed in "
            f"{shard.index_path.name}; the shard was changed or damaged: copy it again or {shard.make_anew}",
            NOT_AS_INDEXED,
        )

    def _pread(self, shard_number: int, start: int, length: int) -> bytes:
        """Bytes of a shard, through a bounded set of open files; one that fails is opened anew and read once more."""
        reason = ""
        for _ in range(2):
            try:
                faults.reach("data.fetch")
                return os.pread(self._file(shard_number), length, start)
            except OSError as error:
                # On a network file system an open file stays stale after its server has changed.
                reason = str(error.strerror)
                if shard_number in self._files:
                    os.close(self._files.pop(shard_number))
        path = self.shards[shard_number].path
        raise UnreadableSample(f"{path}: cannot be read at byte {start} ({reason})", "its shard cannot be read")

    def _file(self, shard_number: int) -> int:
        """The descriptor of a shard. Raises: OSError"""
        if shard_number not in self._files:
            if len(self._files) >= self._max_open:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard_number] = os.open(self.shards[shard_number].path, os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(shard_number)
        return self._files[shard_number]


def _damaged(
    content: memoryview, start: int, group: list[tuple[str, int, int]], indexed: IndexedSample
) -> tuple[str, int, int] | None:
    """The first member of a group in bytes from `start` on that is not as indexed: name, offset and size."""
    for extension, offset, size in group:
        at = offset - start
        member, checksum = content[at : at + size], indexed.members[extension].crc32
        if checksum is None:
            name = f"{indexed.name}.{extension}"
            intact = len(member) == size and is_header_of(bytes(content[at - BLOCK : at]), name, size)
        else:
            intact = len(member) == size and zlib.crc32(member) == checksum
        if not intact:
            return f"{indexed.name}.{extension}", offset, size
    return None


def _is_intact(start: int, group: list[tuple[str, int, int]], indexed: IndexedSample, content: memoryview) -> bool:
    return _damaged(content, start, group, indexed) is None


def open_manifest(path: str | Path, split: str, check_sizes: bool = True, storage: Storage | None = None) -> Dataset:
    """The samples of one split of a manifest. Some shards, spread over it, were seen with the size that it states.

    Without `check_sizes` no shard is looked at: for a caller that looks at each of them.

    Raises: DataError if there is no manifest, no such split, no shard, or one that was looked at is missing or has
    another size.
    """
    dataset = Dataset(read_split(manifest_path(path), split), storage)
    at_most = _REMOTE_CHECKED_AT_OPENING if dataset.has_remote_shards else _CHECKED_AT_OPENING
    for number in range(0, len(dataset.shards), -(-len(dataset.shards) // at_most)) if check_sizes else ():
        dataset.shards[number].check_size(dataset.storage)
    return dataset
