"""A shard that the system fails to read: once, it is read again; always, its samples are bad ones. Injected or real."""

from __future__ import annotations

import errno
import os
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from ldm_scale import faults
from ldm_scale.config.schema import DataConfig
from ldm_scale.data import Batch, Loader, build_loader
from ldm_scale.data import loader as loader_module
from ldm_scale.data.sources.tars import IndexOptions, index_tars
from ldm_scale.data.storage import Storage, StorageSettings
from tests.helpers.fault_server import FaultServer
from tests.helpers.faulty import faults_set
from tests.helpers.shards import make_dataset

REASON = "its shard cannot be read"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "shards", num_samples=24, samples_per_shard=8, resolution=16)


def _load(manifest: Path, num_batches: int = 6) -> tuple[list[Batch], Loader]:
    data = DataConfig(manifest=str(manifest), resolution=8, num_workers=0, max_consecutive_bad=10)
    loader = build_loader(data, seed=3, global_batch=4, micro_batch=4, rank=0, world_size=1)
    return list(islice(loader, num_batches)), loader


def _assert_same(batches: list[Batch], others: list[Batch]) -> None:
    assert [batch.keys for batch in batches] == [batch.keys for batch in others]
    assert all(torch.equal(one.images, other.images) for one, other in zip(batches, others, strict=True))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_file_that_fails_is_opened_anew(manifest: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    whole, _ = _load(manifest)
    read, seen = os.pread, set[str]()

    def fails_once_open(descriptor: int, length: int, start: int) -> bytes:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith(".tar") and name not in seen:
            seen.add(name)
            raise OSError(number, os.strerror(number))
        return read(descriptor, length, start)

    monkeypatch.setattr(os, "pread", fails_once_open)
    batches, loader = _load(manifest)
    assert len(seen) == 3
    _assert_same(batches, whole)
    assert not loader.bad_samples.counts


def test_a_shard_that_always_fails_costs_its_samples(manifest: Path) -> None:
    """A real EIO: what the kernel says of memory that is not there, read as a file."""
    whole, _ = _load(manifest)
    shard = manifest.parent / "train-000001.tar"
    size = shard.stat().st_size
    shard.unlink()
    shard.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), shard.open("rb", buffering=0) as file:
        file.read(size)
    batches, loader = _load(manifest)
    lost = {key for batch in whole for key in batch.keys if key.startswith("train-000001/")}
    assert len(lost) == 8
    assert set(loader.bad_samples.names.values()) == {REASON}
    assert lost <= set(loader.bad_samples.names)
    kept = [key for batch in whole for key in batch.keys if key not in lost]
    assert not Counter(kept) - Counter(key for batch in batches for key in batch.keys)
    assert all(len(batch.keys) == 4 for batch in batches)


def test_the_injected_error_takes_the_same_way(manifest: Path) -> None:
    whole, _ = _load(manifest)
    with faults_set("eio:at=data.fetch,nth=6"):
        batches, loader = _load(manifest)
    _assert_same(batches, whole)
    assert not loader.bad_samples.counts
    with faults_set("eio:at=data.fetch,nth=6,times=2"):  # read again in vain
        batches, loader = _load(manifest)
    (key,) = loader.bad_samples.names
    assert loader.bad_samples.counts == {REASON: 1}
    assert key == whole[1].keys[1]
    differ = [
        (a, b) for one, other in zip(whole, batches, strict=True) for a, b in zip(one.keys, other.keys, strict=True)
    ]
    assert [a for a, b in differ if a != b] == [key]


def test_an_injected_error_of_a_remote_shard_is_tried_again(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = _load(manifest)
    monkeypatch.setattr(loader_module, "build_storage", lambda data: Storage(StorageSettings(backoff_s=0.01)))
    with FaultServer({f"/{path.name}": path.read_bytes() for path in manifest.parent.glob("*.tar")}) as server:
        urls = [server.url(path) for path in sorted(server.files)]
        index_tars(urls, tmp_path / "manifest.json", "train", options=IndexOptions(workers=1, checksums=True))
        with faults_set("eio:at=data.fetch,nth=2,times=3"):
            batches, loader = _load(tmp_path / "manifest.json")
            assert faults._rules[0].passed > 4
    _assert_same(batches, whole)
    assert not loader.bad_samples.counts
