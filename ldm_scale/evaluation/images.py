"""Images to measure models on: a split of a manifest, or the image files of a folder.

Each image comes once, uncropped but for the largest centred square, in an order that depends on the number of images
alone, so that the first N are the same for every model and no class comes first. The training's loader is not used:
it puts another sample in the place of a bad one, which here would count an image twice. What does not decode is left
out, counted and named. Files are read one after the other; decoding, which Pillow does outside Python's lock, has
threads, one batch ahead of what is being measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm_scale.data import require_images
from ldm_scale.data.decode import DecodeSettings, decode_image, image_extension, to_pixels
from ldm_scale.data.metadata import member_bytes
from ldm_scale.data.order import shuffled
from ldm_scale.data.policy import BadRecord, BadSample, BadSampleLog
from ldm_scale.data.shards import IMAGE_EXTENSIONS, Dataset, open_manifest
from ldm_scale.data.sources.image_folder import list_images
from ldm_scale.errors import ConfigError, DataError

DEFAULT_SPLIT = "heldout"
ORDER_SEED = 0
CROP = "largest centred square"
RESIZE = "Pillow bicubic with antialiasing (reducing_gap 3); smaller images are enlarged"
_DECODERS = 4
_Decoding = tuple[str, Future[NDArray[np.uint8]] | str]  # key, and the pixels to come or why there are none


@dataclass
class ImageSet:
    """Encoded images by number, with what identifies them."""

    source: str  # manifest or folder, for messages
    split: str  # "" for a folder
    digest: str
    num_images: int
    read: Callable[[int], tuple[str, bytes | str]] = field(repr=False)  # key and bytes, or why there are none


def open_images(path: Path, split: str | None = None) -> ImageSet:
    """The images of a manifest's split (None: heldout), or of a folder and its sub-folders.

    Raises: DataError if there are none; ConfigError if the split holds latents, or is named for a folder without a
    manifest.
    """
    if path.is_file() or (path / "manifest.json").is_file():
        dataset = open_split(path, split)
        return ImageSet(
            str(dataset.manifest_path), dataset.split, dataset.digest, dataset.num_samples, _shard_reader(dataset)
        )
    if not path.is_dir():
        raise DataError(f"--data {path}: no such manifest or folder; give a manifest.json or a folder of images")
    if split is not None:
        raise ConfigError(
            f"--split {split}: {path} is a folder without a manifest.json, which has no splits: leave it out"
        )
    names = list_images(path)
    if not names:
        raise DataError(f"--data {path}: no image ({', '.join(IMAGE_EXTENSIONS)}) and no manifest.json in this folder")
    rows = [f"{name} {_size(path / name)}" for name in names]
    digest = blake2b("\n".join(rows).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return ImageSet(str(path), "", digest, len(names), _file_reader(path, names))


def open_split(path: Path, split: str | None = None) -> Dataset:
    """The pictures of a manifest's split (None: heldout), with what is known of them.

    Raises: DataError if there are none; ConfigError if the split holds latents.
    """
    try:
        dataset = open_manifest(path, split or DEFAULT_SPLIT)
    except DataError as error:
        # The data layer speaks of configuration keys.
        raise DataError(str(error).replace("data.split, data.validation_split", "--split")) from None
    require_images(dataset)
    return dataset


def chosen_numbers(source: str, split: str, available: int, asked: int | None) -> list[int]:
    """Which images are measured, in order: the first so many (None: all) of an order that depends on `available` alone.

    Raises: ConfigError if there are not so many.
    """
    if asked is not None and not 1 <= asked <= available:
        raise ConfigError(
            f"--num-images {asked}: {source} has {available} images"
            + (f" in its split {split}" if split else "")
            + f"; give 1 to {available}"
        )
    return list(map(int, shuffled(available, "evaluation", ORDER_SEED)[:asked]))


class MeasuredImages:
    """What a stream of images to measure tells of itself.

    `bad` is what was left out, `num_images` what came, `pixels_digest` the hash of what came (complete when the
    iteration is).
    """

    def __init__(self, order: list[int], batch_size: int, settings: DecodeSettings) -> None:
        self.num_images = 0
        self.bad = BadSampleLog()
        self._order, self._batch_size, self._settings = order, batch_size, settings
        self._hash = blake2b(digest_size=16)

    @property
    def wanted(self) -> int:
        """How many were asked for."""
        return len(self._order)

    @property
    def pixels_digest(self) -> str:
        """Hash of the 8-bit pixels in their order."""
        return self._hash.hexdigest()


class ImageStream(MeasuredImages):
    """Iterable once over the batches of an image set, (B, 3, R, R) pixels in [-1, 1] of 8-bit values, fp32."""

    def __init__(self, images: ImageSet, resolution: int, batch_size: int, num_images: int | None = None) -> None:
        order = chosen_numbers(images.source, images.split, images.num_images, num_images)
        super().__init__(order, batch_size, DecodeSettings(resolution=resolution, augment=False))
        self._images = images

    def __iter__(self) -> Iterator[Tensor]:
        order = self._order
        parts = [order[begin : begin + self._batch_size] for begin in range(0, len(order), self._batch_size)]
        with ThreadPoolExecutor(_DECODERS) as pool:
            following = self._start(pool, parts[0])
            for index in range(len(parts)):
                current, following = following, self._start(pool, parts[index + 1]) if index + 1 < len(parts) else []
                pixels = self._finish(current)
                if len(pixels):
                    yield to_pixels(pixels)

    def _start(self, pool: ThreadPoolExecutor, numbers: list[int]) -> list[_Decoding]:
        """Keys with decodings that are under way, or with why there is none."""
        started: list[_Decoding] = []
        for number in numbers:
            key, data = self._images.read(number)
            decoding = data if isinstance(data, str) else pool.submit(decode_image, data, self._settings, 0, key)
            started.append((key, decoding))
        return started

    def _finish(self, started: list[_Decoding]) -> NDArray[np.uint8]:
        side = self._settings.resolution
        pixels = []
        for key, decoding in started:
            try:
                if isinstance(decoding, str):
                    raise BadSample(decoding)
                pixels.append(decoding.result())
                self._hash.update(pixels[-1].tobytes())
            except BadSample as error:
                self.bad.add([BadRecord(key, str(error))])
        self.num_images += len(pixels)
        return np.stack(pixels) if pixels else np.empty((0, side, side, 3), np.uint8)


def eight_bits(pixels: Tensor) -> Tensor:
    """Pixels as an image file gives them back: clamped to [-1, 1], rounded to 256 levels; fp32."""
    return ((pixels.to(torch.float32).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def _size(path: Path) -> int:
    """Bytes of a file, -1 if there is none behind a link."""
    return path.stat().st_size if path.exists() else -1


def _shard_reader(dataset: Dataset) -> Callable[[int], tuple[str, bytes | str]]:
    def read(number: int) -> tuple[str, bytes | str]:
        sample = dataset.read(number)
        extension = image_extension(sample)
        return str(sample["__key__"]), "no image" if extension is None else member_bytes(sample, extension)

    return read


def _file_reader(folder: Path, names: list[str]) -> Callable[[int], tuple[str, bytes | str]]:
    def read(number: int) -> tuple[str, bytes | str]:
        try:
            return names[number], (folder / names[number]).read_bytes()
        except OSError as error:
            return names[number], f"file cannot be read ({error.strerror})"

    return read
