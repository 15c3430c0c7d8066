"""Safetensors files written tensor by tensor, their CRC-32 made on the way.

safetensors' own `save_file` wants all tensors in host memory at once and leaves the checksum to a second pass. Here the
header goes first, since names, types and sizes are known before any value, and then chunk by chunk what is asked from
the device, so that a save needs a chunk of host memory and the bytes are looked at while they are in the cache.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_scale import faults
from ldm_scale.errors import CheckpointError, ConfigError

CHUNK_BYTES = 1 << 22
_BEGIN_BYTES, _SMALL_BYTES = 1 << 25, 1 << 16
TYPES = {  # names of the format -> types
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in TYPES.items()}


class Stored(NamedTuple):
    """A tensor of a file: its name, its values wherever they lie, the type it is written in."""

    name: str
    values: Tensor
    dtype: torch.dtype


class Described(NamedTuple):
    """What the header says of a tensor."""

    name: str
    shape: Sequence[int]
    dtype: torch.dtype


def write_tensors(path: Path, tensors: Sequence[Stored]) -> int:
    """CRC-32 of the written file, which lies on the disk when this returns. The same tensors give the same bytes.

    They are written flat.
    Raises: OSError; CheckpointError if a value does not fit the type it is to be written in.
    """
    header = file_header([Described(tensor.name, [tensor.values.numel()], tensor.dtype) for tensor in tensors])
    with _Checksum() as checksum:
        write_stream(path, header, tensors, checksum.add)
        return checksum.value


def write_stream(
    path: Path,
    header: bytes,
    tensors: Iterable[Stored],
    passed: Callable[[bytes | memoryview], object] = lambda chunk: None,
) -> None:
    """As `write_tensors`, of tensors that come one by one, in the order in which `header` has them.

    `passed` is given all bytes in their order.
    """
    begun = written = 0
    with path.open("wb") as file:
        passed(header)
        file.write(header)
        for tensor in tensors:
            faults.reach("save.write", path)
            for part in torch.split(tensor.values.detach().reshape(-1), CHUNK_BYTES // tensor.dtype.itemsize):
                values = part.to(tensor.dtype)
                if tensor.dtype == torch.float16 != part.dtype and not values.isfinite().all():
                    raise CheckpointError(f"{tensor.name} does not fit float16; set ema.snapshot_dtype=fp32")
                chunk = memoryview(values.cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
                passed(chunk)
                file.write(chunk)
                written += len(chunk)
                if written - begun >= _BEGIN_BYTES:
                    file.flush()
                    # The kernel begins to write these pages out, so that the disk works while the next are summed.
                    os.posix_fadvise(file.fileno(), begun, written - begun, os.POSIX_FADV_DONTNEED)
                    begun = written
        file.flush()
        faults.reach("save.sync", path)
        os.fsync(file.fileno())


def file_crc32(path: Path, from_disk: bool = False) -> int:
    """CRC-32 of a file; `from_disk` has the system forget the pages that it holds of it, so that the disk answers."""
    buffers = cycle([memoryview(bytearray(CHUNK_BYTES)) for _ in range(2)])  # one is filled while the other is summed
    with path.open("rb", buffering=0) as file, _Checksum() as checksum:
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for buffer in buffers:
            count = file.readinto(buffer)
            if not count:
                break
            checksum.add(buffer[:count])
        return checksum.value


class _Checksum:
    """CRC-32 of the chunks that are added, by a thread beside the one that writes or reads them; a context manager."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "crc32")
        self._running: Future[int] | None = None
        self._value = 0

    def __enter__(self) -> _Checksum:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.shutdown()

    def add(self, chunk: bytes | memoryview) -> None:
        """Nothing; the chunk before is summed, and this one's bytes must stay until the next call."""
        before = self.value
        if len(chunk) < _SMALL_BYTES:  # handing it over would take longer
            self._running, self._value = None, zlib.crc32(chunk, before)
        else:
            self._running = self._thread.submit(zlib.crc32, chunk, before)

    @property
    def value(self) -> int:
        """Of all chunks so far; waits for it."""
        return self._value if self._running is None else self._running.result()


def replace_file(path: Path, content: str | bytes) -> None:
    """Nothing; the file holds the text (in UTF-8) or the bytes and is on the disk.

    Until then it is as it was, whatever happens, also if another process writes the same file.

    Raises: OSError that names the path.
    """
    replace_files(path.parent, {path.name: content})


def replace_files(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Nothing; the files hold their texts (in UTF-8) or bytes and are on the disk.

    None is replaced before all are written in full, and then they are in their order: the last is there only if all
    are. Partial files have names of their own, so that two processes do not write into one.

    Raises: OSError that names the path.
    """
    partials: dict[Path, Path] = {}
    path = folder
    try:
        for name, content in contents.items():
            path = folder / name
            partials[path] = path.with_name(f".{name[:64]}.{secrets.token_hex(6)}.tmp")
            with partials[path].open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        for path, partial in partials.items():
            partial.replace(path)
        sync_folder(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def require_place(folder: Path, given: str) -> None:
    """Nothing, if files can be written into a folder, there or still to be made; it is tried, and leaves no trace.

    `given` is the option and its value, for the message.
    Raises: ConfigError.
    """
    made: list[Path] = []
    try:
        for path in reversed([folder, *folder.parents]):
            if not path.exists():
                path.mkdir()
                made.append(path)
        probe = folder / f".{secrets.token_hex(6)}.tmp"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{given}: nothing can be written there ({error.strerror or error}: {error.filename or folder}); give "
            "another place, or fix its permissions"
        ) from error
    finally:
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir()


def sync_folder(path: Path) -> None:
    """Nothing; what was created, renamed or removed in the folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_header(tensors: Iterable[Described], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length, then JSON, filled up so that the values begin at a multiple of 8; they follow without gaps."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, shape, dtype in tensors:
        assert name not in entries, f"{name} twice in a file"
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
