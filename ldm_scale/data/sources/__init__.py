"""What all sources share: a stable held-out split, and a folder of shards that appears whole or not at all.

The same request gives the same bytes: samples in the source's order, no times or owners in the tars, no date in the
manifest. So a folder can be compared with a request and reused.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import webdataset as wds
from tqdm import tqdm

from ldm_scale.data.indexing import index_shard, index_tar, write_json
from ldm_scale.data.manifest import FORMAT, VERSION, read_manifest
from ldm_scale.data.manifest import MANIFEST_NAME as MANIFEST_NAME
from ldm_scale.data.permutation import uniforms
from ldm_scale.data.shards import open_manifest
from ldm_scale.data.sidecar import SUFFIX
from ldm_scale.errors import DataError

TRAIN, HELDOUT = "train", "heldout"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Sample:
    """One sample to be written. `family` decides the split: samples of one family are never on both sides."""

    name: str
    family: str
    members: dict[str, bytes]  # by extension


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote or found."""

    manifest_path: Path
    manifest: dict[str, Any]
    reused: bool


def is_heldout(family: str, percent: float) -> bool:
    """Whether a family belongs to the held-out split; the same on every machine and for any other set of families."""
    return uniforms(1, "heldout", family)[0] * 100.0 < percent


def find_prepared(out: Path, request: dict[str, Any]) -> Prepared | None:
    """The data set that lies at `out` and answers this request, None if nothing lies there.

    Raises: DataError if something else lies there, or the data set is damaged.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    path = out / MANIFEST_NAME
    if not path.is_file():
        raise DataError(
            f"{out}: exists and is not a prepared data set (it has no {MANIFEST_NAME}); choose another --out"
        )
    manifest = read_manifest(path)
    found = manifest.get("request")
    if found != request:
        raise DataError(
            f"{out}: holds a data set prepared by another request: {_show(found)}; asked for now: {_show(request)}; "
            "choose another --out or remove the folder"
        )
    for split in manifest["splits"]:
        open_manifest(path, split)
    return Prepared(path, manifest, reused=True)


def _show(request: Any) -> str:
    """A request in one line."""
    return ", ".join(f"{key}={value}" for key, value in request.items()) if isinstance(request, dict) else repr(request)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well and vanishes otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp's folders are closed to the group, data sets are shared
        try:
            os.rename(temporary, out)
        except OSError as error:
            raise DataError(
                f"{out}: appeared while it was being prepared ({error.strerror}); run the command again"
            ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def map_in_processes(work: Callable[[Item], Result], items: list[Item], label: str) -> Iterator[Result]:
    """The results in order, made by one process per core under a progress bar of images.

    Raises: DataError if a process dies.
    """
    executor = ProcessPoolExecutor(
        os.cpu_count(),
        multiprocessing.get_context("fork"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is the parent's to handle
    )
    try:
        results = executor.map(work, items, chunksize=16)
        yield from tqdm(results, total=len(items), desc=label, unit="images", mininterval=1.0, file=sys.stderr)
    except BrokenProcessPool:
        raise DataError(
            f"{label}: a worker process died, most likely for want of memory; nothing was written"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


class _SplitWriter:
    """Writes the samples of one split into tars of at most `samples_per_shard`."""

    def __init__(self, folder: Path, split: str, samples_per_shard: int) -> None:
        self._folder, self._split, self._samples_per_shard = folder, split, samples_per_shard
        self._pending: list[Sample] = []
        self.shards: list[dict[str, Any]] = []

    def write(self, sample: Sample) -> None:
        """Nothing; takes a sample in."""
        self._pending.append(sample)
        if len(self._pending) == self._samples_per_shard:
            self.flush()

    def flush(self) -> None:
        """Nothing; what was taken in so far lies in a tar with its sidecar."""
        if not self._pending:
            return
        path = self._folder / f"{self._split}-{len(self.shards):06d}.tar"
        with path.open("wb") as stream, wds.TarWriter(stream, encoder=False, mtime=0.0, user="", group="") as tar:
            for sample in self._pending:
                tar.write({"__key__": sample.name, **sample.members})
        self._pending.clear()
        self.shards.append(index_shard(path, path.with_suffix(SUFFIX), self._folder, index_tar(path)))


def write_dataset(
    folder: Path,
    samples: Iterable[Sample],
    *,
    heldout_percent: float,
    samples_per_shard: int,
    describe: dict[str, Any],
    split: str = TRAIN,
) -> dict[str, Any]:
    """The manifest of the shards that this writes into `folder`; `describe` gives its entries besides the splits.

    What is not held out goes to `split`.

    Raises: DataError if a split that was asked for gets no sample.
    """
    writers = {split: _SplitWriter(folder, split, samples_per_shard)}
    if heldout_percent > 0:
        writers[HELDOUT] = _SplitWriter(folder, HELDOUT, samples_per_shard)
    for sample in samples:
        writers[HELDOUT if is_heldout(sample.family, heldout_percent) else split].write(sample)
    splits: dict[str, Any] = {}
    for name, writer in writers.items():
        writer.flush()
        if not writer.shards:
            raise DataError(
                f"no sample falls into the split {name!r} with --heldout-percent {heldout_percent:g} (a hash of each "
                "name decides, so a small data set may have none): give a larger share, such as --heldout-percent 30, "
                "or --heldout-percent 0 and train with data.validation_split="
            )
        splits[name] = {"num_samples": sum(shard["num_samples"] for shard in writer.shards), "shards": writer.shards}
    manifest = {"format": FORMAT, "version": VERSION, **describe, "splits": splits}
    write_json(folder / MANIFEST_NAME, manifest)
    return manifest
