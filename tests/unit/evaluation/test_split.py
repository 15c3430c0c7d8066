"""The samples that models are measured on: those of `ImageStream`, with what is known of them."""

from pathlib import Path

import torch

from ldm_scale.data.annotations import LAYOUT, MAP
from ldm_scale.evaluation.images import ImageStream, open_images, open_split
from ldm_scale.evaluation.split import SplitStream
from tests.helpers.scenes import make_squares


def test_images_are_those_of_the_image_stream(tmp_path: Path) -> None:
    manifest = make_squares(tmp_path, 7, 16, bad=2)
    images = ImageStream(open_images(manifest), 16, 4, 6)
    pixels = torch.cat(list(images))
    for batch_size in (2, 7):
        stream = SplitStream(open_split(manifest), 16, frozenset({LAYOUT, MAP}), batch_size, 6)
        batches = list(stream)
        assert torch.equal(torch.cat([batch.images for batch in batches]), pixels)
        assert stream.pixels_digest == images.pixels_digest
        assert (stream.wanted, stream.num_images) == (6, len(pixels))
        assert stream.bad.counts == images.bad.counts
        assert stream.bad.names == images.bad.names
        numbers = [number for batch in batches for number in batch.image_numbers.tolist()]
        assert numbers == sorted(set(numbers)), "places in the order, of what was left out too"
        for batch in batches:
            assert batch.layouts is not None
            assert batch.maps is not None
            for layout, labels, caption in zip(batch.layouts, batch.maps, batch.captions, strict=True):
                (item,) = layout.objects
                left, top, right, bottom = (round(16 * value) for value in item.box)
                assert (labels[top:bottom, left:right] == item.label + 1).all()
                assert ("red", "green", "blue")[item.label] in caption


def test_maps_are_read_on_request_alone(tmp_path: Path) -> None:
    (batch,) = SplitStream(open_split(make_squares(tmp_path, 3, 16)), 16, frozenset(), 8, None)
    assert batch.maps is None
    assert batch.layouts is None
