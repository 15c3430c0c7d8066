"""Tensors on disk and their content hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from ldm_scale.engine.lazy_tensors import Deferred, LazyTensors, num_bytes, without_values
from ldm_scale.engine.tensor_file import TYPES, Described, Stored, file_header, write_stream
from ldm_scale.engine.torch_file import damaged
from ldm_scale.errors import CheckpointError, LdmScaleError
from ldm_scale.interchange.output_folder import temporary_folder
from ldm_scale.telemetry.log import shows_progress

_BAR_DELAY_S = 1.0  # what ends before needs no progress bar


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Nothing; `path` holds the tensors, contiguous, and is on the disk before this returns.

    They are asked for one by one, in their order (the larger types first, so that each lies at a multiple of its size).
    """
    kinds = without_values(tensors)
    order = sorted(kinds, key=lambda name: -kinds[name].dtype.itemsize)
    # Other libraries refuse a file that does not say which framework it is for.
    header = file_header([Described(name, kinds[name].shape, kinds[name].dtype) for name in order], {"format": "pt"})
    write_stream(path, header, (Stored(name, x, x.dtype) for name, x in passing(tensors, "writing", order)))


def read_tensors(path: Path) -> LazyTensors:
    """All tensors of a safetensors file, or of the files that the index in its place names, each read when asked for.

    They come as copies on the CPU, from files that stay open: mapped pages would count as the process's memory, and end
    it where somebody cuts the file. The index is Hugging Face's: `<file>.index.json` with a `weight_map` from tensors
    to files beside it.
    Raises: CheckpointError if a file is absent, cut short or something else.
    """
    index = path.with_name(path.name + ".index.json")
    if not path.is_file() and index.is_file():
        return read_places(index, _read_file)
    return _read_file(path)


def read_places(index: Path, read: Callable[[Path], LazyTensors]) -> LazyTensors:
    """All tensors of the files that an index names, each from the file that its `weight_map` names; `read` opens one.

    Raises: CheckpointError if the index is none, or a file lacks what it should hold.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map, which names the file of each tensor; copy it again")
    # The name alone: an index never leads out of its folder.
    files = {name: read(index.with_name(Path(name).name or "nameless")) for name in sorted(set(places.values()))}
    missing = [name for name, file in places.items() if name not in files[file]]
    if missing:
        raise CheckpointError(f"{index} places {missing[0]} in {places[missing[0]]}, which lacks it; copy it again")
    unplaced = [f"{name} of {file}" for file, tensors in files.items() for name in tensors if name not in places]
    if unplaced:
        raise CheckpointError(f"{index} does not place {unplaced[0]}: is it of another model? copy the folder again")
    return LazyTensors({name: files[file].entries[name] for name, file in places.items()})


def _read_file(path: Path) -> LazyTensors:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the folder is incomplete; export or copy it again")
    with _naming_damage(path):
        file: Any = safe_open(path, framework="pt", backend="pread")
        return LazyTensors({name: _stored_in(file, path, name) for name in file.keys()})  # noqa: SIM118 (no dictionary)


def spilled(tensors: Mapping[str, Tensor], folder: Path) -> LazyTensors:
    """The same tensors in a file in `folder` that nobody else sees and that ends with them, instead of in memory.

    Raises: OSError that names the folder.
    """
    with temporary_folder(folder) as temporary:
        path = temporary / "tensors.safetensors"
        write_tensors(path, tensors)
        return read_tensors(path)


def passing(
    tensors: Mapping[str, Tensor], what: str, order: Sequence[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, one by one; a progress bar says how many bytes have passed and how long the rest takes."""
    with tqdm(
        total=num_bytes(tensors),
        desc=what,
        unit="B",
        unit_scale=True,
        delay=_BAR_DELAY_S,
        leave=False,
        disable=not shows_progress(),
    ) as bar:
        for name in tensors if order is None else order:
            tensor = tensors[name]
            yield name, tensor
            bar.update(tensor.nbytes)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Nothing; `path` holds `content`, readable by people, and is on the disk before this returns."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises: CheckpointError if the file is absent or holds anything else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the folder is incomplete; export or copy it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): it is damaged; copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON object; copy it again")
    return content


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and values: the same for the same tensors in whatever order, file or layout."""
    digest = hashlib.sha256()

    def add(name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)

    with ThreadPoolExecutor(1, "sha256") as thread:
        running = None
        for name, tensor in passing(tensors, "hashing", sorted(tensors)):
            if running is not None:
                running.result()
            running = thread.submit(add, name, tensor)  # while the next is read
        if running is not None:
            running.result()
    return digest.hexdigest()


def json_sha256(content: Mapping[str, Any]) -> str:
    """Hash of a JSON object: the same for the same content in whatever order and indentation."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def describe_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How names and shapes of two sets of tensors differ, in one line; "" if they do not."""
    expected, found = without_values(expected), without_values(found)
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    reshaped = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    kinds = {"missing": missing, "not expected": unknown, "of another shape": reshaped}
    return "; ".join(f"{len(names)} {kind} ({_shortened(names)})" for kind, names in kinds.items() if names)


def _shortened(names: list[str], limit: int = 4) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _stored_in(file: Any, path: Path, name: str) -> Deferred:
    """A tensor of an open file."""
    header = file.get_slice(name)
    if header.get_dtype() not in TYPES:
        raise CheckpointError(f"{path}: {name} is of type {header.get_dtype()}, which this program does not read")

    def read() -> Tensor:
        with _naming_damage(path):
            return file.get_tensor(name)  # type: ignore[no-any-return]

    return Deferred(torch.empty(header.get_shape(), dtype=TYPES[header.get_dtype()], device="meta"), read)


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (LdmScaleError, OSError):
        raise
    except Exception as error:  # the reader's own, and torch's of sizes that no tensor can have
        raise damaged(path, error) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
