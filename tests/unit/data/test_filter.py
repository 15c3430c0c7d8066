"""Filters and mixtures: manifests made from manifests, with the tars left as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_scale.data import open_manifest
from ldm_scale.data.manifest import read_manifest, read_split
from ldm_scale.data.sidecar import Sidecar, open_sidecar
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.errors import DataError
from ldm_scale.prepare import main
from tests.helpers.shards import make_dataset, png, write_tar

SIZES = [(8, 8), (16, 8), (40, 8), (8, 40), (64, 64), (20, 20)]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Twelve samples in three shards: sizes in turn, scores from 0, captions of n characters, some without a score."""
    samples = []
    for n in range(12):
        metadata = {"score": n / 10, "n": n} if n != 5 else {"score": "high"}
        members = {"png": png(Image.new("RGB", SIZES[n % 6])), "txt": b"c" * n, "json": json.dumps(metadata).encode()}
        samples.append((f"{n:02d}", members))
    (tmp_path / "data").mkdir()
    tars = [write_tar(tmp_path / "data" / f"s{k}.tar", samples[4 * k : 4 * k + 4]) for k in range(3)]
    index_tars(tars[:2], tmp_path / "data" / "manifest.json", "train")
    index_tars(tars[2:], tmp_path / "data" / "manifest.json", "heldout")
    return tmp_path / "data" / "manifest.json"


def _filter(manifest: Path, out: Path, *options: str) -> list[str]:
    assert main(["filter", str(manifest), "--out", str(out), *options]) == 0
    return [
        key.partition("/")[2] for split in read_manifest(out)["splits"] for key in [*open_manifest(out, split).keys()]
    ]


def _expected(keep: set[int]) -> list[str]:
    return [f"{n:02d}" for n in range(12) if n in keep]


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        (("--min-side", "16"), {n for n in range(12) if min(SIZES[n % 6]) >= 16}),
        (("--max-side", "20"), {n for n in range(12) if max(SIZES[n % 6]) <= 20}),
        (("--min-pixels", "320"), {n for n in range(12) if np.prod(SIZES[n % 6]) >= 320}),
        (("--max-aspect", "2"), {n for n in range(12) if n % 6 not in (2, 3)}),
        (("--min-score", "score=0.3"), set(range(3, 12)) - {5}),
        (("--max-score", "score=0.8"), set(range(9)) - {5}),
        (("--min-score", "score=0.2", "--max-score", "n=9"), set(range(2, 10)) - {5}),
        (("--min-caption-length", "4"), set(range(4, 12))),
        (("--max-aspect", "2", "--min-caption-length", "4"), set(range(4, 12)) - {8, 9}),
    ],
)
def test_what_each_rule_keeps(tmp_path: Path, manifest: Path, options: tuple[str, ...], keep: set[int]) -> None:
    out = tmp_path / "other" / "kept.json"
    assert _filter(manifest, out, *options) == _expected(keep)
    content = read_manifest(out)
    assert sum(content["left_out"].values()) == 12 - len(keep)
    original = {key: number for number, key in enumerate(open_manifest(manifest, "train").keys())}
    whole, dataset = open_manifest(manifest, "train"), open_manifest(out, "train")
    for number, key in enumerate(dataset.keys()):
        assert dataset.read(number) == whole.read(original[key])


def test_counts_per_rule_a_second_run_and_another_request(
    tmp_path: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kept.json"
    tars = {path: path.read_bytes() for path in manifest.parent.glob("*.tar")}
    assert _filter(manifest, out, "--min-side", "16", "--max-score", "score=1.0") == ["04", "10"]
    assert read_manifest(out)["left_out"] == {
        "score above 1": 1,
        "shorter side below 16 pixels": 8,
        "no number 'score' in its json": 1,
    }
    assert {path: path.read_bytes() for path in tars} == tars
    capsys.readouterr()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    _filter(manifest, out, "--min-side", "16", "--max-score", "score=1.0")
    assert capsys.readouterr().out.startswith("reused: ")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    with pytest.raises(DataError, match="made by another request"):
        main(["filter", str(manifest), "--out", str(out), "--min-side", "8"])
    with pytest.raises(DataError, match="no sample of split 'train' meets the rules"):
        main(["filter", str(manifest), "--out", str(tmp_path / "n.json"), "--min-side", "999"])
    with pytest.raises(DataError, match="no rule is given"):
        main(["filter", str(manifest), "--out", str(tmp_path / "n.json")])
    with pytest.raises(DataError, match="the manifest to choose from"):
        main(["filter", str(manifest), "--out", str(manifest), "--min-side", "8"])
    with pytest.raises(DataError, match="no split 'test'; it has: heldout, train"):
        main(["filter", str(manifest), "--out", str(tmp_path / "n.json"), "--min-side", "8", "--split", "test"])
    _filter(manifest, tmp_path / "t.json", "--min-side", "8", "--split", "train")
    assert list(read_manifest(tmp_path / "t.json")["splits"]) == ["train"]


def test_sizes_that_the_index_does_not_know_are_read_from_the_pictures(tmp_path: Path, manifest: Path) -> None:
    for path in manifest.parent.glob("*.safetensors"):
        sidecar = open_sidecar(path)
        path.write_bytes(Sidecar.of([sidecar.sample(row) for row in range(len(sidecar))]).to_bytes())
        stripped = open_sidecar(path)
        samples = [stripped.sample(row) for row in range(len(stripped))]
        path.write_bytes(Sidecar.of([type(sample)(sample.name, sample.members) for sample in samples]).to_bytes())
        assert open_sidecar(path).pictures is None
    assert _filter(manifest, tmp_path / "kept.json", "--min-side", "16") == _expected({4, 5, 10, 11})


def test_a_filtered_manifest_can_be_filtered(tmp_path: Path, manifest: Path) -> None:
    _filter(manifest, tmp_path / "one.json", "--max-aspect", "2")
    assert _filter(tmp_path / "one.json", tmp_path / "two.json", "--min-caption-length", "7") == _expected({7, 10, 11})


def test_a_mixture(tmp_path: Path, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_dataset(tmp_path / "b", num_samples=4)
    content = json.loads(other.read_text())
    content["classes"] = []
    other.write_text(json.dumps(content))
    out = tmp_path / "mix" / "mix.json"
    assert main(["mix", f"{manifest}=3", f"{tmp_path / 'b'}=1", "--out", str(out)]) == 0
    assert "75.00%  ../data/manifest.json" in capsys.readouterr().out
    parts = read_split(out, "train").parts
    assert [(part.num_samples, part.weight) for part in parts] == [(8, 0.75), (4, 0.25)]
    assert read_split(out, "heldout").parts[0].weight == 1.0
    assert open_manifest(out, "train").num_samples == 12
    for arguments, message in (
        ([f"{manifest}=0"], "weights must be positive"),
        ([f"{manifest}=1", f"{manifest}=2"], "named twice"),
        ([f"{out}=1"], "one of the manifests to mix"),
        ([f"{tmp_path / 'none'}=1"], "no manifest here"),
        ([f"{manifest}=1"], "another manifest, so it stays"),
    ):
        with pytest.raises(DataError, match=message):
            main(["mix", *arguments, "--out", str(out)])
    content["classes"] = ["cat"]
    other.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"class names of .* differ"):
        main(["mix", f"{manifest}=1", f"{other}=1", "--out", str(tmp_path / "x.json")])
