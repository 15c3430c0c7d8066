"""Aspect-ratio buckets: what is shown of a picture whose target is no square."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm_scale.data.annotations import LAYOUT, MAP, Vocabulary
from ldm_scale.data.decode import DecodeSettings, crop_box, decode_image, decode_sample
from ldm_scale.data.pipeline import collate
from ldm_scale.data.shards import RawSample
from tests.helpers.annotated import NUMBERS, PALETTE, check_boxes, scene
from tests.helpers.shards import png


@pytest.mark.parametrize(
    ("size", "largest"),
    [
        ((100, 200), (0, 3, 30, 18)),
        ((200, 100), (10, 0, 20, 20)),
        ((20, 30), (0, 0, 30, 20)),
        ((30, 40), (2, 0, 29, 20)),  # 26.67 wide, to a pixel
        ((8, 8), (5, 0, 25, 20)),
    ],
)
def test_a_bucket_shows_the_largest_box_of_its_aspect_or_a_part_of_it(
    size: tuple[int, int], largest: tuple[int, ...]
) -> None:
    array = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    settings = DecodeSettings(8, size=size)
    assert crop_box(30, 20, settings, 0, "k") == (largest, False)
    expected = Image.fromarray(array).crop(largest).resize(size[::-1], Image.Resampling.BICUBIC)
    found = decode_image(png(Image.fromarray(array)), settings, 3, "k").astype(int)
    assert np.abs(found - np.asarray(expected)).max() <= 2  # both round after each of two passes
    parts = [crop_box(30, 20, DecodeSettings(8, 0.5, size=size), epoch, "k")[0] for epoch in range(500)]
    assert all(0 <= left < right <= 30 and 0 <= top < bottom <= 20 for left, top, right, bottom in parts)
    widths, heights = (np.array([box[a + 2] - box[a] for box in parts]) for a in (0, 1))
    assert np.abs(widths - heights * size[1] / size[0]).max() <= 1
    whole = largest[2] - largest[0]
    assert (widths.min(), widths.max()) == pytest.approx((whole / 2, whole), abs=1)


@pytest.mark.parametrize("size", [(24, 48), (48, 24), (32, 40)])
def test_boxes_and_maps_of_a_bucket_show_what_its_pictures_show(size: tuple[int, int]) -> None:
    vocabulary, rng, seen = Vocabulary({}, NUMBERS, 3), np.random.default_rng(3), 0
    settings = DecodeSettings(40, 0.5, horizontal_flip=True, annotations=frozenset({LAYOUT, MAP}), size=size)
    samples = []
    for number in range(30):
        raw: RawSample = {"__key__": f"a/{number}", **scene(rng)}
        found = decode_sample(raw, settings, vocabulary, number, 0)
        assert found.image is not None
        assert found.labels is not None
        assert found.layout is not None
        assert (found.image.shape, found.labels.shape) == ((*size, 3), size)
        seen += check_boxes(found.labels, found.layout)
        left, top, right, bottom = found.layout.crop
        assert abs((right - left) * 48 - (bottom - top) * 40 * size[1] / size[0]) < 1.001
        nearest = np.abs(found.image[..., None, :] - np.array(PALETTE, float)).sum(axis=-1).argmin(axis=-1)
        assert (nearest == found.labels).mean() > 0.93
        samples.append(found)
    assert seen > 20
    batch = collate(samples, [], settings)
    assert batch.maps is not None
    assert (batch.images.shape, batch.maps.shape) == ((30, 3, *size), (30, *size))
