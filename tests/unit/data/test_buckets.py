"""Aspect-ratio buckets: their sizes by brute force, the assignment, and the manifest."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_scale.data import open_manifest
from ldm_scale.data.manifest import read_manifest, read_split
from ldm_scale.data.sources.buckets import BucketOptions, bucket_sizes, kept_buckets, nearest
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.errors import DataError
from ldm_scale.prepare import main
from tests.helpers.shards import png, write_tar


@pytest.mark.parametrize(
    ("resolution", "step", "aspect"), [(256, 64, 2.0), (512, 64, 2.5), (100, 8, 3.0), (64, 64, 1.0)]
)
def test_sizes_are_all_that_cannot_grow(resolution: int, step: int, aspect: float) -> None:
    area = resolution**2
    sides = range(step, area // step + 1, step)
    fitting = {(h, w) for h in sides for w in sides if h * w <= area}
    largest = {(h, w) for h, w in fitting if (h + step, w) not in fitting and (h, w + step) not in fitting}
    found = bucket_sizes(BucketOptions(resolution, step, aspect))
    assert set(found) == {(h, w) for h, w in largest if max(h, w) <= aspect * min(h, w)}
    assert found == sorted(found)
    if resolution % step == 0:
        assert (resolution, resolution) in found
    assert all(h * w > 0.7 * area for h, w in found)


def test_no_bucket_fits() -> None:
    with pytest.raises(DataError, match="no bucket fits"):
        bucket_sizes(BucketOptions(32, 64))


def test_the_nearest_aspect_in_logarithms() -> None:
    sizes = [(192, 320), (256, 256), (320, 192)]
    pictures = np.array([(100, 100), (1000, 500), (500, 1000), (130, 100), (100, 130), (128, 100)])
    wanted = [
        min(range(3), key=lambda k: abs(math.log(w / h) - math.log(sizes[k][1] / sizes[k][0])))
        for w, h in pictures.tolist()
    ]
    assert nearest(pictures, sizes).tolist() == wanted == [1, 0, 2, 0, 2, 1]


def test_small_buckets_join_their_neighbours() -> None:
    sizes = [(128, 256), (192, 320), (256, 256), (320, 192), (256, 128)]
    assert kept_buckets(np.array([10, 10, 10, 10, 10]), sizes, 0.1) == sizes
    assert kept_buckets(np.array([1, 50, 1000, 50, 1]), sizes, 0.01) == sizes[1:4]
    assert kept_buckets(np.array([6, 6, 1000, 0, 0]), sizes, 0.01) == [sizes[1], sizes[2]]  # two small ones make one
    assert kept_buckets(np.array([0, 0, 0, 1, 0]), sizes, 0.5) == [sizes[3]]


def test_a_manifest_of_buckets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    shapes = [(64, 64)] * 10 + [(80, 48)] * 6 + [(48, 80)] * 3 + [(200, 20)]
    order = rng.permutation(len(shapes)).tolist()
    samples = [(f"{n:02d}", {"png": png(Image.new("RGB", shapes[k]))}) for n, k in enumerate(order)]
    tars = [write_tar(tmp_path / f"s{k}.tar", samples[5 * k : 5 * k + 5]) for k in range(4)]
    index_tars(tars, tmp_path / "manifest.json", "train")
    out = tmp_path / "buckets.json"
    arguments = ["buckets", str(tmp_path / "manifest.json"), "--resolution", "64", "--step", "16", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "   64 x 64              10   50.00%    0.00%" in printed
    split = read_split(out, "train")
    sizes = bucket_sizes(BucketOptions(64, 16))
    keys: dict[tuple[int, int], list[str]] = {size: [] for size in sizes}
    for n, k in enumerate(order):
        w, h = shapes[k]
        keys[min(sizes, key=lambda s: abs(math.log(w / h) - math.log(s[1] / s[0])))].append(f"s{n // 5}/{n:02d}")
    keys = {size: names for size, names in keys.items() if names}
    assert [part.size for part in split.parts] == list(keys)
    assert list(open_manifest(out, "train").keys()) == [key for names in keys.values() for key in names]
    entry = read_manifest(out)["splits"]["train"]
    assert entry["num_samples"] == 20
    wide = next(part for part in entry["parts"] if part["size"][0] < part["size"][1])
    kept = [
        min(w / h / (wide["size"][1] / wide["size"][0]), wide["size"][1] / wide["size"][0] / (w / h))
        for w, h in [(80, 48)] * 6 + [(200, 20)]
    ]
    assert wide["num_samples"] == 7
    assert wide["cropped"] == pytest.approx(1 - sum(kept) / 7, abs=1e-5)
    first = {key: n for n, key in enumerate(open_manifest(tmp_path / "manifest.json", "train").keys())}
    dataset, whole = open_manifest(out, "train"), open_manifest(tmp_path / "manifest.json", "train")
    assert all(dataset.read(n) == whole.read(first[key]) for n, key in enumerate(dataset.keys()))
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("reused: ")
    with pytest.raises(DataError, match="has buckets already"):
        main(["buckets", str(out), "--resolution", "64", "--out", str(tmp_path / "x.json")])
    # A filter keeps the buckets.
    assert main(["filter", str(out), "--max-aspect", "1.2", "--out", str(tmp_path / "square.json")]) == 0
    assert [part.size for part in read_split(tmp_path / "square.json", "train").parts] == [(64, 64)]
