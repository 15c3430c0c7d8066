"""The samples of a manifest's split with all that is known of them, to measure conditioned models on.

The images and their order are those of `ImageStream`: unaugmented, each once. What cannot be used, for want of a
picture, boxes or a map, is left out, counted and named.
"""

from __future__ import annotations

from collections.abc import Iterator

from ldm_scale.data import Batch
from ldm_scale.data.annotations import MAP, MAP_EXTENSION
from ldm_scale.data.batch import collate
from ldm_scale.data.decode import DecodedSample, DecodeSettings, decode_sample
from ldm_scale.data.policy import BadRecord, BadSample
from ldm_scale.data.shards import Dataset
from ldm_scale.evaluation.images import MeasuredImages, chosen_numbers


class SplitStream(MeasuredImages):
    """Iterable once over the batches of a split's first images. `Batch.image_numbers` are positions in their order."""

    def __init__(
        self, dataset: Dataset, resolution: int, annotations: frozenset[str], batch_size: int, num_images: int | None
    ) -> None:
        order = chosen_numbers(str(dataset.manifest_path), dataset.split, dataset.num_samples, num_images)
        super().__init__(
            order, batch_size, DecodeSettings(resolution=resolution, augment=False, annotations=annotations)
        )
        self._dataset = dataset
        self._unwanted = frozenset() if MAP in annotations else frozenset({MAP_EXTENSION})

    def __iter__(self) -> Iterator[Batch]:
        for begin in range(0, len(self._order), self._batch_size):
            bad: list[BadRecord] = []
            samples = [
                sample
                for position in range(begin, min(begin + self._batch_size, len(self._order)))
                if (sample := self._usable(position, bad)) is not None
            ]
            self.bad.add(bad)
            self.num_images += len(samples)
            if samples:
                yield collate(samples, [], self._settings)

    def _usable(self, position: int, bad: list[BadRecord]) -> DecodedSample | None:
        """The sample of a position, or None after it went to `bad`."""
        raw = self._dataset.read(self._order[position], leave_out=self._unwanted)
        try:
            sample = decode_sample(raw, self._settings, self._dataset.vocabulary, position, epoch=0)
        except BadSample as error:
            bad.append(BadRecord(str(raw["__key__"]), str(error)))
            return None
        assert sample.image is not None, "a split of pictures"
        self._hash.update(sample.image.tobytes())
        return sample
