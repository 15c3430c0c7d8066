"""`ldm-scale doctor data`: distributions, look-alikes, and data sets of parts, buckets, choices and remote shards."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_scale.__main__ import main
from ldm_scale.data.sidecar import open_sidecar
from ldm_scale.data.sources import map_in_processes
from ldm_scale.data.sources.tars import index_tars
from tests.helpers.doctored import examine, lines_of, noise_samples, samples_in_sizes, write_splits
from tests.helpers.fault_server import FaultServer
from tests.helpers.shards import broken_png, make_dataset, write_tar


def test_sizes_aspect_ratios_and_caption_lengths(tmp_path: Path) -> None:
    report = examine(write_splits(tmp_path, train=samples_in_sizes(40)), "--resolution", "24")
    facts = report.facts["splits"]["train"]
    assert facts["width_percentiles_px"]["50"] == np.median([64, 32, 48, 100])
    assert facts["height_percentiles_px"]["100"] == 64
    assert (facts["aspect_percentiles"]["0"], facts["aspect_percentiles"]["100"]) == (0.5, 5.0)
    assert facts["aspect_percentiles"]["50"] == 1.5  # of 0.5, 1, 2 and 5
    assert facts["shapes"] == {"landscape": 20, "square": 10, "portrait": 10}
    assert facts["smaller_than_resolution"] == 10
    assert facts["caption_words_percentiles"]["50"] == 2.5
    assert facts["caption_characters_percentiles"]["100"] == len("word word word word")
    lines = lines_of(report, "ok")
    assert any("50% landscape, 25% square, 25% portrait" in line for line in lines)
    assert any("captions have 12 characters in the median, 4 to 19 in 90%; 2 words, 1 to 4" in line for line in lines)


def test_missing_captions_have_no_length(tmp_path: Path) -> None:
    samples = samples_in_sizes(8)
    for _, members in samples[:4]:
        members["txt"] = b""
    for _, members in samples[4:]:
        del members["txt"]
    facts = examine(write_splits(tmp_path, train=samples)).facts["splits"]["train"]
    assert facts["caption_words_percentiles"] == facts["caption_characters_percentiles"] == {}


def test_look_alikes_are_told_with_their_keys(tmp_path: Path) -> None:
    samples = noise_samples(30)
    picture = Image.open(io.BytesIO(samples[4][1]["png"])).resize((64, 64), Image.Resampling.BICUBIC)
    for number, quality in ((11, 70), (23, 85)):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        samples[number] = (samples[number][0], {"jpg": buffer.getvalue(), "txt": b"another"})
    report = examine(write_splits(tmp_path, train=samples))
    found = report.facts["splits"]["train"]["look_alike"]
    keys = [f"train-000000/s{number:03d}" for number in (4, 11, 23)]
    assert found["largest"] == [{"pictures": 3, "keys": keys}]
    assert (found["groups"], found["pictures"], found["complete"]) == (1, 3, True)
    assert any(
        "3 of 30 pictures look like another of them, in 1 groups" in line for line in lines_of(report, "warning")
    )


def test_what_the_index_left_out_is_told(tmp_path: Path) -> None:
    samples = [*noise_samples(30), ("no_picture", {"txt": b"x"}), ("broken", {"png": b"<html>", "txt": b"x"})]
    report = examine(write_splits(tmp_path, train=samples))
    left_out = report.facts["splits"]["train"]["left_out_by_index"]
    sidecar = open_sidecar(tmp_path / "train-000000.index.safetensors")
    assert sum(left_out.values()) == len(sidecar.bad) == 2
    assert set(left_out) == {record.reason for record in sidecar.bad}
    assert any("the index left out 2 samples or members (6.25%)" in line for line in lines_of(report, "warning"))


def test_shards_that_the_index_left_out_whole_are_counted(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    hopeless = [(f"x{n}", {"png": b"<html>", "txt": b"x"}) for n in range(4)]
    tars = [write_tar(tmp_path / f"t{n}.tar", s) for n, s in enumerate((noise_samples(40), hopeless))]
    index_tars(tars, manifest, "train")
    assert json.loads(manifest.read_text())["splits"]["train"]["quarantined"]
    report = examine(manifest)
    assert report.facts["splits"]["train"]["shards_left_out_by_index"] == 1
    assert any("1 shards were left out whole by the index" in line for line in lines_of(report, "warning"))


def test_a_mixture_is_looked_at_part_by_part(tmp_path: Path) -> None:
    first = noise_samples(12, prefix="a")
    buffer = io.BytesIO()  # a held-out picture in another file: equal pixels
    Image.open(io.BytesIO(noise_samples(6, seed=3)[5][1]["png"])).save(buffer, "BMP")
    first[5][1]["png"] = buffer.getvalue()
    write_splits(tmp_path / "a", train=first, heldout=noise_samples(6, seed=3, prefix="h"))
    second = noise_samples(30, seed=1, prefix="b")
    second[7][1]["png"] = second[3][1]["png"]
    second[9][1]["png"] = broken_png()
    leaked = noise_samples(6, seed=3)[2][1]["png"]  # a held-out picture of the other data set
    second[20][1]["png"] = leaked
    write_splits(tmp_path / "b", train=[*second, ("without", {"txt": b"x"})])
    out = tmp_path / "mixture.json"
    assert main(["prepare", "mix", f"{tmp_path / 'a'}=3", f"{tmp_path / 'b'}=1", "--out", str(out)]) == 0
    report = examine(out, "--checksums")
    train = report.facts["splits"]["train"]
    assert (train["num_samples"], train["shards"]) == (42, 2)
    one, other = train["parts"]
    assert (one["weight"], one["sampled"], one["usable"], one["look_alike"]["groups"]) == (0.75, 12, 12, 0)
    assert one["passes_an_epoch"] == round(0.75 * 42 / 12, 3)
    assert (other["weight"], other["sampled"], other["usable"], other["look_alike"]["groups"]) == (0.25, 30, 29, 1)
    assert Path(other["manifest"]).samefile(tmp_path / "b" / "manifest.json")
    assert [part["sampled"] for part in report.facts["splits"]["heldout"]["parts"]] == [6]
    assert report.facts["leakage"] == {"heldout": 2}
    assert (one["left_out_by_index"], sum(other["left_out_by_index"].values())) == ({}, 1)
    (line,) = [line for line in lines_of(report, "error") if "image does not decode" in line and "s009" not in line][:1]
    assert line.startswith("train of ")
    assert "b/manifest.json train-000000/b009" in line


def test_a_damaged_part_of_a_mixture_leaves_the_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_dataset(tmp_path / name, num_samples=16, seed=ord(name))
    out = tmp_path / "mixture.json"
    assert main(["prepare", "mix", f"{tmp_path / 'a'}=1", f"{tmp_path / 'b'}=1", "--out", str(out)]) == 0
    for shard in (tmp_path / "a").glob("*.tar"):
        shard.unlink()
    report = examine(out)
    assert report.exit_code == 1
    one, other = report.facts["splits"]["train"]["parts"]
    assert "sampled" not in one
    assert other["sampled"] == 16


def test_buckets_are_told_and_their_sizes_are_what_pictures_are_held_against(tmp_path: Path) -> None:
    manifest = write_splits(tmp_path, train=samples_in_sizes(40))
    out = tmp_path / "buckets.json"
    assert main(["prepare", "buckets", str(manifest), "--resolution", "48", "--step", "16", "--out", str(out)]) == 0
    report = examine(out)
    facts = report.facts["splits"]["train"]
    assert {tuple(bucket["size"]): bucket["num_samples"] for bucket in facts["buckets"]} == {
        (32, 64): 20,  # and the widest, of which no bucket is
        (48, 48): 10,
        (64, 32): 10,
    }
    assert facts["smaller_than_resolution"] == 10  # 100 x 20 is lower than 32 pixels
    assert any(
        "10 of 40 pictures (25.0%) are smaller than their buckets" in line for line in lines_of(report, "warning")
    )


def test_a_filtered_manifest_is_looked_at_as_it_is(tmp_path: Path) -> None:
    manifest = write_splits(tmp_path, train=samples_in_sizes(40))
    out = tmp_path / "filtered.json"
    assert main(["prepare", "filter", str(manifest), "--max-aspect", "3", "--out", str(out)]) == 0
    facts = examine(out, "--samples", "0").facts["splits"]["train"]
    assert (facts["num_samples"], facts["usable"], facts["left_out_by_index"]) == (30, 30, {})
    assert facts["aspect_percentiles"]["100"] == 2.0


@pytest.mark.parametrize("damaged", [False, True])
def test_remote_shards_are_read_by_ranges(tmp_path: Path, damaged: bool) -> None:
    write_splits(tmp_path / "local", train=noise_samples(12), heldout=noise_samples(5, seed=1, prefix="h"))
    files = {f"/{path.name}": path.read_bytes() for path in (tmp_path / "local").glob("*.tar")}
    with FaultServer(files) as server:
        for split in ("train", "heldout"):
            url, options = server.url(f"/{split}-000000.tar"), ["--split", split, "--out", str(tmp_path / "m.json")]
            assert main(["prepare", "index", url, *options, "--checksums"]) == 0
        if damaged:
            content = bytearray(server.files["/train-000000.tar"])
            content[content.index(b"IDAT") + 9] ^= 0xFF
            server.files["/train-000000.tar"] = bytes(content)
        report = examine(tmp_path / "m.json", "--checksums", "--resolution", "32")
    train = report.facts["splits"]["train"]
    if damaged:
        assert any("train-000000.tar: SHA-256" in line for line in lines_of(report, "error"))
        return
    assert {finding.level for finding in report.findings} == {"ok"}
    assert (train["sampled"], train["usable"]) == (12, 12)
    assert train["read_mib_per_s_per_process"] > 0
    assert report.facts["leakage"] == {"heldout": 0}


class _Counted(list[int]):
    """Numbers that tell how far they were handed out."""

    taken = 0

    def __getitem__(self, index: object) -> object:  # type: ignore[override]
        assert isinstance(index, slice)
        self.taken = max(self.taken, index.stop)
        return list(self)[index]


def _negated(number: int) -> int:
    return -number


def test_few_samples_are_on_their_way_at_a_time() -> None:
    items = _Counted(range(5000))
    most = 0
    for count, result in enumerate(map_in_processes(_negated, items, "test")):
        assert result == -count
        most = max(most, items.taken - count)
    assert count == 4999
    assert most <= 16 * (4 * len(os.sched_getaffinity(0)) + 1)
    assert list(map_in_processes(_negated, [], "test")) == []
    assert list(map_in_processes(_negated, list(range(17)), "test")) == [-n for n in range(17)]
