"""Tar shards by index: a manifest names the shards, a sidecar per shard says where each member lies.

webdataset reads a tar from front to back and shuffles in a buffer; that neither resumes at an image count nor gives
the same batches at another number of ranks, and a damaged tar loses samples without a word. Here any sample is one
`pread`. The price is a pass over each tar when it is indexed (`ldm-scale prepare`), and that shards are local files.
What is read is checked against the tar's own header, so that a manifest which has parted from its tars is an error
and never a wrong image. The tars stay plain webdataset shards.

A manifest may also list latent shards (data/latents.py), beside image shards or instead of them. They hold the samples
of the image shards that they were encoded from, and stand for them: keys, numbers and digest are those of the source.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_scale.data.annotations import MAX_MAP_LABELS, Vocabulary
from ldm_scale.data.latents import IMAGES, LATENTS, LatentCache
from ldm_scale.data.members import is_header_of, neighbours
from ldm_scale.errors import DataError

FORMAT = "ldm-scale-shards"
INDEX_FORMAT = "ldm-scale-shard-index"
VERSION = 1
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
RawSample = dict[str, bytes | str]  # extension -> bytes, "__key__" -> shard stem / sample name

BLOCK = 512  # bytes; a tar's headers and data begin at multiples of it
_MAX_OPEN_FILES = 128
_PREPARE_ANEW = "write the data set anew with `ldm-scale prepare`"


def read_json(path: Path, what: str) -> Any:
    """The parsed JSON file.

    Raises: DataError if it is missing or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no {what} here; write one with `ldm-scale prepare`") from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: this {what} cannot be read ({error}); write it anew with `ldm-scale prepare`"
        ) from None


@dataclass(frozen=True)
class _Index:
    """Where every member of a shard lies; a row per sample, a column per extension, offset -1 where it has none."""

    names: NDArray[np.bytes_]  # UTF-8; one array instead of a string object per sample
    extensions: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def name(self, row: int) -> str:
        """Name of a sample in its shard."""
        return bytes(self.names[row]).decode("utf-8")


@dataclass(frozen=True)
class Shard:
    """One tar of a split as its manifest describes it."""

    path: Path
    index_path: Path
    num_samples: int
    num_bytes: int
    source_bytes: int | None = None  # size of the image shard that a latent shard stands for; None = an image shard

    @property
    def holds_latents(self) -> bool:
        """Whether its samples have moments instead of pictures."""
        return self.source_bytes is not None

    @property
    def _make_anew(self) -> str:
        """What helps where a copy of it does not exist, for messages."""
        if self.holds_latents:
            return "remove it and its index and run the same `ldm-scale encode` again"
        return "index it anew with `ldm-scale prepare index`"

    @property
    def stem(self) -> str:
        """File name without folder and ending: the first part of its samples' keys."""
        return self.path.name.removesuffix(".tar")

    def check_size(self) -> None:
        """Nothing.

        Raises: DataError if the tar is missing or its size is not the manifest's.
        """
        try:
            found = self.path.stat().st_size
        except OSError as error:
            raise DataError(
                f"{self.path}: shard named in the manifest cannot be opened ({error.strerror}); "
                f"restore it or {self._make_anew if self.holds_latents else _PREPARE_ANEW}"
            ) from None
        if found != self.num_bytes:
            raise DataError(
                f"{self.path}: {found} bytes, but its manifest says {self.num_bytes}; the shard was changed or "
                f"copied in part: copy it again or {self._make_anew}"
            )

    def load_index(self) -> _Index:
        """The sidecar's content.

        Raises: DataError if it disagrees with the manifest or the tar's size.
        """
        content = read_json(self.index_path, "shard index")
        try:
            if content["format"] != INDEX_FORMAT or content["version"] != VERSION:
                raise DataError(f"{self.index_path}: not a version {VERSION} {INDEX_FORMAT}; index the shard anew")
            rows = [
                (str(row["key"]), {ext: (int(o), int(s)) for ext, (o, s) in row["files"].items()})
                for row in content["samples"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.index_path}: malformed shard index ({error!r}); index the shard anew") from None
        if len(rows) != self.num_samples:
            raise DataError(
                f"{self.index_path}: {len(rows)} samples, but the manifest says {self.num_samples} for "
                f"{self.path.name}; index the shards anew with `ldm-scale prepare index`"
            )
        extensions = tuple(sorted({extension for _, members in rows for extension in members}))
        columns = {extension: column for column, extension in enumerate(extensions)}
        offsets = np.full((len(rows), len(extensions)), -1, dtype=np.int64)
        sizes = np.zeros_like(offsets)
        for row, (name, members) in enumerate(rows):
            for extension, (offset, size) in members.items():
                if offset < BLOCK or size < 0 or offset + size > self.num_bytes:
                    raise DataError(
                        f"{self.index_path}: {name}.{extension} is said to lie at bytes {offset} to {offset + size} of "
                        f"{self.path.name}, which has {self.num_bytes}; index the shard anew"
                    )
                offsets[row, columns[extension]], sizes[row, columns[extension]] = offset, size
        names = np.array([name.encode("utf-8") for name, _ in rows], dtype=np.bytes_)
        return _Index(names, extensions, offsets, sizes)


class Dataset:
    """The samples of one split by number. Safe to use after a fork: reads carry their own offsets."""

    def __init__(
        self,
        manifest_path: Path,
        split: str,
        shards: list[Shard],
        class_names: tuple[str, ...],
        latents: LatentCache | None = None,
        object_classes: tuple[str, ...] = (),
        map_labels: tuple[str, ...] = (),
    ) -> None:
        self.manifest_path = manifest_path
        self.split = split
        self.shards = shards
        self.class_names = class_names
        self.object_classes = object_classes  # of the boxes; empty where the manifest lists none
        self.map_labels = map_labels  # of the label maps
        self.latents = latents  # provenance of the latent shards; None where there is none
        self._ends = np.cumsum([shard.num_samples for shard in shards], dtype=np.int64)
        self.num_samples = int(self._ends[-1])
        self._indices: dict[int, _Index] = {}
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor, least recently used first

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
        """What the samples' numbers refer to: names, sample counts and sizes of the shards, wherever they lie.

        Of latent shards, what their source is: a run may go on with the latents of its images.
        """
        rows = [f"{shard.stem} {shard.num_samples} {shard.source_bytes or shard.num_bytes}" for shard in self.shards]
        return blake2b("\n".join(rows).encode(), digest_size=16).hexdigest()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def _locate(self, number: int) -> tuple[int, int, _Index]:
        """(shard number, row in it, its index) of a sample."""
        assert 0 <= number < self.num_samples, f"sample {number} of {self.num_samples}"
        shard_number = int(np.searchsorted(self._ends, number, side="right"))
        row = number - (int(self._ends[shard_number - 1]) if shard_number else 0)
        if shard_number not in self._indices:
            self._indices[shard_number] = self.shards[shard_number].load_index()
        return shard_number, row, self._indices[shard_number]

    def key(self, number: int) -> str:
        """Key of a sample: its shard's stem, a slash, its name in the shard."""
        shard_number, row, index = self._locate(number)
        return f"{self.shards[shard_number].stem}/{index.name(row)}"

    def shard_of(self, number: int) -> Shard:
        """The shard that holds a sample."""
        return self.shards[self._locate(number)[0]]

    def read(self, number: int, leave_out: Collection[str] = ()) -> RawSample:
        """The members of a sample as bytes by extension, and its key under "__key__"; `leave_out` names unwanted ones.

        Raises: DataError if the tar does not hold at that place what its index says.
        """
        shard_number, row, index = self._locate(number)
        shard, name = self.shards[shard_number], index.name(row)
        present = np.flatnonzero(index.offsets[row] >= 0)
        sample: RawSample = {"__key__": f"{shard.stem}/{name}"}
        if not len(present):
            return sample
        places = [(index.extensions[c], int(index.offsets[row, c]), int(index.sizes[row, c])) for c in present]
        if leave_out:
            places = [place for place in places if place[0] not in leave_out]
        for group in neighbours(places):
            start = group[0][1] - BLOCK
            buffer = self._pread(shard_number, start, group[-1][1] + group[-1][2] - start)
            for extension, offset, size in group:
                at = offset - start
                if len(buffer) < at + size or not is_header_of(buffer[at - BLOCK : at], f"{name}.{extension}", size):
                    raise DataError(
                        f"{shard.path}: no member {name}.{extension} of {size} bytes at byte {offset}, where "
                        f"{shard.index_path.name} has it; the shard was changed: index it anew"
                    )
                sample[extension] = buffer[at : at + size]
        return sample

    def _pread(self, shard_number: int, start: int, length: int) -> bytes:
        """Bytes of a shard, through a bounded set of open files."""
        path = self.shards[shard_number].path
        try:
            if shard_number not in self._files:
                if len(self._files) >= _MAX_OPEN_FILES:
                    os.close(self._files.popitem(last=False)[1])
                self._files[shard_number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._files.move_to_end(shard_number)
            return os.pread(self._files[shard_number], length, start)
        except OSError as error:
            raise DataError(f"{path}: cannot be read at byte {start} ({error.strerror})") from None


def open_manifest(path: str | Path, split: str, check_sizes: bool = True) -> Dataset:
    """The samples of one split of a manifest; every shard is there with the size that the manifest says.

    Without `check_sizes` no shard is looked at: for a caller that looks at each of them.

    Raises: DataError if there is no manifest, no such split, no shard, or a shard is missing or has another size.
    """
    manifest_path = Path(path)
    if manifest_path.is_dir():
        manifest_path = manifest_path / "manifest.json"
    manifest = read_manifest(manifest_path)
    if split not in manifest["splits"]:
        known = ", ".join(sorted(manifest["splits"])) or "none"
        raise DataError(f"{manifest_path}: no split {split!r}; it has: {known} (data.split, data.validation_split)")
    try:
        entry = manifest["splits"][split]
        base = manifest_path.parent
        shards = [_shard(item, base) for item in entry["shards"]]
        stated = int(entry["num_samples"])
        class_names, object_classes, map_labels = (
            tuple(map(str, names))
            for names in (manifest["classes"], manifest.get("object_classes", ()), manifest.get("map_labels", ()))
        )
        if len(map_labels) > MAX_MAP_LABELS:
            raise ValueError(f"{len(map_labels)} map_labels, and a map tells {MAX_MAP_LABELS} apart")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{manifest_path}: malformed manifest ({error!r}); write it anew with `ldm-scale prepare`"
        ) from None
    if not shards or stated == 0:
        raise DataError(
            f"{manifest_path}: split {split!r} has no shards or no samples; write it anew with `ldm-scale prepare`"
        )
    counted = sum(shard.num_samples for shard in shards)
    if counted != stated:
        raise DataError(
            f"{manifest_path}: split {split!r} is said to have {stated} samples but its shards have {counted}; "
            "write the manifest anew with `ldm-scale prepare`"
        )
    for shard in shards if check_sizes else ():
        shard.check_size()
    latents = None
    if any(shard.holds_latents for shard in shards):
        latents = LatentCache.from_dict(manifest.get("latents"), str(manifest_path))
    return Dataset(manifest_path, split, shards, class_names, latents, object_classes, map_labels)


def _shard(item: dict[str, Any], base: Path) -> Shard:
    """A shard from its entry in a manifest in the folder `base`."""
    kind = item.get("kind", IMAGES)
    if kind not in (IMAGES, LATENTS):
        raise ValueError(f"a shard of kind {kind!r}")
    source_bytes = int(item["source"]["bytes"]) if kind == LATENTS else None
    return Shard(base / item["file"], base / item["index"], int(item["num_samples"]), int(item["bytes"]), source_bytes)


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of a manifest, of our format and version, with its splits.

    Raises: DataError otherwise.
    """
    if not path.exists():
        tars = sorted(path.parent.glob("*.tar")) if path.parent.is_dir() else []
        hint = (
            f"{len(tars)} tars lie in its folder: `ldm-scale prepare index {path.parent}/*.tar --out {path}` writes one"
            if tars
            else f"no shards lie in {path.parent} either; see `ldm-scale prepare --help`, then set data.manifest"
        )
        raise DataError(f"{path}: no manifest here; {hint}")
    content = read_json(path, "manifest")
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("splits"), dict):
        raise DataError(f'{path}: not a manifest of `ldm-scale prepare` (its "format" must be {FORMAT!r})')
    if content.get("version") != VERSION:
        raise DataError(
            f"{path}: manifest version {content.get('version')}, this program reads {VERSION}; write it anew"
        )
    return content
