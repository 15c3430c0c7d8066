"""The webdataset pipeline of one rank: slots -> usable samples -> micro-batches.

A slot is a micro-batch's list of positions; loader worker w of n takes the micro-batches with numbers w modulo n, so
that torch's round-robin over workers restores exactly the order of a loader without workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import webdataset as wds

from ldm_scale.data.annotations import LAYOUT, MAP, MAP_EXTENSION, TEXT, Layout
from ldm_scale.data.decode import DecodedSample, DecodeSettings, decode_sample, to_pixels
from ldm_scale.data.latents import CONTEXTS
from ldm_scale.data.order import micro_batches, replacement_at, sample_at
from ldm_scale.data.policy import BadRecord, BadSample, ConsecutiveLimit
from ldm_scale.data.shards import Dataset, RawSample

_Sampled = tuple[list[DecodedSample], list[BadRecord]]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: b samples, n of them from a latent cache, with moments instead of an image.

    Shapes: images (b - n, 3, H, W), fp32 in [-1, 1]; classes and image_numbers (b,), int64; moments (n, C, h, w) in
    the cache's type; cached (b,), bool; maps (b, H, W), uint8.
    """

    images: torch.Tensor
    captions: list[str]
    classes: torch.Tensor  # -1 where a sample has no class
    keys: list[str]
    image_numbers: torch.Tensor  # positions in the global stream, counted from the start of training
    bad: list[BadRecord]  # skipped to make this batch
    moments: torch.Tensor | None = None  # of the samples from a cache, in their order; None where there is none
    cached: torch.Tensor | None = None  # which samples those are; None = none
    layouts: list[Layout] | None = None  # None where they were not asked for; so are maps
    maps: torch.Tensor | None = None  # numbers of the manifest's map_labels; 255 where unknown
    text_contexts: torch.Tensor | None = None  # (b, M, d) of a frozen text encoder, from a cache that holds them


@dataclass(frozen=True)
class StreamSettings:
    """Which part of the global stream a rank reads. All counts are images."""

    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    start_image: int = 0
    end_image: int | None = None  # None: endless


class SlotSource:
    """Iterable over the positions of each micro-batch that this loader worker makes."""

    def __init__(self, stream: StreamSettings) -> None:
        self._stream = stream

    def __call__(self) -> Iterator[range]:
        stream = self._stream
        worker = torch.utils.data.get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        batch_index, number = stream.start_image // stream.global_batch, 0
        while True:
            slots = micro_batches(
                batch_index, stream.global_batch, stream.micro_batch, stream.rank, stream.world_size, stream.end_image
            )
            if not slots:
                return
            for positions in slots:
                if number % num_workers == worker_id:
                    yield positions
                number += 1
            batch_index += 1


class SlotReader:
    """Callable that reads and decodes the samples of a slot, putting others in the place of bad ones."""

    def __init__(self, dataset: Dataset, settings: DecodeSettings, max_consecutive_bad: int) -> None:
        self._dataset = dataset
        self._settings = settings
        self._vocabulary = dataset.vocabulary
        optional = {MAP: MAP_EXTENSION, TEXT: CONTEXTS}
        self._unwanted = frozenset(member for name, member in optional.items() if name not in settings.annotations)
        self._limit = ConsecutiveLimit(max_consecutive_bad)

    def __call__(self, positions: range) -> _Sampled:
        bad: list[BadRecord] = []
        return [self._usable(position, bad) for position in positions], bad

    def _usable(self, position: int, bad: list[BadRecord]) -> DecodedSample:
        """The sample of a position or the first usable replacement; what was skipped goes to `bad`."""
        num_samples, seed = self._dataset.num_samples, self._settings.seed
        number, attempt = sample_at(position, num_samples, seed), 0
        while True:
            raw = self._read(number, position)
            try:
                sample = decode_sample(
                    raw, self._settings, self._vocabulary, position, position // num_samples, self._dataset.latents
                )
            except BadSample as error:
                record = BadRecord(str(raw["__key__"]), str(error))
                bad.append(record)
                self._limit.bad(record)
                attempt += 1
                number = replacement_at(position, attempt, num_samples, seed)
            else:
                self._limit.good()
                return sample

    def _read(self, number: int, position: int) -> RawSample:
        """A sample's members; of a cached one, moments of the variant that it has in this epoch alone."""
        latents = self._dataset.latents
        if latents is None:
            return self._dataset.read(number, leave_out=self._unwanted)
        variant = latents.variant(self._settings, position // self._dataset.num_samples, self._dataset.key(number))
        return self._dataset.read(number, leave_out=latents.others(variant) | self._unwanted)


def collate(sampled: _Sampled, settings: DecodeSettings) -> Batch:
    """The batch of a slot's samples."""
    samples, bad = sampled
    pictures = [sample.image for sample in samples if sample.image is not None]
    moments = [sample.moments for sample in samples if sample.moments is not None]
    layouts = [sample.layout for sample in samples if sample.layout is not None]
    with_maps, shape = MAP in settings.annotations, settings.shape
    labels = [sample.labels for sample in samples if sample.labels is not None]
    contexts = [sample.text_context for sample in samples if sample.text_context is not None]
    images = np.empty((len(pictures), *shape, 3), dtype=np.uint8)
    for row, picture in enumerate(pictures):
        images[row] = picture
    return Batch(
        images=to_pixels(images),
        captions=[sample.caption for sample in samples],
        classes=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        keys=[sample.key for sample in samples],
        image_numbers=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        bad=bad,
        moments=torch.from_numpy(np.stack(moments)) if moments else None,
        cached=torch.tensor([sample.moments is not None for sample in samples]) if moments else None,
        layouts=layouts if LAYOUT in settings.annotations else None,
        maps=torch.from_numpy(np.array(labels, np.uint8).reshape(-1, *shape)) if with_maps else None,
        # Of a part of the samples they are of no use: the text encoder runs for all of them then.
        text_contexts=torch.from_numpy(np.stack(contexts)) if contexts and len(contexts) == len(samples) else None,
    )


def build_pipeline(
    dataset: Dataset, settings: DecodeSettings, stream: StreamSettings, max_consecutive_bad: int
) -> wds.DataPipeline:
    """An iterable over this worker's batches, in the order of the global stream."""
    return wds.DataPipeline(
        SlotSource(stream),
        wds.map(SlotReader(dataset, settings, max_consecutive_bad)),
        wds.map(lambda sampled: collate(sampled, settings)),
    )
