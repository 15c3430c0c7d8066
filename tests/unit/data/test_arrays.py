"""Members that are arrays, against numpy's own reader; what a cached sample is read without."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest

from ldm_scale.data.annotations import Vocabulary
from ldm_scale.data.arrays import all_finite, array_of
from ldm_scale.data.batch import collate
from ldm_scale.data.decode import DecodedSample, DecodeSettings, decode_sample
from ldm_scale.data.latents import LatentCache, LatentTransform, refused
from ldm_scale.data.metadata import may_name
from ldm_scale.data.policy import BadSample
from ldm_scale.errors import DataError
from tests.helpers.latents import npy
from tests.helpers.shards import make_sample

CACHE = LatentCache("0" * 64, "kl", 8, 4, LatentTransform(256))
PLAIN = DecodeSettings(256)


def sample_of(moments: np.ndarray, **members: bytes) -> dict[str, Any]:
    record = {"size": [512, 512], "variants": {"center": {"box": [0, 0, 512, 512], "flip": False}}}
    return {
        "__key__": "s/a",
        "latents.center.npy": npy(moments),
        "latents.json": json.dumps(record).encode(),
        "txt": b"a cat",
        "json": b'{"url": "http://a/b.jpg"}',
        **members,
    }


def moments() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((8, 32, 32)).astype(np.float16)


def decoded(sample: dict[str, Any]) -> DecodedSample:
    return decode_sample(sample, PLAIN, Vocabulary({"cat": 0, "dog": 1}), 0, 0, CACHE)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", "|u1", "<i8"])
@pytest.mark.parametrize("shape", [(8, 32, 32), (3,), (1, 1), ()])
def test_arrays_are_numpys_and_no_copies(dtype: str, shape: tuple[int, ...]) -> None:
    content = npy((np.random.default_rng(0).random(shape) * 100).astype(dtype))
    mapped = memoryview(b"xx" + content)[2:]
    for member in (content, mapped):
        found = array_of({"__key__": "k", "a.npy": member}, "a.npy")
        np.testing.assert_array_equal(found, np.load(io.BytesIO(content)))
        assert found.dtype == np.load(io.BytesIO(content)).dtype
        assert np.shares_memory(found, np.frombuffer(member, np.uint8))
        assert not found.flags.writeable


def _version_2(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, values, version=(2, 0))
    return buffer.getvalue()


WHOLE = npy(moments())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x01",
        b"junk" * 40,
        WHOLE[:-1],
        WHOLE + b"\0",
        WHOLE[:100],
        WHOLE.replace(b"(8, 32, 32)", b"(8, 32, 99)"),
        WHOLE.replace(b"(8, 32, 32)", b"(-8,32,-32)"),
        WHOLE.replace(b"'<f2'", b"'|O2'"),
        WHOLE.replace(b"'<f2'", b"'<f2 "),
        WHOLE.replace(b"'shape'", b"[shape]"),
        npy(np.asfortranarray(moments())),
        npy(np.array([{}], dtype=object)),
        _version_2(moments()),
    ],
)
def test_what_is_no_array_of_numbers_names_key_and_member(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^s/k: its a.npy cannot be read \(.+\); encode its shard anew$"):
        array_of({"__key__": "s/k", "a.npy": content}, "a.npy")


def test_finite_halves_are_numpys_for_every_pattern() -> None:
    patterns = np.arange(65536, dtype=np.uint16).view(np.float16)
    assert [all_finite(patterns[n : n + 1]) for n in range(65536)] == np.isfinite(patterns).tolist()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_one_number_that_is_not_finite_is_found_among_others(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(dtype)
    values[:4] = 0.0, -0.0, np.finfo(dtype).max, np.finfo(dtype).min
    assert all_finite(values)
    assert all_finite(values[:0])
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for rest in (values, np.abs(values), -np.abs(values)):
            spoilt = rest.copy()
            spoilt[517] = bad
            assert not all_finite(spoilt)


def test_a_batch_names_the_sample_whose_latents_are_not_finite() -> None:
    spoilt = moments()
    spoilt[3, 2, 1] = np.nan
    samples = [decoded(sample_of(moments()) | {"__key__": f"s/{n}"}) for n in range(4)]
    samples[2] = decoded(sample_of(spoilt) | {"__key__": "s/2"})
    with pytest.raises(DataError, match=r"^s/2: its latents\.\*\.npy holds NaN or infinity; encode its shard anew$"):
        collate(samples, [], PLAIN)
    samples[2] = samples[1]
    batch = collate(samples, [], PLAIN)
    assert batch.moments is not None
    np.testing.assert_array_equal(batch.moments[2].numpy(), moments())


def test_of_a_cached_sample_nothing_is_parsed_that_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded(sample_of(moments()))  # the header of the .npy, once
    for module, name in ((json, "loads"), (np, "load"), (np.lib.format, "read_magic")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("parsed"))
    sample = decoded(sample_of(moments()))
    assert (sample.caption, sample.label) == ("a cat", -1)
    assert sample.moments is not None
    np.testing.assert_array_equal(sample.moments, moments())


def test_of_a_cached_sample_everything_is_parsed_that_is_needed() -> None:
    assert decoded(sample_of(moments(), json=b'{"class": "dog"}')).label == 1
    assert decoded(sample_of(moments(), json=b'{"captions": ["a dog"]}')).caption == "a dog"
    assert decoded(sample_of(moments(), json='{"class": "dog"}'.encode("utf-16"))).label == 1
    assert decoded(sample_of(moments(), json=b'{"\\u0063lass": 1}')).label == 1
    without = sample_of(moments(), json=b'{"caption": "a bird"}')
    del without["txt"]
    assert decoded(without).caption == "a bird"


def test_whether_metadata_may_have_a_name() -> None:
    assert not may_name({"__key__": "k"}, "class")
    for content, expected in (
        (b'{"a": 1}', False),
        (b'{"class": 1}', True),
        (b' {"a": 1}', True),
        (b'{"a": "\\u0063"}', True),
        ('{"a": 1}'.encode("utf-16"), True),
        ('{"a": 1}'.encode("utf-16-le"), True),
        (b'\xef\xbb\xbf{"a": 1}', True),
    ):
        assert may_name({"__key__": "k", "json": content}, "captions", "class") is expected


@pytest.mark.parametrize("content", [b'{"unusable": "image is empty"}', b' {\n"unusable":"image is empty"}'])
def test_a_cached_sample_that_cannot_be_used_says_so(content: bytes) -> None:
    for member in (content, memoryview(content)):
        sample = {"__key__": "s/a", "latents.json": member}
        assert refused(sample) == "image is empty"
        with pytest.raises(BadSample, match=r"^image is empty$"):
            decoded(sample)
    with pytest.raises(DataError, match=r"^s/a: its latents.json is missing or malformed"):
        refused({"__key__": "s/a", "latents.json": b'{"none": 1}'})


def test_members_may_be_views_of_a_mapped_file() -> None:
    rng = np.random.default_rng(0)
    for plain in (sample_of(moments(), json=b'{"class": 1}'), {"__key__": "s/b", **make_sample(1, 300, rng)}):
        views = {name: member if name == "__key__" else memoryview(member) for name, member in plain.items()}
        one, other = (
            decode_sample(sample, PLAIN, Vocabulary({name: n for n, name in enumerate("abc")}), 0, 0, CACHE)
            for sample in (plain, views)
        )
        assert (one.caption, one.label, one.key) == (other.caption, other.label, other.key)
        for a, b in ((one.image, other.image), (one.moments, other.moments)):
            assert (a is None) == (b is None)
            assert a is None or np.array_equal(a, b)
