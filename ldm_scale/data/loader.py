"""Batches for one rank, made in its own process or in forked ones (data/loader_processes.py), joined by a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, chain, islice
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from types import MappingProxyType
from typing import Any

import torch
import webdataset as wds

from ldm_scale.config.schema import DataConfig
from ldm_scale.data.annotations import LAYOUT, MAP, TEXT
from ldm_scale.data.batch import Batch, join
from ldm_scale.data.decode import DecodeSettings
from ldm_scale.data.latents import read_moments, read_record
from ldm_scale.data.loader_processes import (
    ErrorsAsItems,
    deaths_by_polling,
    deaths_named,
    worker_starts,
)
from ldm_scale.data.manifest import needs_manifest
from ldm_scale.data.order import check_batches
from ldm_scale.data.pipeline import build_pipeline
from ldm_scale.data.policy import BadSampleLog, Quarantine
from ldm_scale.data.shards import Dataset, open_manifest
from ldm_scale.data.slots import StreamSettings
from ldm_scale.data.storage import build_storage
from ldm_scale.data.stream import build_stream
from ldm_scale.data.unindexed import Unindexed, build_unindexed_pipeline, open_unindexed
from ldm_scale.errors import ConfigError

_CHECKED_SHARDS = 16
_END_S = 5.0  # that the thread which makes batches ahead has for its end; then its processes are killed
_KILLED_S = 15.0  # until it has noticed that: torch looks after its processes every five seconds


class Loader:
    """Iterable over a rank's micro-batches; each iteration starts anew at `start_image`.

    A thread puts the parts of the loader processes together ahead of need. `bad_samples` tells what was skipped by the
    batches handed out so far, `waited_s` how long the caller stood still for them.
    """

    def __init__(
        self,
        dataset: Dataset | Unindexed,
        pipeline: wds.DataPipeline,
        num_workers: int,
        prefetch_batches: int,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.dataset = dataset
        self.bad_samples = BadSampleLog()
        self.waited_s = 0.0
        self._quarantine = quarantine
        self._pipeline = pipeline
        self._num_workers = num_workers
        self._prefetch_batches = prefetch_batches
        self._pin = torch.cuda.is_available()

    def __iter__(self) -> Iterator[Batch]:
        with worker_starts(self._num_workers) as start_worker:
            yield from self._iterate(start_worker)

    def _iterate(self, start_worker: Callable[[int], None]) -> Iterator[Batch]:
        parts = self._parts(start_worker)
        started, others = time.perf_counter(), active_children()
        with deaths_by_polling():
            first = list(islice(parts, 1))  # forks the processes, which the caller's thread has to do
        processes = [process for process in active_children() if process not in others]
        self.waited_s += time.perf_counter() - started
        batches = self._batches(chain(first, parts))
        del parts, first
        with _Ahead(batches, self._prefetch_batches if self._num_workers == 0 else 1, processes) as ahead:
            del batches
            while True:
                started = time.perf_counter()
                item = ahead.get()
                self.waited_s += time.perf_counter() - started
                if item is None:
                    return
                if isinstance(item, BaseException):
                    with deaths_named():
                        raise item
                self.bad_samples.add(item.bad)
                yield item

    def quarantine(self, shard_number: int, position: int) -> None:
        """Nothing; samples of the shard are bad from this position on, which no process has reached yet."""
        assert self._quarantine is not None, "a loader of training"
        self._quarantine.add(shard_number, position)

    @property
    def horizon(self) -> int:
        """Micro-batches that may have been begun beyond the last one handed out."""
        return 2 + self._prefetch_batches + max(1, self._num_workers)

    def _batches(self, items: Iterator[Any]) -> Iterator[Batch | BaseException]:
        """Micro-batches, or the error that ended them."""
        parts: list[Batch] = []
        for item in items:
            if isinstance(item, BaseException):
                yield item
                return
            parts.append(item)
            if len(parts) == max(1, self._num_workers):
                yield join(parts, self._pin)
                parts = []
        assert not parts, "every process makes a part of every micro-batch"

    def _parts(self, start_worker: Callable[[int], None]) -> Iterator[Any]:
        """What the loader processes make, in turn."""
        if self._num_workers == 0:
            return iter(ErrorsAsItems(self._pipeline))
        loader = wds.WebLoader(
            ErrorsAsItems(self._pipeline),
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_batches,
            multiprocessing_context="fork",
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # torch would draw its workers' seeds from the global one
        )
        return iter(loader)


class _Ahead:
    """An iterator's items made by a thread, at most `depth` ahead of those taken; its errors are items too."""

    def __init__(self, items: Iterator[Any], depth: int, processes: Collection[BaseProcess]) -> None:
        self._items: queue.Queue[Any] = queue.Queue(depth)
        self._done = threading.Event()
        self._processes = processes  # whose parts the items are joined from
        self._thread = threading.Thread(target=self._run, args=(items,), name="batches", daemon=True)

    def __enter__(self) -> _Ahead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        # Without processes of its own a thread whose read stalls stays behind until that has spent its budget: it is a
        # daemon and keeps nobody. Processes go: what the caller forks next would inherit all that theirs hold open.
        if not self._has_ended(_END_S) and self._processes:
            for process in self._processes:
                process.kill()
            self._has_ended(_KILLED_S)

    def _has_ended(self, within_s: float) -> bool:
        """Whether the thread ends within that time; what it has made still is thrown away."""
        given_up = time.monotonic() + within_s
        while self._thread.is_alive() and time.monotonic() < given_up:  # it may stand before a full queue
            with suppress(queue.Empty):
                self._items.get(timeout=0.01)
        return not self._thread.is_alive()

    def get(self) -> Any:
        """The next item; None at the end."""
        return self._items.get()

    def _run(self, items: Iterator[Any]) -> None:
        try:
            for item in items:
                self._items.put(item)
                if self._done.is_set():
                    return
            self._items.put(None)
        except BaseException as error:
            self._items.put(error)
        finally:
            # Ends the loader's processes before the caller goes on, as leaving the loop in one thread would.
            del items


def require_images(dataset: Dataset) -> None:
    """Nothing, if all samples of the split are pictures.

    Raises: ConfigError otherwise.
    """
    if dataset.latents is not None:
        count = sum(shard.holds_latents for shard in dataset.shards)
        raise ConfigError(
            f"data.manifest={dataset.manifest_path} holds {count} latent shards in its split {dataset.split!r} where "
            "pictures are needed; set data.manifest to the manifest that they were encoded from"
        )


def require_annotations(dataset: Dataset, annotations: frozenset[str]) -> None:
    """Nothing, if the manifest lists the names of what is asked for.

    Raises: ConfigError otherwise.
    """
    assert annotations <= {LAYOUT, MAP, TEXT}, annotations
    for wanted, key, names in (
        (LAYOUT, "object_classes", dataset.object_classes),
        (MAP, "map_labels", dataset.map_labels),
    ):
        if wanted in annotations and not names:
            raise ConfigError(
                f"data.manifest={dataset.manifest_path} lists no {key}, which a conditioning on a {wanted} needs; "
                f"prepare the data with them: `ldm-scale prepare coco`, or --{key.replace('_', '-')} of image-folder "
                "and index"
            )


def check_moments(dataset: Dataset) -> None:
    """Nothing, if moments in a few latent shards, spread over the split, are what the manifest says.

    Training looks at every sample that it reads; this finds before its start what concerns them all.
    Raises: DataError otherwise.
    """
    ends = list(accumulate(shard.num_samples for shard in dataset.shards))
    latent = [number for number, shard in enumerate(dataset.shards) if shard.holds_latents]
    for index in latent[:: max(1, len(latent) // _CHECKED_SHARDS)]:
        for number in range(ends[index] - dataset.shards[index].num_samples, ends[index]):
            sample = dataset.read(number)
            if "unusable" not in read_record(sample):
                assert dataset.latents is not None, "opened with a latent shard"
                for variant in dataset.latents.variants:
                    read_moments(sample, variant, dataset.latents)
                break


def build_loader(
    data: DataConfig,
    *,
    split: str | None = None,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    start_image: int = 0,
    augment: bool = True,
    num_epochs: int | None = None,
    accept_latents: bool = False,
    annotations: frozenset[str] = frozenset(),
    quarantined: Mapping[int, int] = MappingProxyType({}),
) -> Loader:
    """The batches of one rank: its part of each global batch in pieces of `micro_batch`.

    `num_epochs` ends the stream after every sample came so many times (1 for validation): the last global batch may be
    smaller and is divided evenly, nothing is padded, and every rank gets the same number of micro-batches, some of
    which may hold no image where fewer images than ranks are left. `accept_latents`: the caller looks at
    `Batch.moments`, so that latent shards may stand for images. `annotations` ("layout", "map") are decoded into
    `Batch.layouts` and `Batch.maps`, and samples without them are bad ones; "text" gives `Batch.text_contexts` where
    all samples of a batch come from a cache that holds them. `quarantined`: shard numbers with the positions from which
    on their samples are bad.

    Where data.manifest names shards without a manifest, `split` means nothing and what needs one is refused
    (data/unindexed.py).

    Raises: ConfigError if the batch arithmetic does not work out, latents stand where images are needed, or annotations
    are asked for that the manifest knows nothing of; DataError if the data cannot be opened, and while iterating if
    they cannot be read.
    """
    check_batches(global_batch, micro_batch, world_size)
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    if start_image % global_batch:
        raise ConfigError(
            f"cannot start at image {start_image}: it must be a multiple of train.global_batch={global_batch}; "
            "continue with the batch that the run was started with"
        )
    if not data.manifest:
        raise ConfigError("data.manifest is empty; set it to a manifest.json written by `ldm-scale prepare`")
    settings = DecodeSettings(
        resolution=data.resolution,
        crop_scale_min=data.crop_scale_min,
        horizontal_flip=data.horizontal_flip,
        augment=augment,
        seed=seed,
        annotations=annotations,
    )
    part = StreamSettings(global_batch, micro_batch, rank, world_size, start_image)
    unindexed = open_unindexed(data.manifest)
    if unindexed is not None:
        if num_epochs is not None:
            raise needs_manifest(data.manifest, "a pass over every sample, such as validation,")
        pipeline = build_unindexed_pipeline(unindexed, build_storage(data), settings, part, data)
        return Loader(unindexed, pipeline, data.num_workers, data.prefetch_batches)
    dataset = open_manifest(data.manifest, split if split is not None else data.split, False, build_storage(data))
    if not accept_latents:
        require_images(dataset)
    require_annotations(dataset, annotations)
    stream = build_stream(
        dataset,
        seed,
        global_batch,
        lanes=data.lanes,
        chunk=data.chunk_samples,
        block_chunks=data.block_chunks,
        ends=num_epochs is not None,
    )
    quarantine = Quarantine(len(dataset.shards))
    for shard_number, position in quarantined.items():
        quarantine.add(shard_number, position)
    end_image = None if num_epochs is None else num_epochs * dataset.num_samples
    pipeline = build_pipeline(dataset, stream, settings, replace(part, end_image=end_image), data, quarantine)
    return Loader(dataset, pipeline, data.num_workers, data.prefetch_batches, quarantine)
