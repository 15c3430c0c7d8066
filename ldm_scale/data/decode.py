"""From the bytes of a sample to pixels, caption and class.

Any image becomes RGB on white before it is cropped; crop and resize are one resampling, from a box with fractional
corners, so that no pixel is interpolated twice. Augmentation is a pure function of (seed, position, key): the same
picture at the same place of the stream whatever reads it. Pictures stay 8-bit until a whole batch is there, because
one conversion per batch is cheaper than one per picture.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image

from ldm_scale.data.latents import RECORD, LatentCache, read_moments, read_record
from ldm_scale.data.order import uniforms
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import IMAGE_EXTENSIONS, RawSample

NO_CLASS = -1  # label of a sample without a class

# 256 MiB as RGB, refused on the header before a pixel is decoded: a loader worker holds up to four such copies. Pillow
# warns above the same number, and refuses above twice of it.
MAX_IMAGE_PIXELS = 2**30 // 12
_TOO_LARGE = f"image has more than {MAX_IMAGE_PIXELS:,} pixels"

# By content, whatever the extension says. Pillow knows forty more: EPS starts another program, TIFF may hold numbers
# of 32 bits whose range nothing states.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

_PNG_BIT_DEPTH = 24  # byte of the file: after the signature and the header chunk's length, name, width and height

# EXIF's orientation: how to turn what is stored so that it stands upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow's decoders raise on malformed files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class DecodeSettings:
    """What the configuration says about pictures."""

    resolution: int  # pixels along each side
    crop_scale_min: float = 1.0  # smallest side of the random crop as a share of the picture's shorter side
    horizontal_flip: bool = False
    augment: bool = True  # False: the largest centred square, never flipped
    seed: int = 0


@dataclass(frozen=True)
class DecodedSample:
    """One usable sample: a picture, or moments of its latents from a cache.

    Shapes: image (H, W, 3), 8-bit RGB; moments (C, h, w) in the cache's type.
    """

    image: NDArray[np.uint8] | None
    caption: str
    label: int
    key: str
    position: int
    moments: NDArray[Any] | None = None


def open_rgb(data: bytes) -> Image.Image:
    """The picture upright, in RGB, transparency on white; of an animation the first frame.

    Colour profiles are not applied: values are taken as sRGB, as in every published training set.

    Raises: BadSample if the bytes are no complete picture, or one of more than MAX_IMAGE_PIXELS.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise BadSample(_TOO_LARGE)
        image.load()
        image = _upright(image)
        if image.mode.startswith("I;16"):
            image = _eight_bit(image)
        else:
            _scale_transparent_colour(image, data)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except Image.DecompressionBombError:
        raise BadSample(_TOO_LARGE) from None
    except _DECODE_ERRORS:
        raise BadSample("image does not decode") from None


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data ask; as it is stored where they are damaged.

    Not `ImageOps.exif_transpose`: it also writes the other EXIF fields anew, and fails on what cameras put there.
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (*_DECODE_ERRORS, AttributeError):
        return image
    return image if turn is None else image.transpose(turn)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16 bits of grey as 8, by the nearest value (Pillow's own conversion clips); the transparent one white."""
    values = np.asarray(image)
    pixels = (values / 257).round().astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        pixels[values == transparent] = 255
    return Image.fromarray(pixels)


def _scale_transparent_colour(image: Image.Image, data: bytes) -> None:
    """Nothing; a PNG's transparent colour is in 8 bits, as its pixels are.

    Pillow scales pixels of 1, 2, 4 and 16 bits to 8 and leaves that colour as the file has it. Of 16 bits it keeps the
    high byte, so that colours which differ in the low one alone are transparent too.
    """
    colour = image.info.get("transparency")
    depth = data[_PNG_BIT_DEPTH] if image.format == "PNG" else 8
    if image.mode == "L" and isinstance(colour, int) and depth < 8:
        image.info["transparency"] = colour * (255 // (2**depth - 1))
    elif image.mode == "RGB" and isinstance(colour, tuple) and depth == 16:
        image.info["transparency"] = tuple(channel >> 8 for channel in colour)


def crop_box(
    width: int, height: int, settings: DecodeSettings, position: int, key: str
) -> tuple[tuple[float, float, float, float], bool]:
    """(left, top, right, bottom) of the square to show, in pixels of the picture, and whether to mirror it."""
    shorter = min(width, height)
    scale, across, down, mirror = uniforms(4, "augment", settings.seed, position, key)
    side = float(shorter)
    if not settings.augment or settings.crop_scale_min >= 1.0:
        across = down = 0.5
    else:
        side *= settings.crop_scale_min + (1.0 - settings.crop_scale_min) * scale
    left, top = across * (width - side), down * (height - side)
    box = (left, top, min(left + side, width), min(top + side, height))
    return box, settings.augment and settings.horizontal_flip and mirror < 0.5


def decode_image(data: bytes, settings: DecodeSettings, position: int, key: str) -> NDArray[np.uint8]:
    """The picture cropped, resized and perhaps mirrored.

    Shapes: returns (resolution, resolution, 3).
    Raises: BadSample if it does not decode.
    """
    return fit_picture(open_rgb(data), settings, position, key)


def fit_picture(image: Image.Image, settings: DecodeSettings, position: int, key: str) -> NDArray[np.uint8]:
    """An RGB picture cropped, resized and perhaps mirrored. Shapes: returns (resolution, resolution, 3)."""
    return render(image, *crop_box(*image.size, settings, position, key), settings.resolution)


def render(
    image: Image.Image, box: tuple[float, float, float, float], mirror: bool, resolution: int
) -> NDArray[np.uint8]:
    """A square of an RGB picture, resized and perhaps mirrored. Shapes: returns (resolution, resolution, 3)."""
    size = (resolution, resolution)
    # reducing_gap: at large ratios a cheap box filter first, as long as 3 pixels per output pixel stay for the bicubic.
    image = image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    if mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def to_pixels(images: NDArray[np.uint8]) -> torch.Tensor:
    """Pixels in [-1, 1] as fp32, in channels_last memory (the layout that convolutions run in here).

    Shapes: images (B, H, W, 3); returns (B, 3, H, W).
    """
    return torch.from_numpy(images).to(torch.float32).mul_(1.0 / 127.5).sub_(1.0).permute(0, 3, 1, 2)


def read_caption(sample: RawSample, metadata: dict[str, Any]) -> str:
    """The caption: member .txt, else "caption" in the metadata, else the empty caption.

    Raises: BadSample if it is not UTF-8 or not a string.
    """
    if "txt" in sample:
        try:
            return _bytes(sample, "txt").decode("utf-8").strip()
        except UnicodeDecodeError:
            raise BadSample("caption is not UTF-8") from None
    caption = metadata.get("caption")
    if caption is None:
        return ""
    if not isinstance(caption, str):
        raise BadSample("caption is not a string")
    return caption.strip()


def read_metadata(sample: RawSample) -> dict[str, Any]:
    """The member .json, {} if there is none.

    Raises: BadSample if it is no JSON object.
    """
    if "json" not in sample:
        return {}
    try:
        metadata = json.loads(_bytes(sample, "json"))
    except (ValueError, RecursionError):
        raise BadSample("metadata is not JSON") from None
    if not isinstance(metadata, dict):
        raise BadSample("metadata is not a JSON object")
    return metadata


def read_class(sample: RawSample, metadata: dict[str, Any]) -> int | str | None:
    """The class as stored: member .cls, else "class" in the metadata; a number where it reads as one, else a name.

    None if there is neither.
    Raises: BadSample if the metadata's class is of another type.
    """
    if "cls" in sample:
        stored: Any = _bytes(sample, "cls").decode("utf-8", "replace").strip()
        return int(stored) if re.fullmatch("[0-9]{1,9}", stored) else str(stored)
    stored = metadata.get("class")
    if stored is None or (isinstance(stored, int | str) and not isinstance(stored, bool)):
        return stored
    raise BadSample("class is neither a number nor a name")


def read_label(sample: RawSample, metadata: dict[str, Any], class_numbers: dict[str, int]) -> int:
    """The class's number in the manifest's list, NO_CLASS if the sample has none.

    Raises: BadSample if it is not listed.
    """
    stored = read_class(sample, metadata)
    if stored is None:
        return NO_CLASS
    label = class_numbers.get(stored, NO_CLASS) if isinstance(stored, str) else stored
    if not 0 <= label < len(class_numbers):
        raise BadSample("class is not in the manifest's list")
    return label


def decode_sample(
    sample: RawSample,
    settings: DecodeSettings,
    class_numbers: dict[str, int],
    position: int,
    latents: LatentCache | None = None,
) -> DecodedSample:
    """A usable sample from a raw one; `latents` describes the manifest's latent shards, if it has any.

    Raises: BadSample with the reason; DataError if a cached sample is not what its manifest says.
    """
    key = str(sample["__key__"])
    cached = latents is not None and RECORD in sample
    extension = image_extension(sample)
    if cached and "unusable" in (record := read_record(sample)):
        raise BadSample(record["unusable"])
    if extension is None and not cached:
        raise BadSample(f"no image ({', '.join(IMAGE_EXTENSIONS)})")
    metadata = read_metadata(sample)
    caption = read_caption(sample, metadata)
    label = read_label(sample, metadata, class_numbers)
    if latents is not None and cached:
        moments = read_moments(sample, latents.variant(settings, position, key), latents)
        return DecodedSample(None, caption, label, key, position, moments)
    assert extension is not None, "a sample without a picture has moments, or was refused above"
    return DecodedSample(
        decode_image(_bytes(sample, extension), settings, position, key), caption, label, key, position
    )


def image_extension(sample: RawSample) -> str | None:
    """Extension of the member that is the sample's picture, None if it has none."""
    return next((extension for extension in IMAGE_EXTENSIONS if extension in sample), None)


def _bytes(sample: RawSample, extension: str) -> bytes:
    """A member of a raw sample."""
    member = sample[extension]
    assert isinstance(member, bytes), extension
    return member
