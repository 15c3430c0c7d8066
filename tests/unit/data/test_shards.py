from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from PIL import Image

from ldm_scale.data.indexing import index_tar
from ldm_scale.data.shards import open_manifest
from ldm_scale.data.sidecar import open_sidecar
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.errors import DataError
from tests.helpers.shards import make_dataset, png, write_tar

PIXEL = png(Image.new("RGB", (4, 4), "red"))


def _edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _bytes_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None
    return stream.read()


def test_every_sample_reads_back_as_the_standard_library_and_webdataset_see_it(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path, num_samples=20, samples_per_shard=8)
    dataset = open_manifest(manifest, "train")
    assert dataset.num_samples == 20
    assert dataset.class_names == ("0", "1", "2")
    number = 0
    for shard in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(shard) as archive:
            content = {member.name: _bytes_of(archive, member) for member in archive}
        for seen in wds.WebDataset(str(shard), shardshuffle=False, empty_check=False):
            sample = dataset.read(number)
            assert sample["__key__"] == f"{shard.stem}/{seen['__key__']}" == dataset.key(number)
            for extension in ("png", "txt", "json"):
                assert sample[extension] == seen[extension] == content[f"{seen['__key__']}.{extension}"]
            number += 1
    assert number == 20


def test_many_more_shards_than_open_files_read_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_scale.data.shards._MAX_OPEN", 2)
    dataset = open_manifest(make_dataset(tmp_path, num_samples=12, samples_per_shard=2), "train")
    keys = [dataset.read(number)["__key__"] for number in (0, 4, 8, 0, 10, 2, 6, 4)]
    assert keys == [dataset.key(number) for number in (0, 4, 8, 0, 10, 2, 6, 4)]
    assert len(dataset._files) == len(dataset._sidecars) == 2


@pytest.mark.parametrize("name", ["d/" * 60 + "x" * 90, "caf\u00e9", "a" * 120])
def test_long_and_foreign_names_read_back(tmp_path: Path, name: str) -> None:
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"s{tar_format}.tar"
        with tarfile.open(path, "w", format=tar_format) as archive:
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(PIXEL)
            archive.addfile(info, io.BytesIO(PIXEL))
        index_tars([path], tmp_path / f"m{tar_format}.json", "train")
        sample = open_manifest(tmp_path / f"m{tar_format}.json", "train").read(0)
        assert sample == {"__key__": f"{path.stem}/{name}", "png": PIXEL}


def test_no_manifest_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing/manifest.json: no manifest here; no shards lie in .* data.manifest"):
        open_manifest(tmp_path / "nothing" / "manifest.json", "train")


def test_shards_without_a_manifest_are_told_how_to_get_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x", {"png": PIXEL})])
    with pytest.raises(DataError, match=r"no manifest here; 1 tars lie in its folder: `ldm-scale prepare index"):
        open_manifest(tmp_path / "manifest.json", "train")


def test_no_shards_in_the_split(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)
    _edit(manifest, lambda content: content["splits"]["train"].update(shards=[], num_samples=0))
    with pytest.raises(DataError, match="split 'train' has no shards"):
        open_manifest(manifest, "train")


def test_an_unknown_split_names_the_known_ones(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path, splits=("train", "test"))
    with pytest.raises(DataError, match="no split 'heldout'; it has: test, train"):
        open_manifest(manifest, "heldout")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}', '{"format": "ldm-scale-shards", "splits": {}}'])
def test_what_is_no_manifest_of_ours_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(DataError, match="manifest"):
        open_manifest(path, "train")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001.tar: shard named in the manifest cannot be opened"):
        open_manifest(manifest, "train")


def test_a_shard_of_another_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)
    shard = tmp_path / "train-000002.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=rf"train-000002.tar: {size - 512} bytes, but its manifest says {size}"):
        open_manifest(manifest, "train")


def test_sample_counts_that_disagree(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)

    def one_more(content: Any) -> None:
        content["splits"]["train"]["num_samples"] += 1

    _edit(manifest, one_more)
    with pytest.raises(DataError, match="said to have 25 samples but its shards have 24"):
        open_manifest(manifest, "train")

    def one_more_in_the_shard(content: Any) -> None:
        content["splits"]["train"]["shards"][0]["num_samples"] += 1

    _edit(manifest, one_more_in_the_shard)
    with pytest.raises(DataError, match=r"train-000000.index.safetensors: 8 samples, but the manifest says 9"):
        open_manifest(manifest, "train").read(0)


def _edit_sidecar(path: Path, **changes: Any) -> None:
    path.write_bytes(replace(open_sidecar(path), **changes).to_bytes())


def test_a_sidecar_entry_beyond_the_end(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)
    path = tmp_path / "train-000000.index.safetensors"
    offsets = open_sidecar(path).offsets.copy()
    offsets[3, 1] = 10**9  # columns are json, png, txt
    _edit_sidecar(path, offsets=offsets)
    with pytest.raises(DataError, match=r"train00003.png is said to lie at bytes 1000000000 to 1000000"):
        open_manifest(manifest, "train").read(0)


@pytest.mark.parametrize("damage", ["cut", "no safetensors", "another version", "columns of two lengths"])
def test_a_malformed_sidecar(tmp_path: Path, damage: str) -> None:
    manifest = make_dataset(tmp_path)
    path = tmp_path / "train-000000.index.safetensors"
    content = path.read_bytes()
    if damage == "columns of two lengths":
        _edit_sidecar(path, sizes=open_sidecar(path).sizes[:-1])
    else:
        version = content.replace(b'\\"version\\": 2', b'\\"version\\": 9')
        path.write_bytes({"cut": content[:-40], "no safetensors": b"{}", "another version": version}[damage])
    with pytest.raises(DataError, match=r"train-000000.index.safetensors: .* index the shard anew"):
        open_manifest(manifest, "train").read(0)


def test_a_sidecar_that_points_at_another_member_never_gives_a_wrong_image(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)
    path = tmp_path / "train-000000.index.safetensors"
    offsets = open_sidecar(path).offsets.copy()
    offsets[[0, 1]] = offsets[[1, 0]]
    _edit_sidecar(path, offsets=offsets)
    dataset = open_manifest(manifest, "train")
    with pytest.raises(DataError, match=r"train-000000.tar: the \d+ bytes of train00000.\w+ at byte \d+ are not those"):
        dataset.read(0)
    assert dataset.read(2)["txt"] == b"blue bar"


def test_a_sidecar_without_checksums_is_held_against_the_headers(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)
    path = tmp_path / "train-000000.index.safetensors"
    with_checksums = [open_manifest(manifest, "train").read(number) for number in range(8)]
    _edit_sidecar(path, crc32=None)
    assert [open_manifest(manifest, "train").read(number) for number in range(8)] == with_checksums
    offsets = open_sidecar(path).offsets.copy()
    offsets[[0, 1]] = offsets[[1, 0]]
    _edit_sidecar(path, offsets=offsets)
    with pytest.raises(DataError, match="are not those that were indexed"):
        open_manifest(manifest, "train").read(0)


def test_a_tar_replaced_by_one_of_equal_size_is_noticed(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)
    shard = tmp_path / "train-000000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DataError, match="the shard was changed"):
        open_manifest(manifest, "train").read(0)


def test_a_tar_that_was_just_written_must_be_sound(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "bad.tar", [(f"{n}", {"png": PIXEL}) for n in range(4)])
    assert [sample.name for sample in index_tar(path)] == ["0", "1", "2", "3"]
    path.write_bytes(path.read_bytes()[: 2 * 1024 + 540])
    with pytest.raises(DataError, match=r"bad.tar: 1 parts of this tar cannot be used \(2: member reaches beyond"):
        index_tar(path)
    path.write_text("hello")
    with pytest.raises(DataError, match=r"bad.tar: 1 parts .*\(all of it: not a tar"):
        index_tar(path)
    with pytest.raises(DataError, match=r"missing.tar: cannot be read \(No such file"):
        index_tar(tmp_path / "missing.tar")
