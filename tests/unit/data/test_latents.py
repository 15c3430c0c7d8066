from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_scale.config.schema import DataConfig
from ldm_scale.data import build_loader, open_manifest
from ldm_scale.data.decode import DecodeSettings
from ldm_scale.data.latents import LatentCache, LatentTransform, pack_moments, read_moments
from ldm_scale.data.order import Order
from ldm_scale.errors import ConfigError, DataError
from tests.helpers.latents import array, encode, npy
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import make_dataset

CACHE = LatentCache("0" * 64, "kl", 2, 3, LatentTransform(16), "test")


def _with(**changes: Any) -> LatentCache:
    return dataclasses.replace(CACHE, transform=dataclasses.replace(CACHE.transform, **changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latents")
    make_dataset(path / "data", num_samples=20, samples_per_shard=8, resolution=20)
    tiny_artifact(path / "artifact")
    encode(path, "--max-shards", "2", "--crops", "5", "--crop-scale-min", "0.5")
    return path


def test_provenance_survives_json_and_every_field_counts() -> None:
    again = LatentCache.from_dict(json.loads(json.dumps(CACHE.to_dict())), "x")
    assert again == CACHE
    changes: list[dict[str, Any]] = [
        {"resolution": 32},
        {"random_crops": 1},
        {"crop_scale_min": 0.5},
        {"horizontal_flip": True},
        {"precision": "bf16"},
        {"dtype": "float32"},
        {"resampling": "other"},
        {"pixel_range": (0.0, 1.0)},
        {"version": 9},
    ]
    assert len(changes) == len(dataclasses.fields(LatentTransform))
    hashes = {CACHE.transform.sha256, *(_with(**change).transform.sha256 for change in changes)}
    assert len(hashes) == 10


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("f"),
        lambda d: d.pop("transform_sha256"),
        lambda d: d.update(kind="jpeg"),
        lambda d: d["transform"].update(resolution=17),
        lambda d: d.update(unknown=1),
    ],
)
def test_a_provenance_that_is_not_ours_is_refused(change: Callable[[Any], Any]) -> None:
    content = CACHE.to_dict()
    change(content)
    with pytest.raises(DataError, match=r"^x: "):
        LatentCache.from_dict(content, "x")


@pytest.mark.parametrize(("kind", "channels"), [("kl", 6), ("vq", 3), ("identity", 3)])
def test_moments_of_each_kind(kind: Any, channels: int) -> None:
    assert dataclasses.replace(CACHE, kind=kind).moments_shape == (channels, 8, 8)


def test_moments_are_kept_to_half_precision_and_never_overflow() -> None:
    moments = np.random.default_rng(0).normal(size=(6, 8, 8)).astype(np.float32)
    content = pack_moments(moments, "float16", "s/a")
    kept = read_moments({"__key__": "s/a", "latents.center.npy": content}, "center", CACHE)
    assert kept.dtype == np.float16
    np.testing.assert_allclose(kept, moments, rtol=2**-11, atol=1e-6)
    moments[2, 3, 4] = -70000
    with pytest.raises(DataError, match=r"^s/a: a moment of 70000 lies outside float16 .*--dtype float32"):
        pack_moments(moments, "float16", "s/a")
    assert array(pack_moments(moments, "float32", "s/a"))[2, 3, 4] == -70000
    moments[2, 3, 4] = np.inf
    with pytest.raises(DataError, match=r"^s/a: .* not finite"):
        pack_moments(moments, "float32", "s/a")


@pytest.mark.parametrize(
    "content",
    [b"", b"junk", npy(np.zeros((6, 8, 8), np.float16))[:-10], npy(np.array([{}], dtype=object))],
)
def test_moments_that_cannot_be_read_name_the_key(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^s/a: its latents.center.npy cannot be read"):
        read_moments({"__key__": "s/a", "latents.center.npy": content}, "center", CACHE)


def test_variants_are_drawn_evenly_by_seed_epoch_and_key() -> None:
    cache = _with(random_crops=4, crop_scale_min=0.5)
    settings = DecodeSettings(16, 0.5, seed=1)
    drawn = [cache.variant(settings, epoch, "s/a") for epoch in range(4000)]
    counts = [drawn.count(f"crop{n}") for n in range(4)]
    assert sum(counts) == 4000
    assert all(850 < count < 1150 for count in counts)
    assert drawn[:50] != [cache.variant(settings, epoch, "s/b") for epoch in range(50)]
    assert drawn[:50] != [cache.variant(dataclasses.replace(settings, seed=2), e, "s/a") for e in range(50)]
    assert cache.variant(dataclasses.replace(settings, augment=False), 3, "s/a") == "center"
    assert cache.others("crop1") == {f"latents.{name}.npy" for name in ("center", "crop0", "crop2", "crop3")}


def test_a_mixture_gives_each_sample_as_its_shard_holds_it(folder: Path) -> None:
    dataset = open_manifest(folder / "cache", "train")
    cache = dataset.latents
    assert cache is not None
    assert dataset.digest == open_manifest(folder / "data" / "manifest.json", "train").digest
    data = DataConfig(
        manifest=str(folder / "cache"), validation_split="", resolution=16, crop_scale_min=0.5, num_workers=0
    )
    settings = DecodeSettings(16, 0.5, seed=3)
    loader = build_loader(
        data, seed=3, global_batch=5, micro_batch=5, rank=0, world_size=1, num_epochs=1, accept_latents=True
    )
    num_cached = 0
    for batch in loader:
        assert batch.cached is not None
        assert batch.cached.tolist() == [key.split("/")[0] != "train-000002" for key in batch.keys]
        assert len(batch.images) == int((~batch.cached).sum())
        rows = iter([] if batch.moments is None else batch.moments)
        for key, position, cached in zip(batch.keys, batch.image_numbers.tolist(), batch.cached, strict=True):
            if cached:
                raw = dataset.read(int(Order(20, 3, 1, lanes=1).locate(np.array([position])).samples[0]))
                content = raw[f"latents.{cache.variant(settings, position // 20, key)}.npy"]
                assert isinstance(content, bytes)
                np.testing.assert_array_equal(next(rows).numpy(), array(content))
                num_cached += 1
    assert num_cached == 16


def test_only_the_variant_that_is_used_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_manifest(folder / "cache", "train")
    assert dataset.latents is not None
    whole = dataset.read(3)
    monkeypatch.setattr("ldm_scale.data.members.MAX_GAP", 600)
    lengths: list[int] = []
    plain = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: lengths.append(n) or plain(fd, n, at))
    for variant in dataset.latents.variants:
        lengths.clear()
        part = dataset.read(3, leave_out=dataset.latents.others(variant))
        names = {"__key__", "txt", "json", "latents.json", f"latents.{variant}.npy"}
        assert part == {name: content for name, content in whole.items() if name in names}
        assert sum(lengths) < sum(len(part[name]) for name in names) + 4 * 1024


def test_images_are_asked_for_and_latents_lie_there(folder: Path) -> None:
    data = DataConfig(manifest=str(folder / "cache"), resolution=16, num_workers=0)
    with pytest.raises(ConfigError, match=r"holds 2 latent shards in its split 'train' where pictures are needed"):
        build_loader(data, seed=0, global_batch=4, micro_batch=4, rank=0, world_size=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shard: shard.update(kind="audio"), "a shard of kind 'audio'"),
        (lambda shard: shard.pop("source"), "malformed manifest"),
    ],
)
def test_an_entry_of_another_kind(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    content = json.loads((folder / "cache" / "manifest.json").read_text())
    change(content["splits"]["train"]["shards"][0])
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        open_manifest(tmp_path, "train")
