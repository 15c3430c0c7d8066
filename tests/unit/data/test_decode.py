from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.data.annotations import Vocabulary
from ldm_scale.data.decode import (
    DecodeSettings,
    crop_box,
    decode_image,
    decode_sample,
    to_pixels,
)
from ldm_scale.data.metadata import NO_CLASS
from ldm_scale.data.pictures import open_rgb
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import RawSample
from tests.helpers.pictures import save
from tests.helpers.shards import png

PLAIN = DecodeSettings(resolution=8)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damaged_pictures_are_bad_samples(damage: str, form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = bytearray(save(Image.fromarray(noise), form))
    if damage == "empty":
        data = bytearray()
    elif damage == "text":
        data = bytearray(b"<html>not found</html>")
    elif damage == "cut":
        data = data[: len(data) // 2]
    else:
        data[:32] = bytes(byte ^ 0xFF for byte in data[:32])
    reasons = {
        "empty": "is empty",
        "text": "is an HTML or XML page",
        "cut": "is cut short",
        "flipped": "does not decode",
    }
    with pytest.raises(BadSample, match=f"^image {reasons[damage]}$"):
        open_rgb(bytes(data))


def test_random_bytes_in_a_picture_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for form in ("PNG", "JPEG", "WEBP"):
        whole = save(Image.fromarray(noise), form)
        for _ in range(150):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), 4):
                data[at] = rng.integers(0, 256)
            with contextlib.suppress(BadSample):
                open_rgb(bytes(data))


def test_without_augmentation_the_largest_centred_square_is_shown() -> None:
    rng = np.random.default_rng(1)
    array = rng.integers(0, 256, (20, 41, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(array[:, 11:31]).resize((8, 8), Image.Resampling.BICUBIC), dtype=int)
    for settings in (PLAIN, DecodeSettings(8, crop_scale_min=0.5, horizontal_flip=True, augment=False)):
        assert crop_box(41, 20, settings, 3, "k") == ((11, 0, 31, 20), False)
        assert np.abs(decode_image(png(Image.fromarray(array)), settings, 3, "k") - expected).max() <= 1


def test_a_picture_of_the_right_size_stays_as_it_is() -> None:
    array = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(png(Image.fromarray(array)), PLAIN, 0, "k"), array)


def test_random_crops_stay_inside_have_the_asked_sizes_and_depend_on_seed_epoch_and_key() -> None:
    settings = DecodeSettings(240, crop_scale_min=0.5, horizontal_flip=True, seed=1)
    boxes = [crop_box(300, 200, settings, epoch, "a/b") for epoch in range(2000)]
    sides = np.array([right - left for (left, _, right, _), _ in boxes])
    assert all(0 <= left < right <= 300 and 0 <= top < bottom <= 200 for (left, top, right, bottom), _ in boxes)
    assert np.allclose(sides, [bottom - top for (_, top, _, bottom), _ in boxes])
    assert (sides.min(), sides.max()) == (100, 200)
    assert abs(sides.mean() - 150) < 3
    assert (min(box[0] for box, _ in boxes), max(box[2] for box, _ in boxes)) == (0, 300)
    assert abs(np.mean([mirror for _, mirror in boxes]) - 0.5) < 0.05
    assert boxes[7] == crop_box(300, 200, settings, 7, "a/b")
    assert len({boxes[7], crop_box(300, 200, settings, 7, "a/c"), crop_box(300, 200, settings, 8, "a/b")}) == 3
    assert boxes[7] != crop_box(300, 200, DecodeSettings(240, 0.5, True, seed=2), 7, "a/b")


def test_a_sample_looks_the_same_wherever_in_an_epoch_it_stands() -> None:
    settings = DecodeSettings(8, crop_scale_min=0.5, horizontal_flip=True)
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    raw: RawSample = {"__key__": "s/k", "png": png(noise), "json": b'{"captions": ["a", "b", "c", "d", "e"]}'}
    seen = {}
    for position, epoch in ((3, 0), (40, 0), (40, 1), (40, 2)):
        sample = decode_sample(raw, settings, Vocabulary(), position, epoch)
        assert sample.position == position
        assert sample.image is not None
        seen[position, epoch] = (sample.image.tobytes(), sample.caption)
    assert seen[3, 0] == seen[40, 0]
    assert len({pixels for pixels, _ in seen.values()}) == 3
    assert len({caption for _, caption in seen.values()}) > 1


def test_a_mirrored_picture_is_the_mirror_image() -> None:
    settings = DecodeSettings(8, horizontal_flip=True)
    data = png(Image.fromarray(np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8)))
    plain = decode_image(data, PLAIN, 0, "k")
    seen = {crop_box(16, 16, settings, e, "k")[1]: decode_image(data, settings, e, "k") for e in range(20)}
    assert np.array_equal(seen[False], plain)
    assert np.array_equal(seen[True], plain[:, ::-1])


def test_pixels_span_minus_one_to_one() -> None:
    pixels = to_pixels(np.array([[[[0, 255, 51]]]], dtype=np.uint8))
    assert pixels.shape == (1, 3, 1, 1)
    assert pixels.dtype == torch.float32
    assert pixels.flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6], abs=1e-6)
    assert to_pixels(np.zeros((2, 4, 4, 3), np.uint8)).is_contiguous(memory_format=torch.channels_last)


IMAGE = png(Image.new("RGB", (4, 4)))
NAMES = Vocabulary({"bar": 0, "foo": 1})


@pytest.mark.parametrize(
    ("members", "caption", "label"),
    [
        ({"txt": "caf\u00e9 \U0001f34e\n".encode(), "cls": b"1\n"}, "caf\u00e9 \U0001f34e", 1),
        ({"json": b'{"caption": "from json", "class": 0}'}, "from json", 0),
        ({"txt": b"text wins", "json": b'{"caption": "json", "class": "foo"}'}, "text wins", 1),
        ({"json": b'{"caption": null}'}, "", NO_CLASS),
        ({"txt": b"one", "json": b'{"captions": [" several "], "class": 1}'}, "several", 1),
        ({"txt": b"one", "json": b'{"captions": []}'}, "one", NO_CLASS),
        ({}, "", NO_CLASS),
    ],
)
def test_captions_and_classes(members: dict[str, bytes], caption: str, label: int) -> None:
    sample = decode_sample({"__key__": "s/k", "png": IMAGE, **members}, PLAIN, NAMES, 5, 0)
    assert (sample.caption, sample.label, sample.key, sample.position) == (caption, label, "s/k", 5)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"png": IMAGE, "txt": b"\x81\xff"}, "caption is not text in UTF-8, UTF-16 or cp1252"),
        ({"png": IMAGE, "json": b"{"}, "metadata is not JSON"),
        ({"png": IMAGE, "json": b'{"caption": "\xff"}'}, "metadata is not JSON"),
        ({"png": IMAGE, "json": b"[]"}, "metadata is not a JSON object"),
        ({"png": IMAGE, "json": b'{"caption": 3}'}, "caption is not a string"),
        ({"png": IMAGE, "json": b'{"captions": "ab"}'}, "captions are not a list of strings"),
        ({"png": IMAGE, "json": b'{"captions": [1]}'}, "captions are not a list of strings"),
        ({"png": IMAGE, "json": b'{"class": 2}'}, "class is not in the manifest's list"),
        ({"png": IMAGE, "json": b'{"class": -1}'}, "class is not in the manifest's list"),
        ({"png": IMAGE, "cls": b"baz"}, "class is not in the manifest's list"),
        ({"png": IMAGE, "json": b'{"class": [1]}'}, "class is neither a number nor a name"),
        ({"png": b"junk"}, "image does not decode"),
        ({"txt": b"words"}, "no image (png, jpg, jpeg, webp)"),
    ],
)
def test_bad_samples_say_why(members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        decode_sample({"__key__": "s/k", **members}, PLAIN, NAMES, 0, 0)
    assert str(caught.value) == reason
