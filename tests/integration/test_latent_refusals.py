"""A latent cache that is not the one of the artifact and the configuration is refused before training starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.commands import refusal, stage1, stage2
from tests.helpers.latents import Members, array, encode, npy, other_artifact, rewrite
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import make_dataset

CROPS = ["--crops", "4", "--crop-scale-min", "0.6"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "data", num_samples=16, samples_per_shard=8, resolution=20)
    tiny_artifact(tmp_path / "artifact")
    return tmp_path


def _cached(folder: Path, *more: str) -> list[str]:
    manifest = f"data.manifest={folder / 'cache' / 'manifest.json'}"
    return stage2(folder, folder / "run", manifest, "data.crop_scale_min=1", *more)


def test_stage_1_refuses_latents(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encode(small, "--max-shards", "1")
    line = refusal(capfd, stage1(small, small / "run", f"data.manifest={small / 'cache' / 'manifest.json'}"), 2)
    assert "holds 1 latent shards in its split 'train' where pictures are needed" in line


def test_a_cache_of_another_artifact(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encode(small)
    old = json.loads((small / "cache" / "manifest.json").read_text())["latents"]["artifact_sha256"]
    (small / "artifact").rename(small / "old")
    other_artifact(small / "artifact")
    line = refusal(capfd, _cached(small), 2)
    new = json.loads((small / "artifact" / "config.json").read_text())["content_sha256"]
    assert f"holds latents of the autoencoder {old[:12]}, artifact={small / 'artifact'} is {new[:12]}" in line


@pytest.mark.parametrize(
    ("changes", "override", "message"),
    [
        ({"latent_channels": 4}, "autoencoder.latent_channels=4", "latents with c=3, the config's autoencoder has c=4"),
        (
            {"channel_multipliers": (1, 2, 2)},
            "autoencoder.channel_multipliers=[1,2,2]",
            "latents with f=2, the config's autoencoder has f=4",
        ),
    ],
)
def test_a_cache_of_another_f_or_c(
    small: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], override: str, message: str
) -> None:
    encode(small)
    (small / "artifact").rename(small / "old")
    other_artifact(small / "artifact", **changes)
    assert message in refusal(capfd, _cached(small, override), 2)


@pytest.mark.parametrize(
    ("options", "override", "message"),
    [
        (["--resolution", "8"], "data.resolution=16", "images of 8 pixels, the config says data.resolution=16"),
        ([], "data.horizontal_flip=true", "encoded without mirror images, the config says data.horizontal_flip=true"),
        (["--flips"], "data.horizontal_flip=false", "encoded with mirror images, the config says data.horizontal_fl"),
        ([], "data.crop_scale_min=0.9", "a scale of 1 (1 = none), the config says data.crop_scale_min=0.9"),
        (CROPS, "data.crop_scale_min=1", "a scale of 0.6 (1 = none), the config says data.crop_scale_min=1"),
        (CROPS, "data.crop_scale_min=0.7", "a scale of 0.6 (1 = none), the config says data.crop_scale_min=0.7"),
    ],
)
def test_a_cache_of_another_resolution_or_augmentation(
    small: Path, capfd: pytest.CaptureFixture[str], options: list[str], override: str, message: str
) -> None:
    encode(small, *options)
    line = refusal(capfd, _cached(small, override), 2)
    assert f"data.manifest={small / 'cache' / 'manifest.json'}" in line
    assert message in line


def test_a_cache_cut_short_or_without_a_shard(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encode(small)
    shard = small / "cache" / "train-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1024])
    line = refusal(capfd, _cached(small), 3)
    assert f"{shard}: {len(content) - 1024} bytes, but its manifest says {len(content)}" in line
    assert "`ldm-scale encode`" in line
    shard.unlink()
    assert f"{shard}: shard named in the manifest cannot be opened" in refusal(capfd, _cached(small), 3)


def _narrow(samples: dict[str, Members]) -> None:
    for members in samples.values():
        members["latents.center.npy"] = npy(array(members["latents.center.npy"])[:3])


def _nan(samples: dict[str, Members]) -> None:
    for members in samples.values():
        members["latents.center.npy"] = npy(array(members["latents.center.npy"]) * np.float16(np.nan))


def _no_moments(samples: dict[str, Members]) -> None:
    for members in samples.values():
        del members["latents.center.npy"]


def _other_type(samples: dict[str, Members]) -> None:
    for members in samples.values():
        members["latents.center.npy"] = npy(array(members["latents.center.npy"]).astype(np.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_narrow, "its latents.center.npy has shape (3, 8, 8) of float16, its manifest says (6, 8, 8) of float16"),
        (_other_type, "its latents.center.npy has shape (6, 8, 8) of float64, its manifest says (6, 8, 8) of float16"),
        (_nan, "its latents.center.npy holds NaN or infinity"),
        (_no_moments, "no member latents.center.npy"),
    ],
)
def test_moments_that_are_not_what_the_manifest_says(
    small: Path, capfd: pytest.CaptureFixture[str], change: Callable[[dict[str, Members]], None], message: str
) -> None:
    encode(small)
    rewrite(small / "cache" / "manifest.json", change, shard=1)
    line = refusal(capfd, _cached(small), 3)
    assert f"train-000001/train00008: {message}" in line


def test_a_provenance_that_was_edited(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encode(small)
    path = small / "cache" / "manifest.json"
    content = json.loads(path.read_text())
    content["latents"]["transform"]["horizontal_flip"] = True
    path.write_text(json.dumps(content))
    assert f"{path}: its transform hashes to" in refusal(capfd, _cached(small, "data.horizontal_flip=true"), 3)
    del content["latents"]
    path.write_text(json.dumps(content))
    assert f"{path}: malformed provenance of latents" in refusal(capfd, _cached(small), 3)
