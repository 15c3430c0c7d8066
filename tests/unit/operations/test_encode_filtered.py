"""Latent caches of manifests that were made from manifests: filtered ones, mixtures and aspect-ratio buckets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ldm_scale.__main__ import main
from ldm_scale.data import open_manifest
from tests.helpers.latents import read_tar
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import make_sample, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of six samples with scores from 0.0 to 1.1; manifests of the low, the high and the odd ones."""
    rng = np.random.default_rng(0)
    samples = []
    for n in range(12):
        members = make_sample(n, 20, rng)
        members["json"] = json.dumps({"score": n / 10, "odd": n % 2, "even": 1 - n % 2}).encode()
        samples.append((f"{n:02d}", members))
    (tmp_path / "data").mkdir()
    tars = [str(write_tar(tmp_path / "data" / f"s{k}.tar", samples[6 * k : 6 * k + 6])) for k in range(2)]
    assert main(["prepare", "index", *tars, "--out", str(tmp_path / "data" / "manifest.json")]) == 0
    for name, rule in (("odd", "odd=1"), ("even", "even=1"), ("high", "score=0.4")):
        (tmp_path / name).mkdir()
        _prepare(tmp_path, "filter", "data/manifest.json", "--min-score", rule, out=f"{name}/manifest.json")
    tiny_artifact(tmp_path / "artifact")
    return tmp_path


def _prepare(folder: Path, kind: str, source: str, *options: str, out: str) -> None:
    assert main(["prepare", kind, str(folder / source), *options, "--out", str(folder / out)]) == 0


def _encode(folder: Path, name: str, out: str) -> int:
    arguments = [str(folder / "artifact"), str(folder / name), "--out", str(folder / out)]
    return main(["encode", *arguments, "--device", "cpu", "--workers", "0"])


def _examine(folder: Path, cache: str, *options: str) -> int:
    return main(["doctor", "latents", str(folder / cache), "--artifact", str(folder / "artifact"), *options])


def test_a_cache_of_a_filtered_manifest_holds_what_is_left(folder: Path) -> None:
    assert _encode(folder, "odd", "cache") == 0
    assert sorted(read_tar(folder / "cache" / "s0.tar")) == ["01", "03", "05"]
    cached, source = open_manifest(folder / "cache", "train"), open_manifest(folder / "odd", "train")
    assert [*cached.keys()] == [*source.keys()] == [f"s{n // 6}/{n:02d}" for n in range(1, 12, 2)]
    assert cached.digest == source.digest
    assert all("latents.center.npy" in cached.read(number) for number in range(6))
    assert _examine(folder, "cache") == 0
    assert _encode(folder, "odd", "cache") == 0  # kept


def test_filters_of_the_same_tars_are_not_taken_for_each_other(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _encode(folder, "odd", "cache") == 0
    before = (folder / "cache" / "s0.tar").read_bytes()
    for name, counts in (("even", "(3, now 3)"), ("high", "(3, now 2)"), ("data", "(3, now 6)")):
        capsys.readouterr()
        assert _encode(folder, name, "cache") == 3
        assert f"s0.tar: encoded from other samples of the same s0.tar {counts}" in capsys.readouterr().err
        assert _examine(folder, "cache", "--source", str(folder / name)) == 1
    assert (folder / "cache" / "s0.tar").read_bytes() == before
    assert "has other shards or samples than" in _report(folder, capsys, "even")


def _report(folder: Path, capsys: pytest.CaptureFixture[str], source: str) -> str:
    capsys.readouterr()
    _examine(folder, "cache", "--source", str(folder / source))
    return capsys.readouterr().out


def test_mixtures_and_buckets_are_refused_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _prepare(folder, "buckets", "data/manifest.json", "--resolution", "64", out="bucketed.json")
    named = [f"{folder / name / 'manifest.json'}=1" for name in ("odd", "even")]
    assert main(["prepare", "mix", *named, "--out", str(folder / "mixed.json")]) == 0
    assert _encode(folder, "odd", "cache") == 0
    for name, what in (("bucketed.json", "has aspect-ratio buckets"), ("mixed.json", "a mixture")):
        for status in (
            lambda name=name: _encode(folder, name, "other"),
            lambda name=name: _examine(folder, name),
            lambda name=name: _examine(folder, "cache", "--source", str(folder / name)),
        ):
            capsys.readouterr()
            assert status() == 3
            errors = capsys.readouterr().err
            (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
            assert f"{name}: {what}" in line
            assert "Traceback" not in errors


def test_caches_are_mixed_instead(folder: Path) -> None:
    for name in ("odd", "even"):
        assert _encode(folder, name, f"{name}_cache") == 0
    named = [f"{folder / name / 'manifest.json'}=1" for name in ("odd_cache", "even_cache")]
    assert main(["prepare", "mix", *named, "--out", str(folder / "mixed.json")]) == 0
    mixed = open_manifest(folder / "mixed.json", "train")
    assert mixed.num_samples == 12
    assert mixed.latents is not None
