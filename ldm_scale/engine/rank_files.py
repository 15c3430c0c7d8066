"""Folders of tensors that all ranks write: a safetensors file per rank, a manifest that says where every element lies.

    images-0000012800/
        rank-00000.safetensors    keys "<model>/<kind>/<tensor>": this rank's elements, flat
        manifest.json             for every tensor its shape and pieces (file, offset, length); sizes and CRC-32 of the
                                  files; what the writer adds; the CRC-32 of all this

Pieces are keyed by tensor name and offset, so any number of ranks and any ZeRO stage can read what any other wrote. The
folder is written under a temporary name and renamed when it is complete; a folder without a manifest does not count.
Nothing in it is a pickle. Checkpoints and snapshots are such folders.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm_scale.engine import collectives
from ldm_scale.errors import CheckpointError

FORMAT = "ldm-scale-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
PREFIX = "images-"
TEMPORARY = ".tmp-"
CHECKSUM = "crc32"  # the manifest's own


@dataclass(frozen=True)
class Piece:
    """Elements of a tensor that this rank writes: from `offset` of the flattened tensor on. Shapes: values (n,)."""

    model: str
    kind: str
    name: str
    shape: tuple[int, ...]
    offset: int
    values: Tensor


def write_folder(root: Path, images: int, rank: int, pieces: Iterable[Piece], content: dict[str, Any]) -> Path:
    """The written folder; `content` goes into the manifest and has a dictionary "models" by name.

    Raises: CheckpointError on all ranks if any rank could not write; nothing half-written stays.
    Collective: all ranks.
    """
    final = root / f"{PREFIX}{images:010d}"
    temporary = root / f"{TEMPORARY}{final.name}"
    prepared = _attempt(lambda: _prepare(root, temporary)) if rank == 0 else {}
    collectives.barrier()
    written = prepared if "error" in prepared else _attempt(lambda: _write_rank_file(temporary, rank, pieces))
    reports = collectives.gather_objects(written)
    failures = [f"rank {r}: {report['error']}" for r, report in enumerate(reports) if "error" in report]
    if rank == 0 and not failures:
        published = _attempt(lambda: _publish(temporary, final, reports, {"images": images} | content))
        if "error" in published:
            failures = [f"rank 0: {published['error']}"]
    if rank == 0 and failures:
        shutil.rmtree(temporary, ignore_errors=True)
    failures = collectives.broadcast_object(failures)
    if failures:
        raise CheckpointError(
            f"{final} not written ({'; '.join(failures)}); free space or fix the folder's permissions, earlier folders "
            "are untouched"
        )
    return final


def complete_folders(root: Path) -> list[Path]:
    """Complete folders below root, by images."""
    return sorted(p for p in root.glob(f"{PREFIX}*") if (p / MANIFEST).is_file()) if root.is_dir() else []


def images_of(folder: Path) -> int:
    """Images seen when the folder was written, by its name."""
    return int(folder.name.removeprefix(PREFIX))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its files' sizes checked.

    Raises: CheckpointError if it is absent, unreadable, of another format, or a file is missing or cut short.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error}); {_fix(folder)}") from error
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if found != (FORMAT, VERSION):
        raise CheckpointError(f"{path} has format and version {found}; this program reads {(FORMAT, VERSION)}")
    if manifest.pop(CHECKSUM, None) != _json_crc32(manifest):
        raise CheckpointError(f"{path} is damaged: its CRC-32 is not the one it states; {_fix(folder)}")
    for name, record in manifest["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != record["bytes"]:
            actual = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(
                f"{file} {actual}, the manifest says {record['bytes']}: the folder is cut short; {_fix(folder)}"
            )
    return manifest  # type: ignore[no-any-return]


class Reader:
    """Reads elements of tensors out of the pieces that the ranks wrote."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self._folder, self._manifest = folder, manifest
        self._open: dict[str, Any] = {}

    def has(self, model: str, kind: str, name: str) -> bool:
        """Whether the folder holds that kind of tensor under the name."""
        return name in self._manifest["models"][model]["tensors"].get(kind, {})

    def shapes(self, model: str, kind: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a kind of tensors; empty if there are none."""
        tensors = self._manifest["models"][model]["tensors"].get(kind, {})
        return {name: tuple(record["shape"]) for name, record in tensors.items()}

    def whole(self, model: str, kind: str, name: str) -> Tensor:
        """A tensor put together from its pieces, in fp32."""
        shape = torch.Size(self._manifest["models"][model]["tensors"][kind][name]["shape"])
        return self.read(model, kind, name, 0, shape.numel()).view(shape)

    def read(self, model: str, kind: str, name: str, offset: int, length: int) -> Tensor:
        """Elements offset to offset + length of a flattened tensor, in fp32. Shapes: returns (length,)."""
        record = self._manifest["models"][model]["tensors"][kind][name]
        result = torch.empty(length)
        begin, end = offset, offset + length
        covered = 0
        for piece in record["pieces"]:
            first, last = max(begin, piece["offset"]), min(end, piece["offset"] + piece["length"])
            if first < last:
                values = self._file(piece["file"]).get_slice(f"{model}/{kind}/{name}")
                result[first - begin : last - begin] = values[first - piece["offset"] : last - piece["offset"]]
                covered += last - first
        if covered != length:
            raise CheckpointError(
                f"{self._folder}: {model}/{kind}/{name} has {covered} of the {length} elements asked for; "
                f"{_fix(self._folder)}"
            )
        return result

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self._folder / name
            if _crc32(path) != self._manifest["files"][name]["crc32"]:
                raise CheckpointError(f"{path} is damaged: its CRC-32 is not the manifest's; {_fix(self._folder)}")
            self._open[name] = safe_open(path, framework="pt")
        return self._open[name]


def _fix(folder: Path) -> str:
    return f"remove the folder {folder}, the ones before serve without it"


def _attempt(action: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """The action's report, or its error as text: a rank that cannot write must still meet the others."""
    try:
        return action() or {}
    except (OSError, SafetensorError, CheckpointError) as error:  # safetensors hides the system's error in its own
        return {"error": str(error)}


def _prepare(root: Path, temporary: Path) -> None:
    """Makes the folder that the ranks write into; removes what saves that were killed have left."""
    for left in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_rank_file(folder: Path, rank: int, pieces: Iterable[Piece]) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    records = []
    for piece in pieces:
        tensors[f"{piece.model}/{piece.kind}/{piece.name}"] = piece.values.detach().cpu().contiguous()
        records.append((piece.model, piece.kind, piece.name, piece.shape, piece.offset, piece.values.numel()))
    file = f"rank-{rank:05d}.safetensors"
    path = folder / file
    save_file(tensors, path)
    _sync(path)
    return {"file": file, "bytes": path.stat().st_size, "crc32": _crc32(path), "pieces": records}


def _publish(temporary: Path, final: Path, reports: list[dict[str, Any]], content: dict[str, Any]) -> None:
    models: dict[str, Any] = {name: {**model, "tensors": {}} for name, model in content["models"].items()}
    for report in reports:
        for model, kind, name, shape, offset, length in report["pieces"]:
            kinds = models[model]["tensors"].setdefault(kind, {})
            record = kinds.setdefault(name, {"shape": list(shape), "pieces": []})
            record["pieces"].append({"file": report["file"], "offset": offset, "length": length})
    files = {r["file"]: {"bytes": r["bytes"], "crc32": r["crc32"]} for r in reports}
    manifest = {"format": FORMAT, "version": VERSION, "world_size": len(reports), "files": files}
    manifest |= content | {"models": models}
    path = temporary / MANIFEST
    path.write_text(json.dumps(manifest | {CHECKSUM: _json_crc32(manifest)}))
    _sync(path)
    if final.exists():  # the same image count was saved before, by a run that then stopped without progress
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(final.parent)


def _json_crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
