"""From samples of image shards to pictures for the encoder, and from its moments to samples of latent shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldm_scale.data.decode import (
    DecodeSettings,
    crop_box,
    image_extension,
)
from ldm_scale.data.latents import (
    CENTER,
    CONTEXTS,
    MIRROR,
    PREFIX,
    RECORD,
    LatentCache,
    member,
    pack_contexts,
    pack_moments,
)
from ldm_scale.data.loader_processes import worker_starts
from ldm_scale.data.metadata import member_bytes, read_captions, read_label, read_metadata
from ldm_scale.data.pictures import Picture
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import IMAGE_EXTENSIONS, Dataset, RawSample
from ldm_scale.errors import DataError, LdmScaleError


@dataclass
class Rendered:
    """A sample on its way to the encoder. Shapes: images (variants, H, W, 3), 8-bit RGB; no variant if unusable."""

    key: str
    members: dict[str, bytes]
    record: dict[str, Any]
    images: NDArray[np.uint8]
    captions: list[str] = field(default_factory=list)  # none if unusable


def render_variants(sample: RawSample, cache: LatentCache, class_numbers: dict[str, int]) -> Rendered:
    """All variants of a sample's picture; none, and the reason in the record, if training could not use the sample.

    Raises: DataError if the sample has a member of a latent cache.
    """
    key = str(sample["__key__"])
    members = {name: member_bytes(sample, name) for name in sample if name != "__key__"}
    reserved = (PREFIX,) if cache.text is None else (PREFIX, CONTEXTS)
    taken = next((name for name in members if name.startswith(reserved)), None)
    if taken is not None:
        raise DataError(f"{key}: has a member {taken}, a name that latent shards need; rename it")
    kept = {name: content for name, content in members.items() if name not in IMAGE_EXTENSIONS}
    side, extension = cache.transform.resolution, image_extension(sample)
    record: dict[str, Any] = {}
    images = []
    try:
        if extension is None:
            raise BadSample(f"no image ({', '.join(IMAGE_EXTENSIONS)})")
        metadata = read_metadata(sample)
        captions = read_captions(sample, metadata)
        read_label(sample, metadata, class_numbers)
        picture = Picture(members[extension])
        for variant in cache.variants:
            box, mirror = variant_box(variant, *picture.size, cache, key)
            record[variant] = {"box": list(box), "flip": mirror}
            images.append(picture.render(box, mirror, (side, side)))
    except BadSample as error:
        return Rendered(key, kept, {"unusable": str(error)}, np.empty((0, side, side, 3), np.uint8))
    return Rendered(key, kept, {"size": list(picture.size), "variants": record}, np.stack(images), captions)


def variant_box(
    variant: str, width: int, height: int, cache: LatentCache, key: str
) -> tuple[tuple[float, float, float, float], bool]:
    """Box and mirroring of a variant, a function of its name and the key alone."""
    transform = cache.transform
    if variant in (CENTER, MIRROR):
        box, _ = crop_box(width, height, DecodeSettings(transform.resolution, augment=False), 0, key)
        return box, variant == MIRROR
    settings = DecodeSettings(transform.resolution, transform.crop_scale_min, transform.horizontal_flip)
    return crop_box(width, height, settings, int(variant.removeprefix("crop")), key)


def pack_sample(
    sample: Rendered, moments: NDArray[np.float32], cache: LatentCache, contexts: NDArray[np.float32] | None = None
) -> dict[str, Any]:
    """Members of a latent shard's sample and its name under "__key__".

    Shapes: moments (variants, C, h, w); contexts (captions, M, d).
    Raises: DataError if the moments or the contexts cannot be stored.
    """
    packed = {
        member(variant): pack_moments(values, cache.transform.dtype, f"{sample.key} ({variant})")
        for variant, values in zip(sample.record.get("variants", ()), moments, strict=True)
    }
    if contexts is not None and len(contexts):
        packed[CONTEXTS] = pack_contexts(contexts, sample.key)
    record = json.dumps(sample.record).encode()
    return {"__key__": sample.key.partition("/")[2], **sample.members, RECORD: record, **packed}


class _Pieces(torch.utils.data.Dataset[Any]):
    """The samples of (split, numbers), rendered; or the error that met them."""

    def __init__(
        self, datasets: Mapping[str, Dataset], cache: LatentCache, pieces: Sequence[tuple[str, range]]
    ) -> None:
        self._datasets, self._cache, self._pieces = datasets, cache, pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> list[Rendered] | LdmScaleError:
        split, numbers = self._pieces[index]
        dataset = self._datasets[split]
        class_numbers = {name: number for number, name in enumerate(dataset.class_names)}
        try:
            return [render_variants(dataset.read(n), self._cache, class_numbers) for n in numbers]
        except LdmScaleError as error:
            return error


def read_pieces(
    datasets: Mapping[str, Dataset], cache: LatentCache, pieces: Sequence[tuple[str, range]], num_workers: int
) -> Iterator[list[Rendered]]:
    """The samples of each (split, numbers) in turn, rendered by forked processes (0: by this one).

    Raises: DataError as `render_variants`.
    """
    with worker_starts(num_workers) as start_worker:
        loader = torch.utils.data.DataLoader(
            _Pieces(datasets, cache, pieces),
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
            multiprocessing_context="fork" if num_workers else None,
            worker_init_fn=start_worker,
            generator=torch.Generator(),
        )
        for item in loader:
            if isinstance(item, LdmScaleError):
                raise item
            yield item
