"""Images to measure models on: a split of a manifest, the image files of a folder, or the array of an NPZ file.

Each image comes once, uncropped but for the largest centred square, in an order that depends on the number of images
alone, so that the first N are the same for every model and no class comes first. The training's loader is not used:
it puts another sample in the place of a bad one, which here would count an image twice. What does not decode is left
out, counted and named. Files are read one after the other; decoding, which Pillow does outside Python's lock, has
threads, one batch ahead of what is being measured.
"""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm_scale.data import require_images
from ldm_scale.data.decode import DecodeSettings, decode_image, image_extension, to_pixels
from ldm_scale.data.metadata import member_bytes
from ldm_scale.data.order import shuffled
from ldm_scale.data.pictures import Picture
from ldm_scale.data.policy import BadRecord, BadSample
from ldm_scale.data.shards import Dataset, open_manifest
from ldm_scale.data.sources.image_folder import PICTURE_EXTENSIONS, file_caption, list_images
from ldm_scale.errors import ConfigError, DataError
from ldm_scale.evaluation.blocks import Block, MeasuredImages, pixel_digest, stacked_digests
from ldm_scale.telemetry.log import shows_progress

DEFAULT_SPLIT = "heldout"
NPZ = ".npz"
ORDER_SEED = 0
CROP = "largest centred square"
RESIZE = "Pillow bicubic with antialiasing (reducing_gap 3); smaller images are enlarged"
_DECODERS = 4
_Decoding = tuple[str, Future[NDArray[np.uint8]] | str]  # key, and the pixels to come or why there are none


@dataclass
class ImageSet:
    """Encoded images by number, with what identifies them."""

    source: str  # manifest, folder or file, for messages
    split: str  # "" for a folder or a file
    digest: str
    num_images: int
    read: Callable[[int], tuple[str, bytes | str]] = field(repr=False)  # key and bytes, or why there are none
    caption: Callable[[int], str] | None = field(default=None, repr=False)  # of an image, where there may be one


def open_images(path: Path, split: str | None = None) -> ImageSet:
    """The images of a manifest's split (None: heldout), of a folder and its sub-folders, or of an NPZ file.

    Raises: DataError if there are none; ConfigError if the split holds latents, or is named for a folder without a
    manifest.
    """
    if path.suffix.lower() == NPZ:
        if split is not None:
            raise ConfigError(f"--split {split}: {path} is an array, which has no splits: leave it out")
        return _open_array(path)
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
        raise DataError(
            f"--data {path}: no image ({', '.join(PICTURE_EXTENSIONS)}) and no manifest.json in this folder"
        )
    rows = [f"{name} {_size(path / name)}" for name in names]
    digest = blake2b("\n".join(rows).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return ImageSet(str(path), "", digest, len(names), _file_reader(path, names), _file_captions(path, names))


def open_split(path: Path, split: str | None = None) -> Dataset:
    """The pictures of a manifest's split (None: heldout), with what is known of them.

    Raises: DataError if there are none; ConfigError if the split holds latents.
    """
    try:
        dataset = open_manifest(path, split or DEFAULT_SPLIT)
    except DataError as error:
        # The data layer speaks of configuration keys.
        message = str(error).replace("data.split, data.validation_split", "--split")
        raise DataError(message.replace("then set data.manifest", "then give its manifest.json as --data")) from None
    require_images(dataset)
    return dataset


def content_sha256(images: ImageSet, numbers: list[int]) -> str:
    """Hash of the names and encoded bytes of these images, in their order: of all that their pixels are made from."""
    digest = hashlib.sha256()
    for number in tqdm(
        numbers, desc="hash", unit="images", mininterval=1.0, file=sys.stderr, disable=not shows_progress()
    ):
        key, data = images.read(number)
        content = data if isinstance(data, bytes) else b""
        digest.update(f"{key}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
    return digest.hexdigest()


def chosen_numbers(
    source: str, split: str, available: int, asked: int | None, option: str = "--num-images"
) -> list[int]:
    """Which images are measured, in order: the first so many (None: all) of an order that depends on `available` alone.

    Raises: ConfigError if there are not so many.
    """
    if asked is not None and not 1 <= asked <= available:
        raise ConfigError(
            f"{option} {asked}: {source} has {available} images"
            + (f" in its split {split}" if split else "")
            + f"; give 1 to {available}"
        )
    return list(map(int, shuffled(available, "evaluation", ORDER_SEED)[:asked]))


class ImageStream(MeasuredImages[Tensor]):
    """The images of a set, in blocks of (B, 3, R, R) pixels in [-1, 1] of 8-bit values, fp32.

    With `as_they_are`, an image of another size is an error and not cropped and resized. `option` is that of the number
    of images, of which none may be missing if it is given.
    """

    def __init__(
        self,
        images: ImageSet,
        resolution: int,
        batch_size: int,
        num_images: int | None = None,
        *,
        as_they_are: bool = False,
        option: str = "--num-images",
    ) -> None:
        order = chosen_numbers(images.source, images.split, images.num_images, num_images, option)
        asked = None if num_images is None else f"{option} {num_images}"
        super().__init__(order, batch_size, DecodeSettings(resolution=resolution, augment=False), asked)
        self._images, self._as_they_are = images, as_they_are

    def read(self, blocks: Iterable[int]) -> Iterator[Block[Tensor]]:
        """See `MeasuredImages.read`; the next block is decoded while one is looked at."""
        with ThreadPoolExecutor(_DECODERS) as pool:
            waiting: tuple[int, list[_Decoding]] | None = None
            for number in blocks:
                following = number, self._start(pool, self.places(number))
                if waiting is not None:
                    yield self._finish(*waiting)
                waiting = following
            if waiting is not None:
                yield self._finish(*waiting)

    def before(self, block: int) -> Tensor | None:
        """The last image before a block that can be used, (1, 3, R, R), or None if there is none."""
        for place in reversed(range(self.places(block).start)):
            key, data = self._images.read(self._order[place])
            try:
                if not isinstance(data, str):
                    return to_pixels(self._decode(data, key)[None])
            except BadSample:
                continue
        return None

    def _start(self, pool: ThreadPoolExecutor, places: range) -> list[_Decoding]:
        """Keys with decodings that are under way, or with why there is none."""
        started: list[_Decoding] = []
        for place in places:
            key, data = self._images.read(self._order[place])
            decoding = data if isinstance(data, str) else pool.submit(self._decode, data, key)
            started.append((key, decoding))
        return started

    def _decode(self, data: bytes, key: str) -> NDArray[np.uint8]:
        if self._as_they_are:
            width, height = Picture(data).size
            side = self._settings.resolution
            if (width, height) != (side, side):
                raise DataError(
                    f"{self._images.source}: {key} has {width}x{height} pixels where others have {side}x{side}, and "
                    "samples are measured as they are; give --resolution to crop and resize all of them"
                )
        return decode_image(data, self._settings, 0, key)

    def _finish(self, number: int, started: list[_Decoding]) -> Block[Tensor]:
        pixels, numbers, bad = [], [], []
        for place, (key, decoding) in zip(self.places(number), started, strict=True):
            try:
                if isinstance(decoding, str):
                    raise BadSample(decoding)
                pixels.append(decoding.result())
                numbers.append(place)
            except BadSample as error:
                bad.append(BadRecord(key, str(error)))
        digests = stacked_digests([pixel_digest(image) for image in pixels])
        return Block(number, numbers, to_pixels(np.stack(pixels)) if pixels else None, digests, bad)


def eight_bits(pixels: Tensor) -> Tensor:
    """Pixels as an image file gives them back: clamped to [-1, 1], rounded to 256 levels; fp32."""
    return ((pixels.to(torch.float32).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def picture_side(images: ImageSet) -> int:
    """Pixels along each side of the first picture that decodes, in the order of evaluation.

    Raises: DataError if it is no square, or there is none.
    """
    for number in chosen_numbers(images.source, images.split, images.num_images, None):
        key, data = images.read(number)
        try:
            if isinstance(data, str):
                continue
            width, height = Picture(data).size
        except BadSample:
            continue
        if width != height:
            raise DataError(
                f"{images.source}: {key} has {width}x{height} pixels, and squares are measured; give --resolution to "
                "crop and resize all images"
            )
        return width
    raise DataError(f"{images.source}: none of {images.num_images} images can be read as a picture")


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


def _file_captions(folder: Path, names: list[str]) -> Callable[[int], str]:
    """As `ldm-scale prepare image-folder` reads them, but "" where the folder's own name would be the caption."""

    def read(number: int) -> str:
        name = names[number]
        try:
            if "/" not in name and not (folder / name).with_suffix(".txt").is_file():
                return ""
            return file_caption(folder, name)
        except (BadSample, OSError) as error:
            raise DataError(
                f"{folder / names[number]}: its caption cannot be read ({error}); save it as UTF-8"
            ) from None

    return read


def _open_array(path: Path) -> ImageSet:
    """The pictures of an NPZ file: its only array, or the one called arr_0 or images, (N, H, W, 3) uint8."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            name = next((known for known in ("arr_0", "images") if known in names), names[0] if len(names) == 1 else "")
            if not name:
                raise DataError(f"{path}: holds {', '.join(names) or 'nothing'}; pictures are looked for in arr_0")
            array = file[name]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: this NPZ file cannot be read ({error}); write it again") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise DataError(
            f"{path}: {name} is {array.dtype} of shape {array.shape}, expected pictures: uint8 of shape (N, H, W, 3), "
            "N at least 1; numbers of other types do not say what is black and what is white"
        )

    def read(number: int) -> tuple[str, bytes | str]:
        # As a file, for one way from bytes to pixels; uncompressed, so that it costs little.
        buffer = io.BytesIO()
        Image.fromarray(array[number]).save(buffer, format="PNG", compress_level=0)
        return f"{name}[{number}]", buffer.getvalue()

    digest = blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()
    return ImageSet(str(path), "", digest, len(array), read)
