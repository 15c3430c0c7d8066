"""Every image once, in one order, with what cannot be used left out by name."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.data import open_manifest, require_images
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.errors import ConfigError, DataError
from ldm_scale.evaluation.images import ImageStream, eight_bits, open_images
from tests.helpers.latents import encode
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import broken_png, make_dataset, png, write_tar


def flat_png(level: int, size: int = 16) -> bytes:
    return png(Image.new("RGB", (size, size), (level, level, level)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten flat images of levels 0, 10, ..., 90, one of which is cut short."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for i in range(10):
        data = flat_png(10 * i)
        place = tmp_path / "images" / ("sub" if i % 2 else "") / f"{i}.png"
        place.write_bytes(data[:40] if i == 3 else data)
    return tmp_path / "images"


def levels(stream: ImageStream) -> list[int]:
    return [round((image[0, 0, 0].item() + 1) * 127.5) for batch in stream for image in batch]


def test_every_image_comes_once_and_bad_ones_are_named(folder: Path) -> None:
    stream = ImageStream(open_images(folder), 16, batch_size=3)
    assert sorted(levels(stream)) == [0, 10, 20, 40, 50, 60, 70, 80, 90]
    assert stream.num_images == 9
    assert stream.bad.names == {"sub/3.png": "image does not decode"}


def test_order_and_hash_do_not_depend_on_the_batch(folder: Path) -> None:
    streams = [ImageStream(open_images(folder), 16, batch_size) for batch_size in (1, 4, 100)]
    orders = [levels(stream) for stream in streams]
    assert orders[0] == orders[1] == orders[2]
    assert orders[0] != [0, 20, 40, 60, 80, 10, 50, 70, 90]  # the files', one folder after the other
    assert len({stream.pixels_digest for stream in streams}) == 1
    first = ImageStream(open_images(folder), 16, batch_size=2, num_images=4)
    chosen = levels(first)
    assert chosen == orders[0][: len(chosen)]
    pixels = [np.full((16, 16, 3), level, np.uint8).tobytes() for level in chosen]
    each = b"".join(hashlib.blake2b(image, digest_size=16).digest() for image in pixels)
    assert first.pixels_digest == hashlib.blake2b(each, digest_size=16).hexdigest()


def test_digest_of_a_folder_changes_with_a_file(folder: Path) -> None:
    before = open_images(folder).digest
    assert before == open_images(folder).digest
    (folder / "0.png").write_bytes(flat_png(0) + b"x")
    assert open_images(folder).digest != before


def test_a_manifest_is_read_by_its_split(tmp_path: Path) -> None:
    make_dataset(tmp_path, num_samples=5, splits=("train", "heldout"))
    images = open_images(tmp_path)
    assert (images.split, images.num_images) == ("heldout", 5)
    assert open_images(tmp_path / "manifest.json", "train").split == "train"
    stream = ImageStream(images, 32, batch_size=2)
    assert [tuple(batch.shape) for batch in stream] == [(2, 3, 32, 32), (2, 3, 32, 32), (1, 3, 32, 32)]


def test_latents_are_refused_as_the_loader_refuses_them(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", num_samples=4, resolution=20, splits=("train", "heldout"))
    tiny_artifact(tmp_path / "artifact")
    encode(tmp_path, "--split", "heldout")
    cache = tmp_path / "cache" / "manifest.json"
    with pytest.raises(ConfigError) as expected:
        require_images(open_manifest(cache, "heldout"))
    with pytest.raises(ConfigError, match="where pictures are needed") as found:
        open_images(cache)
    assert str(found.value) == str(expected.value)
    assert open_images(cache, "train").num_images == 4  # its images stand there still


def test_bad_samples_of_shards_are_not_replaced(tmp_path: Path) -> None:
    samples = [(f"s{i}", {"png": broken_png() if i == 1 else flat_png(20 * i)}) for i in range(4)]
    index_tars([write_tar(tmp_path / "a.tar", samples)], tmp_path / "manifest.json", "heldout")
    stream = ImageStream(open_images(tmp_path), 16, batch_size=2)
    assert sorted(levels(stream)) == [0, 40, 60]
    assert stream.bad.names == {"a/s1": "image does not decode"}


def test_what_is_missing_is_told_in_one_line(tmp_path: Path, folder: Path) -> None:
    make_dataset(tmp_path / "data", num_samples=2)
    with pytest.raises(DataError, match=r"no split 'heldout'; it has: train \(--split\)"):
        open_images(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"--split heldout.*without a manifest\.json"):
        open_images(folder, "heldout")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image"):
        open_images(tmp_path / "empty")
    with pytest.raises(DataError, match="no such manifest or folder"):
        open_images(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"--num-images 11: .* has 10 images; give 1 to 10"):
        ImageStream(open_images(folder), 16, batch_size=2, num_images=11)


def test_eight_bits_are_what_a_file_gives_back() -> None:
    pixels = torch.tensor([-7.0, -1.0, -0.999, 0.0, 0.5, 1.0, 3.0])
    expected = [0, 0, 0, 128, 191, 255, 255]  # 127.5 rounds to the even 128, 191.25 to 191
    torch.testing.assert_close(eight_bits(pixels), torch.tensor(expected) / 127.5 - 1, rtol=0, atol=0)
    torch.testing.assert_close(eight_bits(eight_bits(pixels)), eight_bits(pixels), rtol=0, atol=0)


def test_captions_are_those_that_prepare_reads(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "red-apples/c.png", "red-apples/d.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    (tmp_path / "b.txt").write_text(" a ball\n")
    (tmp_path / "red-apples" / "d.txt").write_text("two apples")
    images = open_images(tmp_path)
    assert images.caption is not None
    keys = [images.read(number)[0] for number in range(4)]
    captions = dict(zip(keys, map(images.caption, range(4)), strict=True))
    assert captions == {
        "a.png": "",
        "b.png": "a ball",
        "red-apples/c.png": "red apples",
        "red-apples/d.png": "two apples",
    }
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"a\.png: its caption cannot be read .*save it as UTF-8"):
        images.caption(keys.index("a.png"))
