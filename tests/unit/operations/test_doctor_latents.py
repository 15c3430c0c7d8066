"""Every defect of a latent cache that the doctor promises to find, planted and found with its shard and key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_scale.__main__ import main
from ldm_scale.data.decode import to_pixels
from ldm_scale.data.sidecar import open_sidecar
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.interchange.artifact import read_artifact
from ldm_scale.operations import encode as encode_operation
from tests.helpers.latents import Members, array, encode, npy, other_artifact, read_tar, rewrite
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import make_dataset, make_sample, write_tar

MOMENTS = "latents.center.npy"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "data", num_samples=12, samples_per_shard=6, resolution=20)
    tiny_artifact(tmp_path / "artifact")
    return tmp_path


def examine(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str], dict]:
    """Exit status, errors as "where: what" and facts."""
    capsys.readouterr()
    arguments = [str(folder / "cache"), "--artifact", str(folder / "artifact"), *options]
    status = main(["doctor", "latents", "--json", *arguments])
    report = json.loads(capsys.readouterr().out)
    errors = [f"{f['where']}: {f['what']}" for f in report["findings"] if f["level"] == "error"]
    return status, errors, report["facts"]


@pytest.mark.parametrize("options", [[], ["--flips"], ["--flips", "--crops", "3", "--crop-scale-min", "0.5"]])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_sound_cache_has_no_finding(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], dtype: str
) -> None:
    encode(folder, *options, "--dtype", dtype)
    status, errors, facts = examine(folder, capsys)
    assert (status, errors) == (0, [])
    assert facts["train"]["scanned"] == facts["train"]["compared"] == 12
    assert facts["train"]["psnr_db"] == pytest.approx(facts["train"]["source_psnr_db"], abs=0.02)
    assert main(["doctor", "latents", str(folder / "cache"), "--artifact", str(folder / "artifact")]) == 0
    assert "12 samples scanned" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    "kind",
    [
        {"kind": "vq", "codebook_size": 16},
        {"kind": "identity", "channel_multipliers": (1,), "latent_channels": 3},
    ],
)
def test_sound_caches_of_the_other_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: dict[str, Any], dtype: str
) -> None:
    make_dataset(tmp_path / "data", num_samples=6, samples_per_shard=6, resolution=20)
    other_artifact(tmp_path / "artifact", **kind)
    report = encode(tmp_path, "--dtype", dtype, "--flips")
    assert report["moments_shape"] == ([3, 16, 16] if kind["kind"] == "identity" else [3, 8, 8])
    status, errors, facts = examine(tmp_path, capsys)
    assert (status, errors) == (0, [])
    assert facts["train"]["psnr_db"] > 60 or kind["kind"] != "identity"

    def shift(samples: dict[str, Members]) -> None:
        moments = [members[MOMENTS] for members in samples.values()]
        for members, other in zip(samples.values(), moments[1:] + moments[:1], strict=True):
            members[MOMENTS] = other

    rewrite(tmp_path / "cache" / "manifest.json", shift)
    status, errors, _ = examine(tmp_path, capsys)
    assert status == 1
    assert any("those of train-000000/train00001" in error for error in errors), errors


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (lambda x: (x + 1) / 2, "pixels in [0, 1] instead of [-1, 1]"),
        (lambda x: (x + 1) * 127.5, "pixels in 0 to 255"),
        (lambda x: x.flip(1), "red and blue swapped"),
        (lambda x: x.flip(-1), "the mirrored picture"),
    ],
)
def test_a_cache_of_wrong_pixels_is_found_and_the_cause_is_named(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[torch.Tensor], torch.Tensor],
    cause: str,
) -> None:
    monkeypatch.setattr(encode_operation, "to_pixels", lambda images: wrong(to_pixels(images)))
    encode(folder)
    monkeypatch.undo()
    status, errors, _ = examine(folder, capsys)
    assert status == 1
    named = [error for error in errors if cause in error]
    assert len(named) >= 6, errors
    assert f"{folder / 'cache' / 'train-000000.tar'} train-000000/train0000" in named[0]
    assert "dB" in named[0]
    assert len(errors) <= 13  # capped


def test_shifted_pairing_names_whose_latents_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode(folder)

    def shift(samples: dict[str, Members]) -> None:
        moments = [members[MOMENTS] for members in samples.values()]
        for members, other in zip(samples.values(), moments[1:] + moments[:1], strict=True):
            members[MOMENTS] = other

    rewrite(folder / "cache" / "manifest.json", shift)
    status, errors, _ = examine(folder, capsys)
    assert status == 1
    for number in range(5):
        assert any(
            f"train-000000/train{number:05d} " in error and f"those of train-000000/train{number + 1:05d}" in error
            for error in errors
        ), errors
    assert not any("train-000001/" in error.partition(":")[0] for error in errors)


def _alter(shard: Path, key: str, element: int) -> None:
    """One byte of a stored moment, on its place: nothing but the checksum tells."""
    sidecar = open_sidecar(shard.with_suffix(".index.safetensors"))
    samples = [sidecar.sample(row) for row in range(len(sidecar))]
    offset, size = next((s.members[MOMENTS].offset, s.members[MOMENTS].size) for s in samples if s.name == key)
    data = bytearray(shard.read_bytes())
    header = size - 6 * 8 * 8 * 2
    data[offset + header + 2 * element + 1] ^= 0x80  # the sign of a float16
    shard.write_bytes(data)


def test_altered_moments_are_found_by_the_checksum_and_the_keys_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(folder)
    shard = folder / "cache" / "train-000001.tar"
    stored = array(read_tar(shard)["train00008"][MOMENTS])
    _alter(shard, "train00008", int(np.abs(stored[:3]).argmax()))
    status, errors, _ = examine(folder, capsys, "--samples", "1")  # that one is of the other shard
    assert status == 1
    (error,) = [error for error in errors if "its sha256 is" in error]
    assert any("of train00008.latents" in other and "not those that were indexed" in other for other in errors)
    sums = [hashlib.sha256(shard.read_bytes()).hexdigest()[:12]]
    sums.append(json.loads((folder / "cache" / "manifest.json").read_text())["splits"]["train"]["shards"][1]["sha256"])
    assert error.startswith(f"{shard}: its sha256 is {sums[0]}, its manifest says {sums[1][:12]} and its index says")
    assert error.endswith("not the moments that their sources give now: train-000001/train00008")


def test_a_shard_altered_throughout_has_its_list_capped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "data", num_samples=14, samples_per_shard=14, resolution=20)
    tiny_artifact(tmp_path / "artifact")
    encode(tmp_path)
    for number in range(14):
        _alter(tmp_path / "cache" / "train-000000.tar", f"train{number:05d}", 0)
        _alter(tmp_path / "cache" / "train-000000.tar", f"train{number:05d}", 5 * 64)
    status, errors, _ = examine(tmp_path, capsys, "--samples", "1")
    assert status == 1
    (error,) = [error for error in errors if "its sha256 is" in error]
    assert error.count("train-000000/train") == 10
    assert error.endswith("train-000000/train00009 and 4 more")


def test_other_images_leave_the_checksum_s_finding_without_keys(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(folder)
    _alter(folder / "cache" / "train-000000.tar", "train00002", 0)
    make_dataset(folder / "other", num_samples=12, samples_per_shard=6, resolution=20, seed=1)
    status, errors, _ = examine(folder, capsys, "--source", str(folder / "other" / "manifest.json"))
    assert status == 1
    (error,) = [error for error in errors if "its sha256 is" in error]
    assert error.endswith("it was changed after it was encoded")


def test_bytes_that_are_no_moments_are_found_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode(folder)
    shard = folder / "cache" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # padding
    shard.write_bytes(data)
    status, errors, _ = examine(folder, capsys)
    assert status == 1
    (error,) = errors
    assert error.endswith("all moments are what their sources give now, within rounding")


@pytest.mark.parametrize("number", ["-1", "0"])
def test_no_samples_are_refused_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str], number: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "latents", str(folder), "--artifact", str(folder / "artifact"), "--samples", number])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"ldm-scale doctor latents: error: argument --samples: {number} must be at least 1"


def _swap_captions(samples: dict[str, Members]) -> None:
    a, b = samples["train00001"], samples["train00002"]
    a["txt"], b["txt"] = b["txt"], a["txt"]


def _nan(samples: dict[str, Members]) -> None:
    moments = array(samples["train00003"][MOMENTS]).copy()
    moments[1, 2, 3] = np.nan
    samples["train00003"][MOMENTS] = npy(moments)


def _duplicate(samples: dict[str, Members]) -> None:
    samples["train00004"][MOMENTS] = samples["train00001"][MOMENTS]


def _range(samples: dict[str, Members]) -> None:
    moments = array(samples["train00003"][MOMENTS]).copy()
    moments[3:] = 44.0
    samples["train00003"][MOMENTS] = npy(moments)


def _shape(samples: dict[str, Members]) -> None:
    samples["train00003"][MOMENTS] = npy(array(samples["train00003"][MOMENTS])[:, :, :-1])


def _statistics(samples: dict[str, Members]) -> None:
    moments = array(samples["train00002"][MOMENTS]).copy()
    moments[:3] *= 0.7  # the scale of the tiny artifact
    samples["train00002"][MOMENTS] = npy(moments)


def _other_crop(samples: dict[str, Members]) -> None:
    samples["train00003"]["latents.json"] = b'{"variants": {"center": {"box": [0, 0, 10, 10], "flip": false}}}'


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (_swap_captions, "train-000000/train00001: its caption is 'blue bar', its source's is 'green square'"),
        (_nan, "train-000000/train00003: its latents.center.npy holds NaN or infinity"),
        (_duplicate, "train-000000/train00004: has the moments of train-000000/train00001, whose picture is another"),
        (_range, "train-000000/train00003 (center): log-variances from 44 to 44"),
        (_shape, "train-000000/train00003: its latents.center.npy has shape (6, 8, 7)"),
        (_statistics, "they have the latent statistics applied already"),
        (_other_crop, "train-000000/train00003 (center): recorded as"),
    ],
)
def test_a_defect_of_one_sample_is_found_with_its_shard_and_key(
    folder: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Members]], None], finding: str
) -> None:
    encode(folder)
    rewrite(folder / "cache" / "manifest.json", change)
    status, errors, _ = examine(folder, capsys)
    assert status == 1
    (found, *_) = [error for error in errors if finding in error]
    assert found.startswith(str(folder / "cache" / "train-000000.tar") + " ")
    others = [error for error in errors if "train-000001" in error]
    assert not others


def test_equal_pictures_are_counted_and_no_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    samples = [(f"{n}", make_sample(n, 20, rng)) for n in range(4)]
    samples[3][1]["png"] = samples[1][1]["png"]
    (tmp_path / "data").mkdir()
    index_tars([write_tar(tmp_path / "data" / "s.tar", samples)], tmp_path / "data" / "manifest.json", "train")
    tiny_artifact(tmp_path / "artifact")
    encode(tmp_path)
    status, errors, facts = examine(tmp_path, capsys)
    assert (status, errors) == (0, [])
    assert facts["train"]["duplicates_of_equal_images"] == 1


def test_another_artifact_another_source_and_no_source(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    encode(folder)
    make_dataset(folder / "other", num_samples=12, samples_per_shard=6, resolution=20, seed=1)
    status, errors, _ = examine(folder, capsys, "--source", str(folder / "other" / "manifest.json"))
    assert status == 1
    assert "encoded from a train-000000.tar with" in errors[0]
    status, errors, _ = examine(folder, capsys, "--min-psnr", "90")
    assert status == 1
    assert "below --min-psnr 90" in errors[0]
    other_artifact(folder / "artifact2")
    status, errors, _ = examine(folder, capsys, "--artifact", str(folder / "artifact2"))
    assert status == 1
    (error,) = errors
    assert read_artifact(folder / "artifact").content_hash[:12] in error
    assert read_artifact(folder / "artifact2").content_hash[:12] in error
    (folder / "data").rename(folder / "away")
    assert main(["doctor", "latents", str(folder / "cache"), "--artifact", str(folder / "artifact")]) == 3
    assert "give --source MANIFEST" in capsys.readouterr().err
    assert main(["doctor", "latents", str(folder / "away"), "--artifact", str(folder / "artifact")]) == 3
    assert "holds no latent shards" in capsys.readouterr().err
