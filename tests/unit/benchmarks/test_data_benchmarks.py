"""The benchmarks of the data layer run, and their figures are what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import data_scale, data_soak, loader_cost, loader_ways, shuffle


@pytest.mark.parametrize("name", ["ours", "webdataset", "torchdata over webdataset", "mosaicml-streaming"])
def test_ways_make_batches_of_the_same_kind(tmp_path: Path, name: str) -> None:
    if name not in loader_ways.ways("pictures"):
        # The rivals are installed for the benchmark alone, never into the project's environment.
        pytest.skip(f"not installed: {loader_ways.INSTALL}")
    loader_ways.prepare(tmp_path, "pictures", 72)
    pixels, captions = next(iter(loader_ways.ways("pictures")[name](tmp_path, 0)))
    assert pixels.shape == (64, 3, 256, 256)
    assert pixels.permute(0, 2, 3, 1).is_contiguous()
    assert pixels.abs().max() <= 1.0
    assert all(caption.endswith("of a photograph") for caption in captions)


def test_latents_of_both_ways_are_those_of_the_cache(tmp_path: Path) -> None:
    loader_ways.prepare(tmp_path, "latents", 72)
    found = {}
    for name, way in loader_ways.ways("latents").items():
        batches = way(tmp_path, 0)
        pairs = [pair for _ in range(4) for pair in zip(*next(batches), strict=True)]
        found[name] = {caption: moments.numpy().tobytes() for moments, caption in pairs}
        assert len(found[name]) > 60
    common = found["ours"].keys() & found["webdataset"].keys()
    assert len(common) > 50
    assert all(found["ours"][caption] == found["webdataset"][caption] for caption in common)


def test_the_parts_of_reading_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_cost, "LOCATED", 128)
    monkeypatch.setattr(loader_cost, "REPEATS", 2)
    loader_ways.prepare(tmp_path, "pictures", 72)
    shares = loader_cost.cost(tmp_path, 100.0)["share_of_image"]
    assert set(shares) >= {"order", "index", "checksum", "read"}
    assert all(0 < share < 1 for share in shares.values())


def test_a_true_shuffle_is_the_ideal_and_storage_order_is_not() -> None:
    rng = np.random.default_rng(0)
    first, second, ideal = (
        shuffle.qualities([rng.permutation(40_000), rng.permutation(40_000)], 1000, 64) for _ in range(3)
    )
    for found in (first, second):
        values = shuffle.over_ideal(found, ideal)
        assert abs(values.pop("serial")) < 0.02
        assert list(values.values()) == pytest.approx([1, 1, 1], abs=0.05)
    stored = shuffle.over_ideal(shuffle.qualities([np.arange(40_000)] * 2, 1000, 64), ideal)
    assert stored["serial"] > 0.99
    assert stored["shards"] < 0.1
    assert stored["again"] > 100
    assert stored["moved"] == 0


def test_an_epoch_of_webdataset_has_every_sample_once() -> None:
    assert sorted(shuffle.webdataset(8, 16, 16, 4, 20, 0).tolist()) == list(range(128))


def test_memory_that_grows_is_told_from_memory_that_does_not() -> None:
    rng = np.random.default_rng(0)
    times = np.arange(5.0, 1800.0, 5.0)
    for growth, is_flat in ((0.0, True), (2.0, False)):  # MiB a minute
        rows = []
        for second, noise in zip(times, rng.normal(0, 5, len(times)), strict=True):
            memory = 400 + growth * second / 60 + noise - max(0, 300 - second)  # at first it opens shards
            rows.append([second, memory, 900.0, 300.0 - max(0, 300 - second), 3, second * 100, second % 60])
        result = data_soak.evaluate(rows)
        assert result["is_flat"] == is_flat
        assert result["mib_per_minute"] == pytest.approx(growth, abs=0.5)
        assert result["files_per_minute"] == pytest.approx(0, abs=0.01)
        assert result["images_per_s"] == pytest.approx(100)
    data_soak.table({"local": result})


def test_the_soak_is_drawn(tmp_path: Path) -> None:
    rows = [[second, 400.0, 900.0, 300.0, 3.0, second, second] for second in (5.0, 10.0)]
    data_soak.draw({"local": rows}, tmp_path / "soak.png")
    assert Image.open(tmp_path / "soak.png").width > 500


def test_a_manifest_of_many_rows_is_read_and_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_scale, "SAMPLES", 100)
    monkeypatch.setattr(data_scale, "BATCH", 128)
    manifest = data_scale.make_manifest(tmp_path, 500)
    data_scale.make_shards(manifest, 500, (0, 25_600))
    assert data_scale.read(manifest)["seconds"] > 0
    for start in (0, 25_600):
        assert data_scale.first_batches(manifest, start)["seconds"] > 0
    assert data_scale.reach(10**10)["seconds"] < 1
