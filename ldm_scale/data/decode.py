"""From the bytes of a sample to pixels, caption, class, boxes and label map.

Any image becomes RGB on white before it is cropped; crop and resize are one resampling, from a box with fractional
corners, so that no pixel is interpolated twice. Augmentation is a pure function of (seed, epoch, key): a picture looks
the same in an epoch whatever reads it, and wherever in the epoch it stands. Pictures stay 8-bit until a whole batch is
there, because one conversion per batch is cheaper than one per picture.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image

from ldm_scale.data.annotations import (
    LAYOUT,
    MAP,
    MAP_EXTENSION,
    TEXT,
    Layout,
    View,
    Vocabulary,
    layout_of,
    read_map,
    read_objects,
)
from ldm_scale.data.latents import RECORD, LatentCache, read_context, read_moments, read_record, read_view
from ldm_scale.data.metadata import choose_caption, member_bytes, read_captions, read_label, read_metadata
from ldm_scale.data.permutation import uniforms
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import IMAGE_EXTENSIONS, RawSample

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
    crop_scale_min: float = 1.0  # smallest side of the random crop as a share of the largest that the picture holds
    horizontal_flip: bool = False
    augment: bool = True  # False: the largest centred crop, never flipped
    seed: int = 0
    annotations: frozenset[str] = frozenset()  # LAYOUT, MAP: what samples must have besides; TEXT: if the cache has
    size: tuple[int, int] | None = None  # (height, width) in pixels of an aspect-ratio bucket; None = a square

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of what is shown, in pixels."""
        return self.size or (self.resolution, self.resolution)


@dataclass(frozen=True)
class DecodedSample:
    """One usable sample: a picture, or moments of its latents from a cache, and the annotations that were asked for.

    Shapes: image (H, W, 3), 8-bit RGB; moments (C, h, w) in the cache's type; labels (H, W).
    """

    image: NDArray[np.uint8] | None
    caption: str
    label: int
    key: str
    position: int  # in the stream of all epochs
    moments: NDArray[Any] | None = None
    layout: Layout | None = None
    labels: NDArray[np.uint8] | None = None  # of the map
    text_context: NDArray[np.float16] | None = None  # (M, d) of the caption, from a cache


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
    width: int, height: int, settings: DecodeSettings, epoch: int, key: str
) -> tuple[tuple[float, float, float, float], bool]:
    """(left, top, right, bottom) of what to show, in pixels of the picture, and whether to mirror it.

    Of the target's aspect ratio: the largest box that the picture holds, or a random part of it.
    """
    target_height, target_width = settings.shape
    scale, across, down, mirror = uniforms(4, "augment", settings.seed, epoch, key)
    # Products before quotients: of a square target both sides are the picture's shorter one, to the last bit.
    box_width = min(float(width), height * target_width / target_height)
    box_height = min(float(height), width * target_height / target_width)
    if not settings.augment or settings.crop_scale_min >= 1.0:
        across = down = 0.5
    else:
        share = settings.crop_scale_min + (1.0 - settings.crop_scale_min) * scale
        box_width, box_height = box_width * share, box_height * share
    left, top = across * (width - box_width), down * (height - box_height)
    box = (left, top, min(left + box_width, width), min(top + box_height, height))
    return box, settings.augment and settings.horizontal_flip and mirror < 0.5


def decode_image(data: bytes, settings: DecodeSettings, epoch: int, key: str) -> NDArray[np.uint8]:
    """The picture cropped, resized and perhaps mirrored.

    Shapes: returns (H, W, 3) as the settings say.
    Raises: BadSample if it does not decode.
    """
    return fit_picture(open_rgb(data), settings, epoch, key)


def fit_picture(image: Image.Image, settings: DecodeSettings, epoch: int, key: str) -> NDArray[np.uint8]:
    """An RGB picture cropped, resized and perhaps mirrored. Shapes: returns (H, W, 3) as the settings say."""
    return render(image, *crop_box(*image.size, settings, epoch, key), settings.shape)


def render(
    image: Image.Image, box: tuple[float, float, float, float], mirror: bool, shape: tuple[int, int]
) -> NDArray[np.uint8]:
    """A part of an RGB picture, resized to `shape` (H, W) and perhaps mirrored. Shapes: returns (H, W, 3)."""
    height, width = shape
    # reducing_gap: at large ratios a cheap box filter first, as long as 3 pixels per output pixel stay for the bicubic.
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    if mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def to_pixels(images: NDArray[np.uint8]) -> torch.Tensor:
    """Pixels in [-1, 1] as fp32, in channels_last memory (the layout that convolutions run in here).

    Shapes: images (B, H, W, 3); returns (B, 3, H, W).
    """
    return torch.from_numpy(images).to(torch.float32).mul_(1.0 / 127.5).sub_(1.0).permute(0, 3, 1, 2)


def decode_sample(
    sample: RawSample,
    settings: DecodeSettings,
    vocabulary: Vocabulary,
    position: int,
    epoch: int,
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
    captions = read_captions(sample, metadata)
    caption = choose_caption(captions, settings.augment, settings.seed, epoch, key)
    label = read_label(sample, metadata, vocabulary.classes)
    image: NDArray[np.uint8] | None = None
    moments: NDArray[Any] | None = None
    context: NDArray[np.float16] | None = None
    if latents is not None and cached:
        variant = latents.variant(settings, epoch, key)
        moments = read_moments(sample, variant, latents)
        if TEXT in settings.annotations and latents.text is not None:
            context = read_context(sample, captions.index(caption), latents.text)
        view = read_view(record, variant, key) if settings.annotations else None
    else:
        assert extension is not None, "a sample without a picture has moments, or was refused above"
        picture = open_rgb(member_bytes(sample, extension))
        view = View(picture.size, *crop_box(*picture.size, settings, epoch, key))
        image = render(picture, view.box, view.mirror, settings.shape)
    layout, labels = _annotations(sample, metadata, settings, vocabulary, view)
    return DecodedSample(image, caption, label, key, position, moments, layout, labels, context)


def _annotations(
    sample: RawSample, metadata: dict[str, Any], settings: DecodeSettings, vocabulary: Vocabulary, view: View | None
) -> tuple[Layout | None, NDArray[np.uint8] | None]:
    """The objects and the map of what is shown, None for what was not asked for.

    Raises: BadSample if what was asked for is missing or malformed.
    """
    layout, labels = None, None
    if view is not None and LAYOUT in settings.annotations:
        layout = layout_of(read_objects(metadata, vocabulary.objects), view)
    if view is not None and MAP in settings.annotations:
        content = member_bytes(sample, MAP_EXTENSION) if MAP_EXTENSION in sample else None
        labels = read_map(content, vocabulary.num_map_labels, view, settings.shape)
    return layout, labels


def image_extension(sample: RawSample) -> str | None:
    """Extension of the member that is the sample's picture, None if it has none."""
    return next((extension for extension in IMAGE_EXTENSIONS if extension in sample), None)
