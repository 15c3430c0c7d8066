"""From a picture's file to 8-bit RGB pixels of a part of it.

Any picture becomes upright RGB on white before it is cropped; crop and resize are one bicubic resampling with
antialiasing, so that no pixel is interpolated twice. Pillow decodes: what it bundles is kept up to date, and it bounds
and refuses what others do not. torch resizes: Pillow's own arithmetic, to 1 of 255, several times as fast.

Of a large JPEG the decoder itself makes a half, a quarter or an eighth of each side, for a fraction of the time, as
long as the part that is shown keeps `_KEPT` pixels for each of the result along both sides. Corners of the part are
multiples of that reduction, so that it is the same part.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from ldm_scale.data.policy import BadSample

if TYPE_CHECKING:
    from ldm_scale.data.annotations import Box

# 256 MiB as RGB, refused on the header before a pixel is decoded: a loader worker holds up to four such copies. Pillow
# warns above the same number, and refuses above twice of it.
MAX_IMAGE_PIXELS = 2**30 // 12
TOO_LARGE = f"image has more than {MAX_IMAGE_PIXELS:,} pixels"

# By content, whatever the extension says. Pillow knows forty more: EPS starts another program, TIFF may hold numbers
# of 32 bits whose range nothing states.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

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

_SIDES_CHANGE_PLACES = frozenset(_TURNS[orientation] for orientation in (5, 6, 7, 8))

# Of what they all begin with, for the reason that is written down: what else lies under a picture's name.
_NO_PICTURES = (
    (re.compile(rb"\s*<"), "an HTML or XML page"),
    (re.compile(rb"\s*[{\[]"), "JSON"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "EPS"),
    (re.compile(rb"%PDF"), "PDF"),
    (re.compile(rb"II\*\0|MM\0\*"), "TIFF"),
    (re.compile(rb"....ftyp(avi[fs]|hei[cx]|mif1|msf1)", re.DOTALL), "AVIF or HEIF"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "JPEG XL"),
    (re.compile(rb"\0+$"), "zeros"),
)

# A scan of a progressive JPEG costs a pass over the picture and may take ten bytes; encoders write about ten scans.
_MAX_SCANS = 64
_SCAN = b"\xff\xda"

# What Pillow's decoders raise on malformed files.
DECODE_ERRORS = (
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

_KEPT = 2  # pixels per pixel of the result, along each side, that a JPEG's reduction leaves at least


class Picture:
    """A picture's file, of which the header is read at first and pixels when they are shown.

    `size` is (width, height) of the upright picture in pixels.
    """

    def __init__(self, data: bytes) -> None:
        """Raises: BadSample if it is no picture, or one of more than MAX_IMAGE_PIXELS."""
        self._data = data
        self._reduction = 1
        self._pixels: Image.Image | None = None
        image = _open(data)
        if isinstance(image, JpegImageFile):
            self._turn = _turn(image)
            swapped = self._turn in _SIDES_CHANGE_PLACES
            self.size: tuple[int, int] = (image.height, image.width) if swapped else image.size
            self._jpeg: JpegImageFile | None = image
        else:  # of others EXIF data may follow the pixels, and no decoder reduces them
            self._jpeg = None
            self._pixels = _rgb(image, data)
            self.size = self._pixels.size

    def render(self, box: Box, mirror: bool, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """The part of the picture in a box with whole corners, resized to `shape` (H, W) and perhaps mirrored.

        Shapes: returns (H, W, 3).
        Raises: BadSample if the picture does not decode.
        """
        left, top, right, bottom = (int(corner) for corner in box)
        assert (left, top, right, bottom) == tuple(box), f"a box with whole corners, not {box}"
        n = self._reduction_for((left, top, right, bottom), shape)
        pixels = self._decoded(n)
        part = (left // n, top // n, right // n, bottom // n)
        # np.array, not asarray: torch wants memory that it may write to.
        shown = resize(np.array(pixels if part == (0, 0, *pixels.size) else pixels.crop(part)), shape)
        return np.ascontiguousarray(shown[:, ::-1]) if mirror else shown

    def _reduction_for(self, box: tuple[int, int, int, int], shape: tuple[int, int]) -> int:
        """By how much the decoder reduces each side to show a box."""
        if self._jpeg is None:
            return 1
        n = reduction_of(box[2] - box[0], box[3] - box[1], shape)
        aligned = not any(corner % n for corner in box)
        # The last, incomplete pixel of a reduced side would come first where that side is turned round.
        whole = self._turn is None or not any(side % n for side in self.size)
        return n if aligned and whole else 1

    def _decoded(self, reduction: int) -> Image.Image:
        """The upright picture in RGB, each side reduced; kept until another reduction is asked for."""
        if self._pixels is None or reduction != self._reduction:
            image = self._jpeg if self._pixels is None else _open(self._data)
            assert isinstance(image, JpegImageFile), "only these are reduced"
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))
            self._pixels, self._reduction = _rgb(image, self._data), reduction
            wanted = tuple(-(-side // reduction) for side in self.size)
            assert self._pixels.size == wanted, f"reduced to {self._pixels.size}, not {wanted}"
        return self._pixels


def reduction_of(width: int, height: int, shape: tuple[int, int]) -> int:
    """By how much each side of a box may be reduced (1, 2, 4 or 8) before it is resized to `shape` (H, W)."""
    return next((n for n in (8, 4, 2) if width >= _KEPT * n * shape[1] and height >= _KEPT * n * shape[0]), 1)


def resize(pixels: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """The pixels resized to `shape` (H, W), bicubic with antialiasing. Shapes: pixels (h, w, 3); returns (H, W, 3)."""
    if pixels.shape[:2] == shape:
        return pixels
    # With the batch's axis put first torch sees a channels_last tensor, and makes one; else the result lies in planes.
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized: NDArray[np.uint8] = (
        F.interpolate(image, size=shape, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    )
    return resized


def open_rgb(data: bytes) -> Image.Image:
    """The whole picture upright, in RGB, transparency on white; of an animation the first frame.

    Raises: BadSample if the bytes are no complete picture, or one of more than MAX_IMAGE_PIXELS.
    """
    return _rgb(_open(data), data)


def _open(data: bytes) -> Image.Image:
    """The picture of which the header alone is read.

    Raises: BadSample as `open_rgb`.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadSample(TOO_LARGE) from None
    except DECODE_ERRORS as error:
        raise BadSample(_fault(error, data)) from None
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise BadSample(TOO_LARGE)
    # In pixels' data the marker cannot stand; a thumbnail or a profile may hold it a few times.
    if isinstance(image, JpegImageFile) and data.count(_SCAN) > _MAX_SCANS:
        raise BadSample(f"image has more than {_MAX_SCANS} scans")
    return image


def _fault(error: Exception, data: bytes) -> str:
    """Why a picture cannot be used, from what Pillow raised and from its bytes."""
    if not data:
        return "image is empty"
    cut_webp = data[:4] == b"RIFF" and len(data) < 8 + int.from_bytes(data[4:8], "little")
    if cut_webp or "truncated" in str(error).lower():
        return "image is cut short"
    if isinstance(error, UnidentifiedImageError):
        kind = next((kind for beginning, kind in _NO_PICTURES if beginning.match(data)), None)
        return "image does not decode" if kind is None else f"image is {kind}"
    return "image does not decode"


def _rgb(image: Image.Image, data: bytes) -> Image.Image:
    """An opened picture as `open_rgb` returns it.

    Colour profiles are not applied: values are taken as sRGB, as in every published training set.

    Raises: BadSample if it does not decode.
    """
    try:
        image.load()
        turn = _turn(image)
        if turn is not None:
            image = image.transpose(turn)
        if image.mode.startswith("I;16"):
            image = _eight_bit(image)
        else:
            _scale_transparent_colour(image, data)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image if image.mode == "RGB" else image.convert("RGB")
    except DECODE_ERRORS as error:
        raise BadSample(_fault(error, data)) from None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How to turn the picture as its EXIF data ask; None: it stands upright, or they are damaged.

    Not `ImageOps.exif_transpose`: it also writes the other EXIF fields anew, and fails on what cameras put there.
    """
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (*DECODE_ERRORS, AttributeError):
        return None


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
