"""The samples of a manifest's split with all that is known of them, to measure conditioned models on.

The images and their order are those of `ImageStream`: unaugmented, each once. What cannot be used, for want of a
picture, boxes or a map, is left out, counted and named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ldm_scale.data import Batch
from ldm_scale.data.annotations import MAP, MAP_EXTENSION
from ldm_scale.data.batch import collate
from ldm_scale.data.decode import DecodedSample, DecodeSettings, decode_sample
from ldm_scale.data.policy import BadRecord, BadSample
from ldm_scale.data.shards import Dataset
from ldm_scale.evaluation.blocks import Block, MeasuredImages, pixel_digest, stacked_digests
from ldm_scale.evaluation.images import chosen_numbers


class SplitStream(MeasuredImages[Batch]):
    """A split's first images, in blocks that are batches. `Batch.image_numbers` are places in their order."""

    def __init__(
        self, dataset: Dataset, resolution: int, annotations: frozenset[str], batch_size: int, num_images: int | None
    ) -> None:
        order = chosen_numbers(str(dataset.manifest_path), dataset.split, dataset.num_samples, num_images)
        super().__init__(
            order,
            batch_size,
            DecodeSettings(resolution=resolution, augment=False, annotations=annotations),
            None if num_images is None else f"--num-images {num_images}",
        )
        self._dataset = dataset
        self._unwanted = frozenset() if MAP in annotations else frozenset({MAP_EXTENSION})

    def read(self, blocks: Iterable[int]) -> Iterator[Block[Batch]]:
        """See `MeasuredImages.read`."""
        for number in blocks:
            bad: list[BadRecord] = []
            samples = [sample for place in self.places(number) if (sample := self._usable(place, bad)) is not None]
            digests = stacked_digests([pixel_digest(sample.image) for sample in samples if sample.image is not None])
            batch = collate(samples, [], self._settings) if samples else None
            numbers = [] if batch is None else batch.image_numbers.tolist()
            yield Block(number, numbers, batch, digests, bad)

    def _usable(self, place: int, bad: list[BadRecord]) -> DecodedSample | None:
        """The sample of a place in the order, or None after it went to `bad`."""
        raw = self._dataset.read(self._order[place], leave_out=self._unwanted)
        try:
            sample = decode_sample(raw, self._settings, self._dataset.vocabulary, place, epoch=0)
        except BadSample as error:
            bad.append(BadRecord(str(raw["__key__"]), str(error)))
            return None
        assert sample.image is not None, "a split of pictures"
        return sample
