"""One tar of a split as its manifest describes it, and all of them by number."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import overload

import numpy as np

from ldm_scale.data.manifest import ANEW, Part
from ldm_scale.data.sidecar import Sidecar, open_sidecar
from ldm_scale.data.storage import Storage
from ldm_scale.data.urls import local_path, public_name
from ldm_scale.errors import DataError

_MAX_KEPT = 1024  # shards that a process reads side by side: making one takes as long as reading a cached sample


@dataclass(frozen=True)
class Shard:
    """One tar of a split."""

    location: str  # path or URL
    index_path: Path
    num_samples: int
    num_bytes: int
    source_bytes: int | None = None  # size of the image shard that a latent shard stands for; None = an image shard
    keys: str = ""  # digest of its samples' names

    @cached_property
    def is_remote(self) -> bool:
        """Whether it is no local file."""
        return "://" in self.location

    @property
    def path(self) -> Path:
        """Where it lies, for commands that need a local file.

        Raises: DataError if it is remote.
        """
        if self.is_remote:
            raise DataError(
                f"{self.shown}: this command reads local shards alone; copy the shards and index them there"
            )
        return Path(self.location)

    @property
    def shown(self) -> str:
        """Its name for messages, without what a URL may hold of credentials."""
        return public_name(self.location)

    @property
    def holds_latents(self) -> bool:
        """Whether its samples have moments instead of pictures."""
        return self.source_bytes is not None

    @property
    def make_anew(self) -> str:
        """What helps where a copy of it does not exist, for messages."""
        if self.holds_latents:
            return "remove it and its index and run the same `ldm-scale encode` again"
        return "index it anew with `ldm-scale prepare index`"

    @cached_property
    def stem(self) -> str:
        """File name without folder and ending: the first part of its samples' keys."""
        return self.shown.rpartition("/")[2].removesuffix(".tar")

    def check_size(self, storage: Storage) -> None:
        """Nothing.

        Raises: DataError if the tar is missing or its size is not the manifest's.
        """
        try:
            found = storage.size(self.location) if self.is_remote else os.stat(self.location).st_size
        except OSError as error:
            raise DataError(
                f"{self.shown}: shard named in the manifest cannot be opened ({error.strerror}); restore it or "
                f"{self.make_anew if self.holds_latents else ANEW}"
            ) from None
        if found != self.num_bytes:
            raise DataError(
                f"{self.shown}: {found} bytes, but its manifest says {self.num_bytes}; the shard was changed or "
                f"copied in part: copy it again or {self.make_anew}"
            )

    def load_index(self) -> Sidecar:
        """The sidecar's content.

        Raises: DataError if it disagrees with the manifest or the tar's size.
        """
        return open_sidecar(self.index_path, self.num_samples, self.num_bytes)


class Shards(Sequence[Shard]):
    """The shards of all parts by number, those of the first part first; made when they are asked for."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part.rows) for part in parts]).tolist()
        self._made = lru_cache(maxsize=_MAX_KEPT)(self._make)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Shard: ...

    @overload
    def __getitem__(self, index: slice) -> list[Shard]: ...

    def __getitem__(self, index: int | slice) -> Shard | list[Shard]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._made(index % len(self))

    def _make(self, number: int) -> Shard:
        part = bisect_right(self._ends, number)
        rows, row = self._parts[part].rows, number - (self._ends[part - 1] if part else 0)
        source = int(rows.source_bytes[row])
        return Shard(
            _location(rows.base, rows.files[row]),
            rows.base / rows.indices[row],
            int(rows.num_samples[row]),
            int(rows.num_bytes[row]),
            None if source < 0 else source,
            rows.keys[row],
        )


def _location(base: Path, file: str) -> str:
    """Path or URL of a shard that a manifest in the folder `base` lists.

    Raises: DataError if its scheme is not allowed.
    """
    path = local_path(file)
    return file if path is None else os.path.join(base, path)
