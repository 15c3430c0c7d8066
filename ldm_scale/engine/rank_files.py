"""Folders of tensors that all ranks write: a safetensors file per rank, a manifest that says where every element lies.

    images-0000012800/
        rank-00000.safetensors    keys "<model>/<kind>/<tensor>": this rank's elements, flat
        manifest.json             for every tensor its shape and pieces (file, offset, length); sizes and CRC-32 of the
                                  files; what the writer adds; the CRC-32 of all this

Pieces are keyed by tensor name and offset, so any number of ranks and any ZeRO stage can read what any other wrote.
Nothing in a folder is a pickle. Checkpoints and snapshots are such folders; `folder_write` writes them. Names beside
theirs: ".tmp-..." is being written or removed and never counts, "damaged-..." was found damaged and is kept for a look.
Any other name, such as a copy's, is a person's: never read, never removed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ldm_scale import faults
from ldm_scale.engine.lazy_tensors import Deferred, LazyTensors
from ldm_scale.engine.tensor_file import file_crc32
from ldm_scale.errors import CheckpointError

FORMAT = "ldm-scale-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
PREFIX = "images-"
TEMPORARY = ".tmp-"
CHECKSUM = "crc32"  # the manifest's own
NEEDED = {"images": int, "files": dict, "models": dict}  # of every manifest


class DamagedError(CheckpointError):
    """A folder whose bytes are not those that were written; `damage` is without the fix."""

    def __init__(self, damage: str, fix: str = "") -> None:
        super().__init__(f"{damage}; {fix}" if fix else damage)
        self.damage = damage


@dataclass(frozen=True)
class Piece:
    """Elements of a tensor that this rank writes: from `offset` of the flattened tensor on. Shapes: values (n,)."""

    model: str
    kind: str
    name: str
    shape: tuple[int, ...]
    offset: int
    values: Tensor
    dtype: torch.dtype = torch.float32  # in the file


def folder_of(root: Path, images: int) -> Path:
    """The folder of so many images below root."""
    return root / f"{PREFIX}{images:010d}"


def has_own_name(folder: Path) -> bool:
    """Whether it is called as `folder_of` calls folders."""
    digits = folder.name.removeprefix(PREFIX)
    return digits.isdecimal() and folder.name == folder_of(folder.parent, int(digits)).name


def complete_folders(root: Path) -> list[Path]:
    """Complete folders below root, by images."""
    if not root.is_dir():
        return []
    folders = (p for p in root.glob(f"{PREFIX}*") if has_own_name(p) and (p / MANIFEST).is_file())
    return sorted(folders, key=images_of)


def images_of(folder: Path) -> int:
    """Images seen when the folder was written, by its name."""
    return int(folder.name.removeprefix(PREFIX))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its files' sizes checked.

    Raises: DamagedError if it is absent, not what was written, or a file is missing or cut short; CheckpointError if it
    is of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedError(f"{folder} is no checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not readable as JSON ({error})", _fix(folder)) from error
    is_ours = isinstance(manifest, dict)
    found = (manifest.get("format"), manifest.get("version")) if is_ours else None
    is_whole = is_ours and manifest.pop(CHECKSUM, None) == json_crc32(manifest)
    if found != (FORMAT, VERSION):
        kind = CheckpointError if is_whole else DamagedError
        raise kind(f"{path} has format and version {found}; this program reads {(FORMAT, VERSION)}")
    if not is_whole:
        raise DamagedError(f"{path} is damaged: its CRC-32 is not the one it states", _fix(folder))
    for key, wanted in NEEDED.items():
        if not isinstance(manifest.get(key), wanted):
            raise DamagedError(f"{path} has no {key} (a {wanted.__name__}): another program made it", _fix(folder))
    for name, record in manifest["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != record["bytes"]:
            actual = "is missing" if size is None else f"has {size} bytes"
            raise DamagedError(
                f"{file} {actual}, the manifest says {record['bytes']}: the folder is cut short", _fix(folder)
            )
    return manifest  # type: ignore[no-any-return]


def files_of_rank(manifest: dict[str, Any], rank: int, num_ranks: int) -> list[str]:
    """Names of the files that this rank looks at: all are, each by one rank."""
    return sorted(manifest["files"])[rank::num_ranks]


def check_file(
    folder: Path, manifest: dict[str, Any], name: str, checksum_of: Callable[[Path], int] = file_crc32
) -> None:
    """Nothing, if the bytes of a file are those that were written. Raises: DamagedError."""
    path = folder / name
    faults.reach("load.verify", path)
    if checksum_of(path) != manifest["files"][name]["crc32"]:
        raise DamagedError(f"{path} is damaged: its CRC-32 is not the manifest's", _fix(folder))


class Reader:
    """Reads elements of tensors out of the pieces that the ranks wrote.

    Each file's CRC-32 is checked when it is first needed, but of a folder that was `verified` as a whole. With
    `streams` files are read instead of mapped: of what was read nothing stays in memory.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], verified: bool = False, streams: bool = False) -> None:
        self._folder, self._manifest, self._verified = folder, manifest, verified
        self._backend = "pread" if streams else "mmap"
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
        record = self._manifest["models"][model]["tensors"][kind][name]
        shape, pieces = torch.Size(record["shape"]), record["pieces"]
        if len(pieces) == 1 and pieces[0]["length"] == shape.numel():
            file = self._file(pieces[0]["file"])
            return file.get_tensor(f"{model}/{kind}/{name}").float().view(shape)  # type: ignore[no-any-return]
        result = torch.empty(shape.numel())
        self.read(model, kind, name, 0, result)
        return result.view(shape)

    def later(self, model: str, kind: str) -> LazyTensors:
        """Tensors of a kind, each put together when it is asked for; their files are open and checked."""
        records = self._manifest["models"][model]["tensors"].get(kind, {})
        for name in sorted({piece["file"] for record in records.values() for piece in record["pieces"]}):
            self._file(name)
        entries = {}
        for name, shape in self.shapes(model, kind).items():
            like = torch.empty(shape, device="meta")
            held = sum(piece["length"] for piece in records[name]["pieces"])
            self._require_all(held, like.numel(), f"{model}/{kind}/{name}")
            entries[name] = Deferred(like, partial(self.whole, model, kind, name))
        return LazyTensors(entries)

    def read(self, model: str, kind: str, name: str, offset: int, out: Tensor) -> None:
        """Nothing; `out` has the elements of the flattened tensor from `offset` on. Shapes: out (n,), of any type."""
        record = self._manifest["models"][model]["tensors"][kind][name]
        length = out.numel()
        begin, end = offset, offset + length
        covered = 0
        for piece in record["pieces"]:
            first, last = max(begin, piece["offset"]), min(end, piece["offset"] + piece["length"])
            if first < last:
                file, key = self._file(piece["file"]), f"{model}/{kind}/{name}"
                whole = last - first == piece["length"]  # read at once, where a slice would read more than itself
                values = file.get_tensor(key) if whole else file.get_slice(key)
                out[first - begin : last - begin] = values[first - piece["offset"] : last - piece["offset"]]
                covered += last - first
        self._require_all(covered, length, f"{model}/{kind}/{name}")

    def _require_all(self, found: int, wanted: int, what: str) -> None:
        if found != wanted:
            raise CheckpointError(
                f"{self._folder}: {what} has {found} of the {wanted} elements asked for; {_fix(self._folder)}"
            )

    def _file(self, name: str) -> Any:
        if name not in self._open:
            if not self._verified:
                check_file(self._folder, self._manifest, name)
            faults.reach("load.read", self._folder / name)
            self._open[name] = safe_open(self._folder / name, framework="pt", backend=self._backend)
        return self._open[name]


def _fix(folder: Path) -> str:
    return f"put it back from a copy, or remove the folder {folder} and use the others"


def json_crc32(content: dict[str, Any]) -> int:
    """CRC-32 of plain values, whatever the order of their keys."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
