"""Damaged samples are usable or bad: nothing else is raised, nothing hangs, nothing has another shape."""

from __future__ import annotations

import json
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ldm_scale.data.annotations import LAYOUT, MAP, Vocabulary
from ldm_scale.data.batch import collate
from ldm_scale.data.decode import DecodeSettings, decode_image, decode_sample
from ldm_scale.data.latents import LatentCache, LatentTransform
from ldm_scale.data.policy import BadSample
from ldm_scale.errors import DataError
from tests.helpers.annotated import NUMBERS, scene
from tests.helpers.latents import npy
from tests.helpers.mutations import mutate, with_checksums
from tests.helpers.pictures import raw_png, save

NUMBER = 250  # of each kind
LONGEST_S = 5.0  # of one sample; the machine may be busy

NOISE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
RGB = Image.fromarray(NOISE)
SMOOTH = Image.fromarray(NOISE[:6, :8]).resize((160, 120), Image.Resampling.BICUBIC)
MORE = {"save_all": True, "append_images": [RGB.rotate(90), RGB.rotate(180)]}


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    return exif


PICTURES = {
    "jpeg": save(SMOOTH, "JPEG", exif=_exif()),
    "jpeg progressive": save(SMOOTH, "JPEG", progressive=True, quality=90),
    "jpeg cmyk": save(SMOOTH.convert("CMYK"), "JPEG"),
    "jpeg grey": save(SMOOTH.convert("L"), "JPEG"),
    "png": save(RGB, "PNG", exif=_exif()),
    "png palette": save(RGB.quantize(16), "PNG", transparency=3),
    "png 16": raw_png(40, 30, 16, 0, NOISE.tobytes()[:80], b"\0\1"),
    "png alpha": save(RGB.convert("RGBA"), "PNG"),
    "webp": save(RGB, "WEBP", exif=_exif()),
    "webp lossless": save(RGB.convert("RGBA"), "WEBP", lossless=True),
    "webp animated": save(RGB, "WEBP", duration=40, **MORE),
    "gif": save(RGB, "GIF", **MORE),
    "bmp": save(RGB, "BMP"),
    "bmp palette": save(RGB.quantize(16), "BMP"),
}
SETTINGS = (
    DecodeSettings(8),
    DecodeSettings(24, crop_scale_min=0.5, horizontal_flip=True),
    DecodeSettings(24, size=(16, 48)),
)


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.filterwarnings("ignore")  # Pillow's, about what is damaged
def test_damaged_pictures_are_shown_or_bad(kind: str) -> None:
    rng = np.random.default_rng(list(kind.encode()))
    others = list(PICTURES.values())
    outcomes: Counter[str] = Counter()
    for number in range(NUMBER):
        data = mutate(PICTURES[kind], others[int(rng.integers(len(others)))], rng)
        if kind.startswith("png") and number % 2:
            data = with_checksums(data)
        settings = SETTINGS[number % len(SETTINGS)]
        begin_s = time.perf_counter()
        try:
            shown = decode_image(data, settings, number, "k")
        except BadSample as error:
            outcomes[str(error)] += 1
        else:
            assert (shown.shape, shown.dtype) == ((*settings.shape, 3), np.uint8)
            outcomes["shown"] += 1
        assert time.perf_counter() - begin_s < LONGEST_S, f"picture {number}"
    assert outcomes["shown"] < NUMBER
    assert outcomes["shown"] > 0 or kind.startswith("png")  # most damage breaks the compressed stream of these
    assert outcomes.total() == NUMBER


@pytest.mark.filterwarnings("ignore")
def test_damaged_text_metadata_and_maps_are_used_or_bad() -> None:
    rng = np.random.default_rng(7)
    whole = scene(rng)
    whole["json"] = json.dumps({**json.loads(whole["json"]), "caption": "caf\u00e9", "score": 0.5}).encode()
    whole["txt"], whole["cls"] = "a caf\u00e9 \U0001f34e".encode(), b"foo"
    vocabulary = Vocabulary({"bar": 0, "foo": 1}, NUMBERS, 3)
    settings = DecodeSettings(16, annotations=frozenset({LAYOUT, MAP}))
    outcomes: Counter[str] = Counter()
    for number in range(1200):
        member = ("json", "txt", "cls", "seg.png")[number % 4]
        members = whole | {member: mutate(whole[member], whole["json"], rng)}
        try:
            sample = decode_sample({"__key__": "s/k", **members}, settings, vocabulary, number, 0)
        except BadSample as error:
            outcomes[str(error)] += 1
        else:
            assert sample.image is not None
            assert sample.labels is not None
            assert sample.layout is not None
            assert (sample.image.shape, sample.labels.shape) == ((16, 16, 3), (16, 16))
            assert sample.label in (0, 1)
            assert "\0" not in sample.caption
            sample.caption.encode()
            outcomes["used"] += 1
    assert outcomes["used"] > 20
    assert len(outcomes) > 8, outcomes


def test_damaged_latents_are_used_or_an_error_of_the_data() -> None:
    cache = LatentCache("0" * 64, "kl", 2, 2, LatentTransform(8))
    rng = np.random.default_rng(3)
    record = {"size": [8, 8], "variants": {"center": {"box": [0, 0, 8, 8], "flip": False}}}
    whole = {
        "latents.center.npy": npy(rng.standard_normal((4, 4, 4)).astype(np.float16)),
        "latents.json": json.dumps(record).encode(),
        "txt": b"a cat",
        "json": b'{"class": 0}',
    }
    outcomes: Counter[str] = Counter()
    for number in range(1500):
        member = list(whole)[number % 3 and number % 4]
        members = whole | {member: mutate(whole[member], whole["json"], rng)}
        try:
            sample = decode_sample({"__key__": "s/k", **members}, SETTINGS[0], Vocabulary({"a": 0}), number, 0, cache)
            batch = collate([sample], [], SETTINGS[0])
        except BadSample:
            outcomes["bad"] += 1
        except DataError as error:
            outcomes["error" if str(error).startswith("s/k: ") else "unnamed"] += 1
        else:
            assert batch.moments is not None
            assert (batch.moments.shape, batch.moments.isfinite().all()) == ((1, 4, 4, 4), True)
            outcomes["used"] += 1
    assert not outcomes["unnamed"]
    assert min(outcomes["bad"], outcomes["error"], outcomes["used"]) > 50, outcomes
