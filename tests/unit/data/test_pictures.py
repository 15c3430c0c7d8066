"""What any kind of picture becomes, compared with the format's definition in numpy."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from ldm_scale.data.decode import DecodeSettings, decode_image
from ldm_scale.data.pictures import MAX_IMAGE_PIXELS, open_rgb
from ldm_scale.data.policy import BadSample
from tests.helpers.pictures import raw_png, save
from tests.helpers.shards import png


def _png_16_bit(width: int, height: int, color_type: int, row: bytes, transparent: bytes = b"") -> bytes:
    return raw_png(width, height, 16, color_type, row, transparent)


def _palette_with_transparency() -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    return save(image, "PNG", transparency=1)


RED, WHITE = (255, 0, 0), (255, 255, 255)
BLUE = [WHITE, (0, 0, 255)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(Image.new("L", (2, 1), 100)), [(100,) * 3, (100,) * 3]),
        (png(Image.new("1", (2, 1), 1)), [WHITE, WHITE]),
        (png(Image.new("RGBA", (2, 1), (255, 0, 0, 0))), [WHITE, WHITE]),
        (png(Image.new("RGBA", (2, 1), (0, 0, 0, 51))), [(204,) * 3, (204,) * 3]),
        (png(Image.new("LA", (2, 1), (0, 51))), [(204,) * 3, (204,) * 3]),
        (_palette_with_transparency(), [RED, WHITE]),
        (save(Image.new("RGB", (2, 1), RED), "PNG", transparency=RED), [WHITE, WHITE]),
        (_png_16_bit(2, 1, 0, struct.pack(">HH", 0, 257 * 200)), [(0,) * 3, (200,) * 3]),
        (_png_16_bit(2, 1, 2, struct.pack(">6H", 65535, 0, 0, 0, 0, 65535)), [RED, (0, 0, 255)]),
        (save(Image.new("RGB", (2, 1), RED), "WEBP", lossless=True), [RED, RED]),
        (_png_16_bit(2, 1, 4, struct.pack(">4H", 0, 0, 0, 257 * 51)), [WHITE, (204,) * 3]),
        (_png_16_bit(2, 1, 6, struct.pack(">8H", 65535, 0, 0, 0, 0, 0, 0, 257 * 51)), [WHITE, (204,) * 3]),
        (_png_16_bit(2, 1, 0, struct.pack(">HH", 1000, 257 * 16), struct.pack(">H", 1000)), [WHITE, (16,) * 3]),
        (_png_16_bit(2, 1, 2, struct.pack(">6H", 9, 999, 9999, 0, 0, 65535), struct.pack(">3H", 9, 999, 9999)), BLUE),
        (raw_png(2, 1, 1, 0, b"\x80", b"\0\1"), [WHITE, (0,) * 3]),
        (raw_png(2, 1, 1, 0, b"\x80", b"\0\0"), [WHITE, WHITE]),
        (raw_png(2, 1, 2, 0, b"\x60", b"\0\1"), [WHITE, (170,) * 3]),
        (raw_png(2, 1, 4, 0, b"\x5a", b"\0\5"), [WHITE, (170,) * 3]),
        (raw_png(2, 1, 8, 0, b"\x64\x10", b"\0\x64"), [WHITE, (16,) * 3]),
    ],
    ids=[
        "grey",
        "bilevel",
        "clear",
        "translucent",
        "grey-alpha",
        "palette",
        "colour-key",
        "grey-16",
        "rgb-16",
        "webp",
        "grey-alpha-16",
        "rgba-16",
        "grey-16-key",
        "rgb-16-key",
        "grey-1-key",
        "grey-1-key-0",
        "grey-2-key",
        "grey-4-key",
        "grey-8-key",
    ],
)
def test_any_kind_of_picture_becomes_rgb_on_white(data: bytes, expected: list[tuple[int, ...]]) -> None:
    image = open_rgb(data)
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in range(2)] == expected


def _noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _blocks(*channels: int) -> np.ndarray:
    """Random colours in squares of 16 pixels, which JPEG keeps to a few levels. Shapes: (64, 32, *channels)."""
    return _noise(4, 2, *channels, seed=3).repeat(16, axis=0).repeat(16, axis=1)


def test_alpha_is_laid_over_white() -> None:
    pixels = _noise(9, 7, 4)
    alpha = pixels[..., 3:] / 255.0
    expected = pixels[..., :3] * alpha + 255.0 * (1.0 - alpha)
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        found = np.asarray(open_rgb(save(Image.fromarray(pixels), form, **options)), dtype=float)
        assert np.abs(found - expected).max() <= 1.0
    grey_alpha = pixels[..., 2:]
    expected = grey_alpha[..., :1] * alpha + 255.0 * (1.0 - alpha)
    found = np.asarray(open_rgb(png(Image.fromarray(grey_alpha, "LA"))), dtype=float)
    assert np.abs(found - expected).max() <= 1.0


def test_a_palette_is_looked_up_and_its_alphas_are_used() -> None:
    colours, alphas, indices = _noise(256, 3, seed=1), _noise(256, seed=2), _noise(8, 8)
    image = Image.fromarray(indices, "P")
    image.putpalette(colours.tobytes())
    assert np.array_equal(np.asarray(open_rgb(png(image))), colours[indices])
    found = np.asarray(open_rgb(save(image, "PNG", transparency=alphas.tobytes())), dtype=float)
    share = alphas[indices][..., None] / 255.0
    assert np.abs(found - (colours[indices] * share + 255.0 * (1.0 - share))).max() <= 1.0


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3)], ids=["grey", "rgb"])
def test_16_bits_are_scaled_to_8(color_type: int, channels: int) -> None:
    row = np.random.default_rng(0).integers(0, 65536, (64, channels))
    found = np.asarray(open_rgb(_png_16_bit(64, 2, color_type, row.astype(">u2").tobytes())), dtype=float)
    assert np.abs(found - np.broadcast_to(row / 257.0, (2, 64, channels))).max() <= 1.0


@pytest.mark.parametrize("marker", [True, False])
def test_cmyk_becomes_its_colour(marker: bool) -> None:
    inks = _blocks(4)
    data = save(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0)
    start = data.index(b"\xff\xee")  # Adobe's marker: the file holds 255 - ink
    length = struct.unpack(">H", data[start + 2 : start + 4])[0]
    assert data[start + 4 : start + 9] == b"Adobe"
    if not marker:  # inverted all the same, as browsers and Pillow take it
        data = data[:start] + data[start + 2 + length :]
    share = inks / 255.0
    expected = 255.0 * (1.0 - share[..., :3]) * (1.0 - share[..., 3:])
    found = np.asarray(open_rgb(data), dtype=float)
    assert np.abs(found - expected).max() <= 6.0


def test_a_grey_jpeg_is_grey_in_all_channels() -> None:
    grey = _blocks()
    found = np.asarray(open_rgb(save(Image.fromarray(grey), "JPEG", quality=100)), dtype=int)
    assert np.abs(found - grey[..., None]).max() <= 3


# EXIF's definition: where the first row and the first column of what is stored belong in the upright picture.
STORED_BY_ORIENTATION = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright.swapaxes(0, 1)[::-1],
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],
    9: lambda upright: upright,  # no such orientation: as stored
}


@pytest.mark.parametrize("orientation", STORED_BY_ORIENTATION)
def test_a_photograph_is_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for upright, options in (
        (_blocks(3), {"form": "JPEG", "quality": 100, "subsampling": 0}),
        (_blocks(3), {"form": "PNG"}),
        (_blocks(3), {"form": "WEBP", "lossless": True}),
        (_blocks().astype(np.uint16) * 257, {"form": "PNG"}),
    ):
        stored = np.ascontiguousarray(STORED_BY_ORIENTATION[orientation](upright))
        found = np.asarray(open_rgb(save(Image.fromarray(stored), exif=exif, **options)), dtype=int)
        expected = upright if upright.ndim == 3 else upright[..., None] // 257
        assert found.shape[:2] == upright.shape[:2]
        assert np.abs(found - expected).max() <= (4 if options["form"] == "JPEG" else 0)


def _exif(*entries: bytes) -> bytes:
    """An EXIF block, big-endian, of these 12-byte entries; no end is written after them."""
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(entries)


TURN = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)


@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (b"Exif\0\0garbage", (8, 4)),
        (b"Exif\0\0II*\0\xff\xff\xff\xff", (8, 4)),
        (_exif(TURN)[:-6], (8, 4)),
        (_exif(TURN), (4, 8)),
        (_exif(struct.pack(">HHII", 0x010F, 5, 1, 2), TURN), (4, 8)),  # the maker's name as a fraction
        (_exif(struct.pack(">HHII", 0x8769, 4, 1, 0xFFFFFFF0), TURN), (4, 8)),  # a sub-block outside the file
        (_exif(struct.pack(">HHI4s", 0x0112, 2, 2, b"6\0\0\0")), (8, 4)),  # the orientation as text
    ],
    ids=["garbage", "offset", "cut", "whole", "fraction", "pointer", "text"],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_neither_loses_the_picture_nor_stops_a_run(exif: bytes, size: tuple[int, int]) -> None:
    for form in ("JPEG", "PNG", "WEBP"):
        assert open_rgb(save(Image.new("RGB", (8, 4), RED), form, exif=exif)).size == size


def test_a_colour_profile_is_not_applied() -> None:
    from PIL import ImageCms

    pixels = _noise(8, 8, 3)
    for name in ("sRGB", "XYZ"):
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()
        for icc in (profile, b"no profile"):
            data = save(Image.fromarray(pixels), "PNG", icc_profile=icc)
            assert np.array_equal(np.asarray(open_rgb(data)), pixels)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
def test_of_an_animation_the_first_frame_is_shown(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, WHITE)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = save(frames[0], form, save_all=True, append_images=frames[1:], duration=100, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.array_equal(np.asarray(open_rgb(data)), np.asarray(frames[0]))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_of_32_bits_are_refused(mode: str) -> None:
    # Only a TIFF holds them; nothing says which number is white.
    with pytest.raises(BadSample, match=r"^image is TIFF$"):
        open_rgb(save(Image.new(mode, (4, 4), 1), "TIFF"))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_pictures_of_one_pixel_or_one_row_are_their_middle(size: tuple[int, int]) -> None:
    pixels = _noise(size[1], size[0], 3)
    middle = pixels[(size[1] - 1) // 2 : size[1] // 2 + 1, (size[0] - 1) // 2 : size[0] // 2 + 1].reshape(-1, 3)
    found = decode_image(png(Image.fromarray(pixels)), DecodeSettings(resolution=8), 0, "k").astype(int)
    low, high = middle.min(axis=0).astype(int), middle.max(axis=0).astype(int)
    # Of an even number of pixels the middle lies between two: the bicubic passes them by an eighth of their distance.
    margin = (high - low) // 8 + 1
    assert (found >= low - margin).all()
    assert (found <= high + margin).all()


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (MAX_IMAGE_PIXELS + 1, 1)])
@pytest.mark.filterwarnings("ignore:Image size")
def test_too_many_pixels_are_refused_before_any_is_decoded(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = raw_png(width, 1, 1, 0, bytes(-(-width // 8)))
    data = data[:20] + struct.pack(">I", height) + data[24:29] + struct.pack(">I", 0) + data[33:]
    data = data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    with pytest.raises(BadSample, match=r"^image has more than 89,478,485 pixels$"):
        open_rgb(data)


def test_as_many_pixels_as_allowed_are_decoded() -> None:
    width = MAX_IMAGE_PIXELS // 5
    assert width * 5 == MAX_IMAGE_PIXELS
    assert open_rgb(raw_png(width, 5, 1, 0, b"\xff" * -(-width // 8))).size == (width, 5)
