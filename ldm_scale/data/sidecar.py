"""What lies beside a tar: where each member of each sample is, its checksum and the pictures' sizes, in columns.

A safetensors file, because a training touches a few samples of very many shards: it is mapped, and nothing
is parsed. Members that the index found unusable are not rows; the file lists them with their reasons.

    names      (bytes,)  uint8   names of all samples, UTF-8, one after the other
    name_ends  (n,)      int64   where each ends
    offsets    (n, e)    int64   first byte of a member in the tar, per extension; -1 where a sample has none
    sizes      (n, e)    int64   bytes
    crc32      (n, e)    uint32  of those bytes; the column is missing where the tar was not read whole
    pictures   (n, 2)    int32   width and height of the upright picture; 0 where unknown; may be missing
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import numpy as safetensors_numpy

from ldm_scale.data.policy import BadRecord
from ldm_scale.errors import DataError

FORMAT = "ldm-scale-shard-index"
VERSION = 2
SUFFIX = ".index.safetensors"
BLOCK = 512  # bytes; a tar's headers and data begin at multiples of it

_METADATA = "ldm_scale"  # the one entry of safetensors' own metadata, which are strings
_TYPES = {"I64": "<i8", "I32": "<i4", "U32": "<u4", "U8": "u1"}
_AGAIN = "index the shard anew with `ldm-scale prepare index`"


@dataclass(frozen=True, slots=True)  # a tar may hold a million
class Member:
    """One file of a sample in its tar."""

    offset: int  # of its first byte
    size: int
    crc32: int | None = None  # None: its bytes were not read when it was indexed


@dataclass(frozen=True, slots=True)  # a tar may hold a million
class IndexedSample:
    """A usable sample as the index found it."""

    name: str
    members: dict[str, Member]  # by extension
    picture: tuple[int, int] = (0, 0)  # width and height; zeros where unknown


@dataclass(frozen=True)
class Sidecar:
    """The content of a sidecar. Shapes: n samples, e extensions, as above."""

    extensions: tuple[str, ...]
    names: NDArray[np.uint8]
    name_ends: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    crc32: NDArray[np.uint32] | None = None
    pictures: NDArray[np.int32] | None = None
    bad: tuple[BadRecord, ...] = ()  # what the index left out; keys are the samples' or members' names in the tar
    extra: dict[str, Any] = field(default_factory=dict)  # provenance of a latent shard and the like

    def __len__(self) -> int:
        return len(self.name_ends)

    def name(self, row: int) -> str:
        """Name of a sample in its shard."""
        start = int(self.name_ends[row - 1]) if row else 0
        return self.names[start : int(self.name_ends[row])].tobytes().decode("utf-8")

    @property
    def keys_digest(self) -> str:
        """What tells its list of names from others."""
        return blake2b(self.name_ends.tobytes() + self.names.tobytes(), digest_size=8).hexdigest()

    def sample(self, row: int) -> IndexedSample:
        """All that is known of a sample."""
        checksums = None if self.crc32 is None else self.crc32[row].tolist()
        members = {
            extension: Member(offset, size, None if checksums is None else checksums[column])
            for column, (extension, offset, size) in enumerate(
                zip(self.extensions, self.offsets[row].tolist(), self.sizes[row].tolist(), strict=True)
            )
            if offset >= 0
        }
        width, height = (0, 0) if self.pictures is None else self.pictures[row].tolist()
        return IndexedSample(self.name(row), members, (width, height))

    @classmethod
    def of(
        cls, samples: Sequence[IndexedSample], bad: Sequence[BadRecord] = (), extra: dict[str, Any] | None = None
    ) -> Sidecar:
        """The columns of these samples. A checksum or a size that one of them lacks is kept of none."""
        extensions = tuple(sorted({extension for sample in samples for extension in sample.members}))
        columns = {extension: column for column, extension in enumerate(extensions)}
        shape = (len(samples), len(extensions))
        offsets, sizes = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        checksums, pictures = np.zeros(shape, np.uint32), np.zeros((len(samples), 2), np.int32)
        complete = True
        for row, sample in enumerate(samples):
            pictures[row] = sample.picture
            for extension, member in sample.members.items():
                place = row, columns[extension]
                offsets[place], sizes[place] = member.offset, member.size
                complete &= member.crc32 is not None
                checksums[place] = member.crc32 or 0
        names = [sample.name.encode("utf-8") for sample in samples]
        return cls(
            extensions,
            np.frombuffer(b"".join(names), np.uint8),
            np.cumsum([len(name) for name in names], dtype=np.int64),
            offsets,
            sizes,
            checksums if complete else None,
            pictures if pictures.any() else None,
            tuple(bad),
            extra or {},
        )

    def select(self, rows: NDArray[np.int64]) -> Sidecar:
        """The sidecar of some of the samples, in this order; what was left out before is not repeated."""
        names = [self.name(row).encode("utf-8") for row in rows.tolist()]
        return Sidecar(
            self.extensions,
            np.frombuffer(b"".join(names), np.uint8),
            np.cumsum([len(name) for name in names], dtype=np.int64),
            self.offsets[rows],
            self.sizes[rows],
            None if self.crc32 is None else self.crc32[rows],
            None if self.pictures is None else self.pictures[rows],
            (),
            self.extra,
        )

    def to_bytes(self) -> bytes:
        """The file: the same bytes for the same content."""
        columns: dict[str, NDArray[Any]] = {
            "name_ends": self.name_ends,
            "names": self.names,
            "offsets": self.offsets,
            "sizes": self.sizes,
        }
        optional = {"crc32": self.crc32, "pictures": self.pictures}
        columns |= {name: values for name, values in optional.items() if values is not None}
        head = {
            "format": FORMAT,
            "version": VERSION,
            "extensions": self.extensions,
            "bad": self.bad,
            "extra": self.extra,
        }
        contiguous = {name: np.ascontiguousarray(values) for name, values in columns.items()}
        return safetensors_numpy.save(contiguous, {_METADATA: json.dumps(head, ensure_ascii=False)})


def open_sidecar(path: Path, num_samples: int | None = None, num_bytes: int | None = None) -> Sidecar:
    """A sidecar, mapped into memory; of a tar with so many samples and bytes, where these are given.

    Raises: DataError if it is missing, malformed, or of another tar.
    """
    try:
        with path.open("rb") as stream:
            content = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        head_bytes = int.from_bytes(content[:8], "little")
        header = json.loads(bytes(content[8 : 8 + head_bytes]))
        head = json.loads(header.pop("__metadata__")[_METADATA])
        if (head["format"], head["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{head['format']} of version {head['version']}")
        columns = {name: _column(content[8 + head_bytes :], entry) for name, entry in header.items()}
        bad = tuple(BadRecord(*record) for record in head["bad"])
        sidecar = Sidecar(tuple(head["extensions"]), bad=bad, extra=dict(head["extra"]), **columns)
    except FileNotFoundError:
        raise DataError(f"{path}: no shard index here; {_AGAIN}") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path}: malformed shard index ({error}); {_AGAIN}") from None
    _check(sidecar, path, num_samples, num_bytes)
    return sidecar


def _column(content: memoryview, entry: dict[str, Any]) -> NDArray[Any]:
    """One tensor of a safetensors file, by its entry in the header."""
    start, stop = entry["data_offsets"]
    values: NDArray[Any] = np.frombuffer(content[start:stop], _TYPES[entry["dtype"]]).reshape(entry["shape"])
    return values


def _check(sidecar: Sidecar, path: Path, num_samples: int | None, num_bytes: int | None) -> None:
    """Nothing; raises DataError if the columns do not fit each other, the manifest or the tar."""
    count, width = len(sidecar), len(sidecar.extensions)
    if num_samples is not None and count != num_samples:
        raise DataError(f"{path}: {count} samples, but the manifest says {num_samples}; {_AGAIN}")
    fits = sidecar.offsets.shape == sidecar.sizes.shape == (count, width)
    fits &= sidecar.crc32 is None or sidecar.crc32.shape == (count, width)
    fits &= sidecar.pictures is None or sidecar.pictures.shape == (count, 2)
    if not fits or (count and sidecar.name_ends[-1] != len(sidecar.names)):
        raise DataError(f"{path}: malformed shard index (its columns do not fit each other); {_AGAIN}")
    present = sidecar.offsets >= 0
    ends = sidecar.offsets + sidecar.sizes
    wrong = present & ((sidecar.offsets < BLOCK) | (sidecar.sizes < 0))
    if num_bytes is not None:
        wrong |= present & (ends > num_bytes)
    if wrong.any():
        row, column = (int(number) for number in np.argwhere(wrong)[0])
        raise DataError(
            f"{path}: {sidecar.name(row)}.{sidecar.extensions[column]} is said to lie at bytes "
            f"{sidecar.offsets[row, column]} to {ends[row, column]} of a tar of {num_bytes} bytes; {_AGAIN}"
        )
