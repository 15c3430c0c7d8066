"""`ldm-scale doctor data`: a sound data set passes, each planted defect is found with its shard and key."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_scale.data.sidecar import open_sidecar
from ldm_scale.operations import doctor_data, doctor_leakage
from tests.helpers.doctored import examine, lines_of, noise_samples, write_splits
from tests.helpers.shards import broken_png, make_dataset, make_sample, png


def test_a_sound_data_set_has_nothing_but_ok(tmp_path: Path) -> None:
    manifest = write_splits(tmp_path, train=noise_samples(30), heldout=noise_samples(12, seed=1, prefix="h"))
    report = examine(manifest, "--resolution", "32", "--checksums")
    assert {finding.level for finding in report.findings} == {"ok"}
    assert report.exit_code == 0
    train = report.facts["splits"]["train"]
    assert (train["num_samples"], train["sampled"], train["usable"], train["shards"]) == (30, 30, 30, 1)
    assert train["classes"] == {"0": 10, "1": 10, "2": 10}
    assert train["shorter_side_percentiles_px"]["50"] == 32
    assert train["captions_distinct"] == 30
    assert train["decoded_images_per_s_per_core"] > 1
    assert report.facts["leakage"] == {"heldout": 0}


def test_the_sample_is_deterministic_and_as_large_as_asked(tmp_path: Path) -> None:
    manifest = write_splits(tmp_path, train=noise_samples(30))
    first, second = (examine(manifest, "--samples", "7").facts["splits"]["train"] for _ in range(2))
    speeds = [name for name in first if "_per_s" in name]
    assert len(speeds) == 3
    assert {name: first[name] for name in first if name not in speeds} == {
        name: second[name] for name in second if name not in speeds
    }
    assert first["sampled"] == 7
    numbers = doctor_data.sampled_numbers(1000, 100)
    assert numbers == sorted(set(numbers)) == doctor_data.sampled_numbers(1000, 100)
    assert len(numbers) == 100
    assert max(numbers) > 800
    assert doctor_data.sampled_numbers(9, 0) == doctor_data.sampled_numbers(9, 100) == list(range(9))


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no manifest here"), ("{", "cannot be read"), ("{}", "not a manifest"), ("[1]", "not a manifest")],
)
def test_an_unreadable_manifest_is_an_error(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    report = examine(tmp_path)
    assert report.exit_code == 1
    (line,) = lines_of(report, "error")
    assert said in line
    assert "manifest.json" in line


def test_an_unknown_split_is_an_error_and_the_others_are_looked_at(tmp_path: Path) -> None:
    manifest = write_splits(tmp_path, train=noise_samples(6))
    report = examine(manifest, "--split", "trian", "--split", "train")
    assert "no split 'trian'" in lines_of(report, "error")[0]
    assert report.facts["splits"]["train"]["usable"] == 6


def _remove(shard: Path) -> None:
    shard.unlink()


def _lengthen(shard: Path) -> None:
    with shard.open("ab") as stream:
        stream.write(b"\0")


def _lose_the_sidecar(shard: Path) -> None:
    shard.with_suffix(".index.safetensors").unlink()


def _shorten_the_sidecar(shard: Path) -> None:
    sidecar = shard.with_suffix(".index.safetensors")
    content = open_sidecar(sidecar)
    sidecar.write_bytes(content.select(np.arange(len(content) - 1)).to_bytes())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_remove, "cannot be opened"),
        (_lengthen, "its manifest says"),
        (_lose_the_sidecar, "no shard index"),
        (_shorten_the_sidecar, "but the manifest says"),
    ],
)
def test_a_damaged_shard_is_named_and_the_others_are_looked_at(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    manifest = make_dataset(tmp_path, num_samples=24, samples_per_shard=8)
    damage(tmp_path / "train-000001.tar")
    report = examine(manifest)
    assert report.exit_code == 1
    (line,) = lines_of(report, "error")
    assert "train-000001" in line
    assert said in line
    facts = report.facts["splits"]["train"]
    assert (facts["shards"], facts["usable_shards"], facts["usable"]) == (3, 2, 16)


def test_changed_bytes_are_found_by_checksums_alone(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path, num_samples=24, samples_per_shard=8)
    shard = tmp_path / "train-000002.tar"
    data = bytearray(shard.read_bytes())
    at = data.index(b"IDAT") + 9
    data[at] ^= 0xFF
    shard.write_bytes(data)
    assert not [line for line in lines_of(examine(manifest, "--samples", "1"), "error") if "SHA-256" in line]
    report = examine(manifest, "--samples", "1", "--checksums")
    assert "train-000002.tar: SHA-256" in lines_of(report, "error")[0]


def test_a_sidecar_that_names_other_samples_is_found_by_checksums(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path, num_samples=8)
    sidecar = tmp_path / "train-000000.index.safetensors"
    sidecar.write_bytes(sidecar.read_bytes().replace(b"train00003", b"train00009"))
    report = examine(manifest, "--checksums")
    assert "train-000000.index.safetensors: train00009 does not lie in" in lines_of(report, "error")[0]


def test_samples_that_cannot_be_used_are_named_with_their_reasons(tmp_path: Path) -> None:
    samples = noise_samples(20)
    samples[3][1]["png"] = samples[3][1]["png"][:300]
    samples[5][1]["txt"] = b"\x81"
    samples[7][1]["json"] = b'{"class": 9}'
    manifest = write_splits(tmp_path, train=samples)
    content = json.loads(manifest.read_text())
    content["classes"] = ["a", "b", "c"]
    manifest.write_text(json.dumps(content))
    report = examine(manifest)
    errors = lines_of(report, "error")
    for key, reason in (
        ("s003", "image is cut short"),
        ("s005", "caption is not text in UTF-8, UTF-16 or cp1252"),
        ("s007", "class is not in the manifest's list"),
    ):
        assert f"train train-000000/{key}: {reason}" in errors
    assert any("3 of 20 samples cannot be used (15.00%" in line for line in errors)
    assert sum(report.facts["splits"]["train"]["bad"].values()) == 3


def test_a_small_share_of_bad_samples_is_a_warning(tmp_path: Path) -> None:
    samples = noise_samples(150)
    samples[3][1]["png"] = broken_png()
    report = examine(write_splits(tmp_path, train=samples))
    assert report.exit_code == 0
    assert "train train-000000/s003: image does not decode" in lines_of(report, "warning")


def test_pictures_smaller_than_the_training_are_counted(tmp_path: Path) -> None:
    samples = noise_samples(10)
    for _, members in samples[:4]:
        members["png"] = png(
            Image.fromarray(np.random.default_rng(len(members["txt"])).integers(0, 256, (16, 40, 3), dtype=np.uint8))
        )
    samples[1][1]["png"], samples[2][1]["png"] = (png(Image.new("RGB", (20, 90), c)) for c in ("red", "blue"))
    report = examine(write_splits(tmp_path, train=samples), "--resolution", "24")
    assert any("4 of 10 pictures (40.0%) are smaller than 24 px" in line for line in lines_of(report, "warning"))
    facts = report.facts["splits"]["train"]
    assert facts["smaller_than_resolution"] == 4
    assert (facts["shorter_side_percentiles_px"]["0"], facts["shorter_side_percentiles_px"]["100"]) == (16, 32)
    assert not any("smaller" in line for line in lines_of(examine(tmp_path, "--resolution", "16"), "warning"))


def test_captions_that_are_missing_empty_or_too_long_are_named(tmp_path: Path) -> None:
    samples = noise_samples(12)
    del samples[2][1]["txt"]
    samples[4][1]["txt"] = b" \n"
    samples[6][1]["txt"] = b"cat " * 76  # with start and end 78 tokens
    samples[8][1]["txt"] = b"cat " * 75
    report = examine(write_splits(tmp_path, train=samples))
    warnings = lines_of(report, "warning")
    assert "train train-000000/s002: no caption" in warnings
    assert "train train-000000/s004: empty caption" in warnings
    assert "train train-000000/s006: caption of 78 tokens, of which the text encoder reads 77" in warnings
    assert not any("s008" in line for line in warnings)
    facts = report.facts["splits"]["train"]
    assert [facts[f"captions_{kind}"] for kind in ("missing", "empty", "too_long")] == [1, 1, 1]


def test_no_captions_at_all_are_one_line(tmp_path: Path) -> None:
    samples = [(name, {"png": members["png"]}) for name, members in noise_samples(8)]
    warnings = lines_of(examine(write_splits(tmp_path, train=samples), "--resolution", "32"), "warning")
    assert warnings == ["train: none of 8 samples has a caption"]


def test_repeated_captions_and_pictures_and_rare_classes_are_told(tmp_path: Path) -> None:
    samples = noise_samples(44)
    for number, (_, members) in enumerate(samples):
        members["txt"] = b"the same"
        members["json"] = json.dumps({"class": int(number == 0)}).encode()
    samples[9][1]["png"] = samples[1][1]["png"]
    report = examine(write_splits(tmp_path, train=samples))
    warnings = lines_of(report, "warning")
    assert any("44 of 44 samples share their caption with another; 1 are distinct" in line for line in warnings)
    assert "train train-000000/s009: the same pixels as train-000000/s001" in warnings
    assert any("1 (1) to 43 (0) samples each: 43 times as many" in line for line in warnings)


@pytest.mark.parametrize("form", ["bytes", "pixels"])
def test_a_picture_in_both_splits_is_leakage(tmp_path: Path, form: str) -> None:
    train, heldout = noise_samples(300), noise_samples(10, seed=1, prefix="h")
    data = train[17][1]["png"]
    if form == "pixels":
        buffer = io.BytesIO()
        Image.open(io.BytesIO(data)).save(buffer, "BMP")
        assert len(buffer.getvalue()) != len(data)
        data = buffer.getvalue()
    heldout[4][1]["png"] = data
    manifest = write_splits(tmp_path, train=train, heldout=heldout)
    # Equal files are found whatever is sampled, equal pixels in what is decoded.
    report = examine(manifest, "--samples", "5" if form == "bytes" else "0")
    assert report.exit_code == 1
    assert report.facts["leakage"] == {"heldout": 1}
    assert any(
        line.startswith("heldout heldout-000000/h004: the same picture as train-000000/s017 of train")
        for line in lines_of(report, "error")
    )


def test_equal_colours_in_another_shape_are_another_picture(tmp_path: Path) -> None:
    samples = noise_samples(2)
    for (_, members), size in zip(samples, ((16, 64), (64, 16)), strict=True):
        members["png"] = png(Image.new("RGB", size, "white"))
    assert examine(write_splits(tmp_path, train=samples)).facts["splits"]["train"]["repeated_pictures"] == 0


def test_what_was_not_compared_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    same_size = [make_sample(0, 8, rng) | {"png": broken_png() + bytes([n])} for n in range(20)]
    manifest = write_splits(
        tmp_path,
        train=[(f"a{n}", members) for n, members in enumerate(same_size[:10])],
        heldout=[(f"b{n}", members) for n, members in enumerate(same_size[10:])],
    )
    monkeypatch.setattr(doctor_leakage, "MAX_BYTE_COMPARISONS", 6)
    assert any("14 files whose sizes occur on both sides" in line for line in lines_of(examine(manifest), "warning"))
    assert not any("whose sizes" in line for line in lines_of(examine(manifest, "--samples", "0"), "warning"))


def test_wrong_options_are_told(tmp_path: Path) -> None:
    assert examine(write_splits(tmp_path, train=noise_samples(3)), "--resolution", "0").exit_code == 1
    assert examine(tmp_path, "--samples", "-1").exit_code == 1


def test_the_folder_stands_for_its_manifest_and_nothing_is_written(tmp_path: Path) -> None:
    write_splits(tmp_path / "d", train=noise_samples(5))
    shutil.copytree(tmp_path / "d", tmp_path / "copy")
    examine(tmp_path / "d", "--checksums")
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == sorted(p.name for p in (tmp_path / "copy").iterdir())
