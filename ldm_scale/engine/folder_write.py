"""Writing a folder of `rank_files`: all of it or nothing, whatever kills a rank or fails in between.

    begin     rank 0 makes the folder under a temporary name
    write     each rank writes its file, has it put on the disk, and reads it back from there if it is to
    exchange  the ranks tell each other sizes and checksums
    publish   rank 0 writes the manifest and renames the folder
    confirm   all know that it is there

`begin`, `exchange` and `confirm` are for all ranks together and short; `write` and `publish` are for each alone, in
whatever thread. What ends before the rename leaves a temporary folder, which does not count and goes when the next one
begins.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ldm_scale import faults
from ldm_scale.engine import collectives
from ldm_scale.engine.rank_files import (
    CHECKSUM,
    FORMAT,
    MANIFEST,
    PREFIX,
    TEMPORARY,
    VERSION,
    DamagedError,
    Piece,
    folder_of,
    json_crc32,
    read_manifest,
)
from ldm_scale.engine.tensor_file import Stored, file_crc32, sync_folder, write_tensors
from ldm_scale.errors import CheckpointError

_REPLACED = ".replaced-"


class FolderWrite:
    """A folder of so many images on its way to the disk."""

    def __init__(self, root: Path, images: int, rank: int, read_back: bool = True) -> None:
        self.final = folder_of(root, images)
        self.images = images
        self._temporary = root / f"{TEMPORARY}{self.final.name}"
        self._rank, self._read_back = rank, read_back
        self._report: dict[str, Any] = {}
        self._manifest: dict[str, Any] = {}

    def begin(self) -> None:
        """Nothing; the temporary folder is there. Raises: CheckpointError on all ranks. Collective: all ranks."""

        def prepare() -> None:
            faults.reach("save.begin")
            if self._rank == 0:
                restore_replaced(self.final.parent)
                for left in self.final.parent.glob(f"{TEMPORARY}*"):
                    shutil.rmtree(left, ignore_errors=True)
                self._temporary.mkdir(parents=True)

        self._agree(_attempt(prepare))

    def write(self, pieces: Iterable[Piece]) -> None:
        """Nothing; this rank's file is on the disk and was read back, or `exchange` tells why not."""

        def write() -> dict[str, Any]:
            listed = list(pieces)
            path = self._temporary / f"rank-{self._rank:05d}.safetensors"
            checksum = write_tensors(path, [Stored(f"{p.model}/{p.kind}/{p.name}", p.values, p.dtype) for p in listed])
            if self._read_back and file_crc32(path, from_disk=True) != checksum:
                raise DamagedError(f"{path} reads back from the disk as other bytes than were written")
            records = [(p.model, p.kind, p.name, p.shape, p.offset, p.values.numel()) for p in listed]
            return {"file": path.name, "bytes": path.stat().st_size, "crc32": checksum, "pieces": records}

        self._report = _attempt(write)

    def exchange(self, content: dict[str, Any]) -> None:
        """Nothing; all ranks have written. `content` is the manifest's and has a dictionary "models" by name.

        Raises: CheckpointError on all ranks if any could not write; nothing half-written stays.
        Collective: all ranks, after `write`.
        """
        outcome = _attempt(lambda: faults.reach("save.reports"))
        reports = self._agree(outcome or self._report)
        self._manifest = _manifest(reports, {"images": self.images} | content) if self._rank == 0 else {}

    def publish(self, after: Callable[[], None] | None = None) -> None:
        """Nothing; the folder has its name and `after` was called, or `confirm` tells why not.

        Rank 0 acts; the others only pass the points at which they may be killed.
        """

        def publish() -> None:
            self._publish(self._manifest)
            if after is not None:
                after()

        outcome = _attempt(publish)
        self._report = outcome if self._rank == 0 else {}

    def confirm(self) -> Path:
        """The folder, complete and on the disk.

        Raises: CheckpointError on all ranks if it could not be published; nothing half-written stays.
        Collective: all ranks, after `publish`.
        """
        self._agree(self._report)
        return self.final

    def _publish(self, manifest: dict[str, Any]) -> None:
        is_main, path, root = self._rank == 0, self._temporary / MANIFEST, self.final.parent
        faults.reach("save.manifest")
        if is_main:
            with path.open("w", encoding="utf-8") as file:
                file.write(json.dumps(manifest | {CHECKSUM: json_crc32(manifest)}))
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self._temporary)
            file_crc32(path, from_disk=True)
            read_manifest(self._temporary)
        replaced = root / f"{_REPLACED}{self.final.name}"
        if is_main and self.final.exists():  # the same images were seen before, by a run that was then set back
            self.final.rename(replaced)
        faults.reach("save.rename")
        if is_main:
            self._temporary.rename(self.final)
            sync_folder(root)
            if replaced.exists():
                remove_folder(replaced)
        faults.reach("save.renamed")

    def _agree(self, report: dict[str, Any]) -> list[dict[str, Any]]:
        """The reports of all ranks, if none is of an error."""
        reports = collectives.gather_objects(report)
        failures = [f"rank {rank}: {given['error']}" for rank, given in enumerate(reports) if "error" in given]
        if not failures:
            return reports
        if self._rank == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)
        collectives.barrier()
        raise CheckpointError(
            f"{self.final} not written ({'; '.join(failures)}); free space or fix the folder's permissions, earlier "
            "folders are untouched"
        )


def write_folder(
    root: Path,
    images: int,
    rank: int,
    pieces: Iterable[Piece],
    content: dict[str, Any],
    after: Callable[[], None] | None = None,
    read_back: bool = True,
) -> Path:
    """The written folder, while all ranks wait; `after` is called on each when it is there.

    Raises: CheckpointError on all ranks if any rank could not write; nothing half-written stays.
    Collective: all ranks.
    """
    folder = FolderWrite(root, images, rank, read_back)
    folder.begin()
    folder.write(pieces)
    folder.exchange(content)
    folder.publish(after)
    return folder.confirm()


def remove_folder(folder: Path) -> None:
    """Nothing; the folder is gone, or does not count any more if something keeps it from going."""
    doomed = folder.with_name(f"{TEMPORARY}removed-{folder.name}")
    try:
        folder.rename(doomed)  # at once: half a folder would look like a damaged one
    except OSError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def restore_replaced(root: Path) -> None:
    """Nothing; a folder that was put aside for one that a kill then kept from its place is back."""
    for aside in root.glob(f"{_REPLACED}{PREFIX}*"):
        place = root / aside.name.removeprefix(_REPLACED)
        if place.exists():
            remove_folder(aside)
        else:
            aside.rename(place)


def _attempt(action: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """The action's report, or its error as text: a rank that cannot write must still meet the others."""
    try:
        return action() or {}
    except (OSError, CheckpointError) as error:
        return {"error": str(error)}


def _manifest(reports: list[dict[str, Any]], content: dict[str, Any]) -> dict[str, Any]:
    models: dict[str, Any] = {name: {**model, "tensors": {}} for name, model in content["models"].items()}
    for report in reports:
        for model, kind, name, shape, offset, length in report["pieces"]:
            kinds = models[model]["tensors"].setdefault(kind, {})
            record = kinds.setdefault(name, {"shape": list(shape), "pieces": []})
            record["pieces"].append({"file": report["file"], "offset": offset, "length": length})
    files = {r["file"]: {"bytes": r["bytes"], "crc32": r["crc32"]} for r in reports}
    manifest = {"format": FORMAT, "version": VERSION, "world_size": len(reports), "files": files}
    return manifest | content | {"models": models}
