"""Feature files and their cache: whole or not at all, found by all that they depend on, damaged ones taken again."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm_scale.errors import DataError
from ldm_scale.evaluation.feature_sets import (
    FeatureCache,
    FeatureSet,
    default_cache,
    read_features,
    require_one_extractor,
    write_features,
)

WANTED = {"images_sha256": "a", "resolution": 32, "resize": "bicubic", "extractor": {"weights_sha256": "w"}}


def a_set(num_images: int = 5, value: float = 1.0) -> FeatureSet:
    images = {"wanted": WANTED, "num_images": num_images, "pixels_digest": "p", "left_out": 0}
    return FeatureSet(torch.full((num_images, 3), value), {"weights_sha256": "w"}, images)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.safetensors"
    write_features(path, a_set())
    found = read_features(path)
    assert torch.equal(found.features, a_set().features)
    assert (found.extractor, found.images, found.sha256) == (a_set().extractor, a_set().images, a_set().sha256)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("field", list(WANTED))
def test_whatever_features_depend_on_makes_another_entry(tmp_path: Path, field: str) -> None:
    cache = FeatureCache(tmp_path)
    cache.put(WANTED, a_set())
    assert cache.get(WANTED) is not None
    other = WANTED | {field: {"weights_sha256": "v"} if field == "extractor" else "other"}
    assert cache.path(other) != cache.path(WANTED)
    assert cache.get(other) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_entry_is_warned_of_and_taken_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = FeatureCache(tmp_path)
    cache.put(WANTED, a_set())
    path = cache.path(WANTED)
    assert path is not None
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    elif damage == "cut":
        del content[-3:]
    elif damage == "empty":
        content.clear()
    else:  # whole, but another description's
        write_features(path, FeatureSet(torch.ones(2, 3), {}, {"wanted": {}, "num_images": 2}))
        content = bytearray(path.read_bytes())
    path.write_bytes(content)
    assert cache.get(WANTED) is None
    assert f"cache: {path}: " in capsys.readouterr().err
    cache.put(WANTED, a_set())
    assert cache.get(WANTED) is not None


def test_what_is_no_feature_file_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"features": torch.ones(2, 3)}, tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text("features")
    for name, expected in (
        ("plain", "not a feature file"),
        ("text", "cannot be read"),
        ("absent", "no such feature file"),
    ):
        with pytest.raises(DataError, match=rf"{name}\.safetensors: .*{expected}"):
            read_features(tmp_path / f"{name}.safetensors")


def test_a_folder_that_takes_no_file_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = FeatureCache(tmp_path / "file")
    cache.put(WANTED, a_set())
    assert cache.get(WANTED) is None
    assert FeatureCache(None).get(WANTED) is None
    FeatureCache(None).put(WANTED, a_set())


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_features(path, a_set())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_features(path, a_set(9))
    assert len(read_features(path)) == 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def _put_often(folder: Path) -> None:
    cache = FeatureCache(folder)
    for _ in range(30):
        cache.put(WANTED, a_set(2000))


def test_two_runs_at_once_never_show_half_an_entry(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.put(WANTED, a_set(2000))
    writers = [multiprocessing.get_context("fork").Process(target=_put_often, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = cache.get(WANTED)
        assert found is not None
        assert len(found) == 2000
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_sets_of_different_widths_are_not_measured() -> None:
    with pytest.raises(DataError, match="features of 3 and 4 numbers"):
        require_one_extractor(FeatureSet(torch.ones(2, 3), {}, {}), FeatureSet(torch.ones(2, 4), {}, {}))


def test_the_default_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/ldm-scale/features")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_cache() == Path("/home/somebody/.cache/ldm-scale/features")
