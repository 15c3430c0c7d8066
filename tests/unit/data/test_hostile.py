"""What others put into shards: bombs, foreign formats, text in any encoding, JSON that few readers agree about."""

from __future__ import annotations

import io
import json
import logging
import resource
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from ldm_scale.data.annotations import View, Vocabulary, open_map, read_map, read_objects
from ldm_scale.data.decode import DecodeSettings, decode_image, decode_sample
from ldm_scale.data.metadata import MAX_CAPTION_CHARACTERS, decode_text, read_class, read_metadata
from ldm_scale.data.pictures import MAX_IMAGE_PIXELS, Picture, open_rgb
from ldm_scale.data.policy import BadSample
from ldm_scale.telemetry import log
from tests.helpers.pictures import raw_png, save
from tests.helpers.shards import png

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
PLAIN = DecodeSettings(8)
NAMES = Vocabulary({"bar": 0, "foo": 1})


def _sized(form: str, width: int, height: int) -> bytes:
    """A small picture whose header says that it is of this size."""
    data = bytearray(save(Image.new("RGB", (8, 8)), form, **({"lossless": True} if form == "WEBP" else {})))
    if form == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif form == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif form == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif form == "WEBP":  # VP8L: 14 bits each of width - 1 and height - 1 after the signature
        at = data.index(b"\x2f", 20) + 1
        data[at : at + 4] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    else:
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("side", [10_000, 16_000])  # below and above what Pillow itself refuses
@pytest.mark.filterwarnings("ignore:Image size")
def test_bombs_of_any_format_are_refused_on_their_header(form: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _sized(form, side, side)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    before, begin_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for reader in (open_rgb, Picture, lambda content: decode_image(content, PLAIN, 0, "k")):
        with pytest.raises(BadSample, match=r"^image has more than 89,478,485 pixels$"):
            reader(data)
    assert time.perf_counter() - begin_s < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@pytest.mark.filterwarnings("ignore:Image size")
def test_bombs_among_label_maps_are_refused_on_their_header(monkeypatch: pytest.MonkeyPatch) -> None:
    width = 10_000
    data = raw_png(width, 1, 8, 0, bytes(width))
    data = data[:20] + struct.pack(">I", 10_000) + data[24:29] + struct.pack(">I", 0) + data[33:]
    data = data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    with pytest.raises(BadSample, match=r"^label map has more than 89,478,485 pixels$"):
        open_map(data, None)
    with pytest.raises(BadSample, match=r"^label map has more than 89,478,485 pixels$"):
        read_map(data, 3, View((10_000, 10_000), (0, 0, 8, 8), mirror=False), (8, 8))
    assert width * 10_000 > MAX_IMAGE_PIXELS


def test_a_jpeg_of_a_thousand_scans_is_refused_before_it_is_decoded() -> None:
    data = save(NOISE.resize((512, 512)), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    scan = data[start:-2]
    assert open_rgb(data[:-2] + scan * 10 + data[-2:]).size == (512, 512)
    begin_s = time.perf_counter()
    with pytest.raises(BadSample, match=r"^image has more than 64 scans$"):
        open_rgb(data[:-2] + scan * 1000 + data[-2:])
    assert time.perf_counter() - begin_s < 0.5


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image is empty"),
        (bytes(4096), "image is zeros"),
        (b"\n <!DOCTYPE html><html>404", "image is an HTML or XML page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image is an HTML or XML page"),
        (b'{"error": "not found"}', "image is JSON"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image is EPS"),
        (b"\xc5\xd0\xd3\xc6" + bytes(28), "image is EPS"),
        (b"%PDF-1.7\n", "image is PDF"),
        (save(NOISE, "TIFF"), "image is TIFF"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "image is AVIF or HEIF"),
        (b"\xff\x0a\x10\x20", "image is JPEG XL"),
        (b"\x1f\x8b\x08", "image does not decode"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        decode_sample({"__key__": "s/k", "jpg": data}, PLAIN, NAMES, 0, 0)
    assert str(caught.value) == reason


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.4, 0.8])
def test_a_picture_that_is_cut_says_so(form: str, share: float) -> None:
    data = save(NOISE, form)
    with pytest.raises(BadSample, match=r"^image is cut short$"):
        decode_image(data[: int(share * len(data))], PLAIN, 0, "k")


def test_exif_data_that_point_at_themselves_end() -> None:
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, 8) for tag in (0x8769, 0x8825, 0xA005)) + struct.pack(
        ">HHIHH", 0x0112, 3, 1, 6, 0
    )
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 4) + entries + struct.pack(">I", 8)
    begin_s = time.perf_counter()
    for form in ("JPEG", "PNG", "WEBP"):
        assert open_rgb(save(NOISE.crop((0, 0, 8, 4)), form, exif=exif)).size in {(8, 4), (4, 8)}
    assert time.perf_counter() - begin_s < 1


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("\ufeffcaf\u00e9".encode(), "caf\u00e9"),
        ("caf\u00e9 \U0001f34e\n".encode("utf-16"), "caf\u00e9 \U0001f34e"),
        (b"\xfe\xff" + "caf\u00e9".encode("utf-16-be"), "caf\u00e9"),
        ("caf\u00e9".encode("utf-32"), "caf\u00e9"),
        ("caf\u00e9 \u201cnoir\u201d".encode("cp1252"), "caf\u00e9 \u201cnoir\u201d"),
        (b"\xef\xbb\xbf", ""),
        (b"", ""),
    ],
)
def test_text_in_other_encodings_is_what_was_meant(data: bytes, text: str) -> None:
    sample = decode_sample({"__key__": "s/k", "png": png(NOISE), "txt": data}, PLAIN, NAMES, 0, 0)
    assert sample.caption == decode_text(data, "caption") == text


def test_that_text_is_read_as_cp1252_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    log._said.clear()
    log.get_logger().addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, log.get_logger().name):
        for _ in range(3):
            decode_text(b"caf\xe9", "caption")
    log.get_logger().removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {
        "data: text that is not UTF-8 (caption) is read as cp1252"
    }


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"a\x81b\xe9"}, "caption is not text in UTF-8, UTF-16 or cp1252"),
        ({"txt": b"\xff\xfea"}, "caption is not text in UTF-8, UTF-16 or cp1252"),  # half a character
        ({"txt": b"\xef\xbb\xbf\xe9"}, "caption is not text in UTF-8, UTF-16 or cp1252"),
        ({"txt": b"a\0b"}, "caption holds a null character"),
        ({"txt": "cat".encode("utf-16-le")}, "caption holds a null character"),
        ({"json": b'{"caption": "a\\u0000b"}'}, "caption holds a null character"),
        ({"json": b'{"captions": ["fine", "a\\u0000b"]}'}, "caption holds a null character"),
        ({"json": b'{"caption": "\\ud83c"}'}, "caption holds half a surrogate pair"),
        ({"txt": b"x" * (MAX_CAPTION_CHARACTERS + 1)}, "caption has more than 65,536 characters"),
        ({"cls": b"\x81"}, "class is not text in UTF-8, UTF-16 or cp1252"),
        ({"cls": "f\u00f4o".encode()}, "class is not in the manifest's list"),
        ({"cls": b"9" * 5000}, "class is not in the manifest's list"),
        ({"json": b'{"class": 1' + b"0" * 400 + b"}"}, "class is not in the manifest's list"),
        ({"json": b'{"class": 1' + b"0" * 5000 + b"}"}, "metadata is not JSON"),  # Python's bound on digits
        ({"json": b'{"class": 1e999}'}, "class is neither a number nor a name"),
        ({"json": b'{"a": ' * 100_000 + b"1" + b"}" * 100_000}, "metadata is not JSON"),
        ({"json": b'{"x":' + b"[" * 100_000}, "metadata is not JSON"),
        ({"json": b'{"caption": "a", "caption": "b"}'}, "metadata gives a key twice"),
        ({"json": b'{"objects": [{"class": 0, "class": 1}]}'}, "metadata gives a key twice"),
        ({"json": b"null"}, "metadata is not a JSON object"),
        ({"json": b"NaN"}, "metadata is not a JSON object"),
        ({"json": b'"text"'}, "metadata is not a JSON object"),
        ({"json": b""}, "metadata is not JSON"),
        ({"json": b"\xff\xff"}, "metadata is not JSON"),
        ({"json": b"{'caption': 'python'}"}, "metadata is not JSON"),
    ],
)
def test_hostile_text_and_metadata_say_why(members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        decode_sample({"__key__": "s/k", "png": png(NOISE), **members}, PLAIN, NAMES, 0, 0)
    assert str(caught.value) == reason


def test_a_number_that_is_none_is_null() -> None:
    raw: Any = {"json": b'{"aesthetic": NaN, "class": -Infinity, "caption": NaN, "width": Infinity}'}
    assert set(read_metadata(raw).values()) == {None}
    sample = decode_sample({"__key__": "s/k", "png": png(NOISE), **raw}, PLAIN, NAMES, 0, 0)
    assert (sample.caption, sample.label) == ("", -1)


@pytest.mark.parametrize("text", ['{"class": "foo"}', '{"class": "foo", "caption": "caf\u00e9"}'])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_metadata_may_be_in_any_unicode(text: str, encoding: str) -> None:
    assert read_metadata({"__key__": "s/k", "json": text.encode(encoding)}) == json.loads(text)


def test_a_class_of_digits_is_a_number_and_in_any_script_a_name() -> None:
    assert read_class({"__key__": "k", "cls": b" 12\n"}, {}) == 12
    assert read_class({"__key__": "k", "cls": "\u0661\u0662".encode()}, {}) == "\u0661\u0662"


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e999", "NaN", "-Infinity", "true", '"1"', "null", "[1]"])
def test_boxes_of_numbers_that_no_double_holds(value: str) -> None:
    raw: Any = {"json": f'{{"objects": [{{"class": 0, "box": [0, 0, {value}, 1]}}]}}'.encode()}
    with pytest.raises(BadSample, match=r"box is not \[x, y, width, height\] in finite numbers"):
        read_objects(read_metadata(raw), {"cat": 0})


def test_pixels_of_every_frame_but_the_first_stay_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (16, 16), (number, 0, 0)) for number in range(20)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.seek", lambda image, frame: pytest.fail("another frame"))
    assert decode_image(buffer.getvalue(), PLAIN, 0, "k").shape == (8, 8, 3)
