"""Shards without a manifest: every reader gets samples, nothing hangs, and what is lost is said."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from ldm_scale.config.schema import DataConfig
from ldm_scale.data import Batch, SkippedSample, build_loader, open_manifest
from ldm_scale.data.tar_stream import read_samples
from ldm_scale.errors import ConfigError, DataError
from ldm_scale.telemetry import log
from tests.helpers.cases import rarely
from tests.helpers.fault_server import FaultServer, fault
from tests.helpers.shards import broken_png, make_sample, write_tar

NUM_MEMBERS = 3  # of a sample


def _samples(shard: int, count: int) -> list[tuple[str, dict[str, bytes]]]:
    rng = np.random.default_rng(shard)
    return [(f"{shard}-{n:03d}", make_sample(n, 8, rng)) for n in range(count)]


def _shards(folder: Path, *sizes: int) -> str:
    """The pattern of shards with so many samples."""
    for shard, size in enumerate(sizes):
        write_tar(folder / f"s{shard}.tar", _samples(shard, size))
    return str(folder / "s{0..%d}.tar") % (len(sizes) - 1) if len(sizes) > 1 else str(folder / "s0.tar")


def _load(
    pattern: str, batches: int, *, world: int = 1, workers: int = 0, batch: int = 8, buffer: int = 8, **rest: Any
) -> list[list[Batch]]:
    """The first batches of each rank."""
    data = DataConfig(
        manifest=pattern, resolution=8, num_workers=workers, prefetch_batches=2, chunk_samples=1, block_chunks=buffer
    )
    arguments = {"seed": 3, "global_batch": batch, "micro_batch": batch // world, "world_size": world, **rest}
    return [list(islice(build_loader(data, rank=rank, **arguments), batches)) for rank in range(world)]


def _keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def _bad(ranks: list[list[Batch]]) -> list[SkippedSample]:
    return [record for batches in ranks for batch in batches for record in batch.bad]


@pytest.mark.parametrize("workers", [0, rarely(2)])
@pytest.mark.parametrize(
    ("sizes", "world"),
    [((9, 1, 30, 4, 4, 4, 4), 2), ((5, 40), 4), ((3,), 4), ((1, 1), 4)],
    ids=["uneven shards", "fewer shards than ranks", "fewer samples than ranks", "shards of one sample"],
)
def test_no_rank_starves_and_ranks_differ(tmp_path: Path, sizes: tuple[int, ...], world: int, workers: int) -> None:
    ranks = _load(_shards(tmp_path, *sizes), 40, world=world, workers=workers)
    for batches in ranks:
        assert [len(batch.keys) for batch in batches] == [8 // world] * 40
    numbers = [number for batches in ranks for batch in batches for number in batch.image_numbers.tolist()]
    assert sorted(numbers) == list(range(40 * 8))
    known = {f"s{shard}/{name}" for shard, size in enumerate(sizes) for name, _ in _samples(shard, size)}
    assert {key for batches in ranks for key in _keys(batches)} == known
    assert not _bad(ranks)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_pass_of_all_readers_has_every_sample_once(tmp_path: Path, workers: int) -> None:
    pattern = _shards(tmp_path, 16, 16, 16, 16)
    ranks = _load(pattern, 16, world=2, workers=workers, batch=4, buffer=1)
    counts = Counter(key for batches in ranks for key in _keys(batches))
    assert len(counts) == 64
    assert set(counts.values()) == {1}


def test_samples_are_those_of_the_tar_without_its_classes(tmp_path: Path) -> None:
    pattern = _shards(tmp_path, 8)
    (batches,) = _load(pattern, 2, augment=False)
    plain = {sample["__key__"]: sample["txt"].decode() for sample in wds.WebDataset(pattern, shardshuffle=False)}
    for batch in batches:
        assert [plain[key.removeprefix("s0/")] for key in batch.keys] == batch.captions
        assert batch.classes.tolist() == [-1] * 8
        assert tuple(batch.images.shape) == (8, 3, 8, 8)
        assert batch.images.std() > 0.1
    assert _keys(batches[:1]) != sorted(_keys(batches[:1]))  # shuffled


def test_the_same_run_twice_and_a_run_that_goes_on(tmp_path: Path) -> None:
    pattern = _shards(tmp_path, *[4] * 12)
    first, again = _keys(_load(pattern, 3)[0]), _keys(_load(pattern, 3)[0])
    assert first == again
    on = _load(pattern, 3, start_image=24)[0]
    assert _keys(on) != first  # or a run that is stopped often would see the beginning alone
    assert on[0].image_numbers.tolist() == list(range(24, 32))


def _without_end(content: bytes) -> bytes:
    return content.rstrip(b"\0")


def _cut(content: bytes, header: int, more: int = 0) -> bytes:
    """A tar up to its n-th header and some bytes more."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return content[: archive.getmembers()[header].offset + more]


def _spoiled(content: bytes, header: int) -> bytes:
    """A tar whose n-th header has another checksum."""
    at = len(_cut(content, header)) + 148
    return content[:at] + b"999999" + content[at + 6 :]


FAULTS = {
    "cut between samples": (lambda tar: _cut(tar, 9), 2, "s0/0-002", "tar ends without end-of-archive"),
    "cut between members": (lambda tar: _cut(tar, 10), 3, "s0/0-003", "tar ends without end-of-archive"),
    "cut in a member": (lambda tar: _cut(tar, 9, 600), 2, "s0/0-002", "member reaches beyond the end of the tar"),
    "cut in a header": (lambda tar: _cut(tar, 9, 100), 2, "s0/0-002", "tar ends without end-of-archive"),
    "no end": (lambda tar: _cut(tar, 12 * 2 - 1), 7, "s0/0-007", "tar ends without end-of-archive"),
    "bad header": (lambda tar: _spoiled(tar, 9), 2, "s0/0-002", "no tar header where one should be"),
    "zeros inside": (lambda tar: _cut(tar, 9) + bytes(512) + tar, 2, "s0/0-002", "zeros between members"),
    "empty": (lambda tar: b"", 0, "s0/(all of it)", "empty file"),
    "zeros alone": (lambda tar: bytes(10240), 0, "s0/(all of it)", "not a tar, or an empty one"),
    "a web page": (lambda tar: b"<html>" * 500, 0, "s0/(all of it)", "not a tar, or an empty one"),
    "compressed": (
        lambda tar: b"\x1f\x8b\x08" + tar,
        0,
        "s0/(all of it)",
        "compressed file or zip archive, not a plain tar",
    ),
}


@pytest.mark.parametrize("piece", [1, 700, 1 << 20])
@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_tar_gives_whole_samples_and_says_where_it_ends(tmp_path: Path, name: str, piece: int) -> None:
    damage, num_whole, key, reason = FAULTS[name]
    content = damage(write_tar(tmp_path / "s0.tar", _samples(0, 8)).read_bytes())
    if piece == 1:
        content = content[:30_000]
    chunks = (content[at : at + piece] for at in range(0, len(content), piece))
    *samples, record = read_samples(chunks, "s0", "s0.tar")
    if piece > 1:
        assert (record.key, record.reason, record.shard) == (key, reason, "s0.tar")  # type: ignore[union-attr]
        assert len(samples) == num_whole
    for sample, (sample_name, members) in zip(samples, _samples(0, 8), strict=False):
        assert sample == {"__key__": f"s0/{sample_name}", **members}


def test_a_whole_tar_gives_what_webdataset_gives(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s0.tar", _samples(0, 8))
    plain = [
        {key: value for key, value in sample.items() if key not in ("__url__", "__local_path__")}
        for sample in wds.WebDataset(str(path), shardshuffle=False)
    ]
    found = [*read_samples([path.read_bytes()], "s0", "s0.tar")]
    assert found == [{**sample, "__key__": f"s0/{sample['__key__']}"} for sample in plain]


def test_names_that_repeat_or_cannot_be_printed(tmp_path: Path) -> None:
    picture = make_sample(0, 8, np.random.default_rng(0))["png"]
    with tarfile.open(tmp_path / "s0.tar", "w") as archive:
        for name in ("a.png", "b.png", "b.png", "c\n.png", "d.png"):
            info = tarfile.TarInfo(name)
            info.size = len(picture)
            archive.addfile(info, io.BytesIO(picture))
    found = [*read_samples([(tmp_path / "s0.tar").read_bytes()], "s0", "s0.tar")]
    assert [sample["__key__"] for sample in found if isinstance(sample, dict)] == ["s0/a", "s0/d"]
    assert [(bad.key, bad.reason) for bad in found if isinstance(bad, SkippedSample)] == [
        ("s0/b", "two members of one name"),
        ("s0/c\\n", "name is not printable UTF-8"),
    ]


def test_a_member_that_would_fill_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ldm_scale.data.tar_stream.MAX_MEMBER", 1 << 20)
    path = write_tar(tmp_path / "s0.tar", [*_samples(0, 2), ("big", {"png": bytes(3 << 20)})])
    *samples, record = read_samples([path.read_bytes()], "s0", "s0.tar")
    assert len(samples) == 1  # the second is not known to be whole
    assert isinstance(record, SkippedSample)
    assert record.reason.startswith("member of more than")


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_and_a_broken_tar_are_counted_named_and_skipped(tmp_path: Path, workers: int) -> None:
    samples = _samples(0, 8)
    samples[2][1]["png"] = broken_png()
    del samples[5][1]["png"]
    write_tar(tmp_path / "s0.tar", samples)
    tar = write_tar(tmp_path / "s1.tar", _samples(1, 8))
    tar.write_bytes(_cut(tar.read_bytes(), 3 * NUM_MEMBERS))
    ranks = _load(str(tmp_path / "s?.tar"), 6, workers=workers)
    assert all(len(batch.keys) == 8 for batch in ranks[0])
    keys = set(_keys(ranks[0]))
    assert keys == {f"s0/0-{n:03d}" for n in range(8) if n not in (2, 5)} | {"s1/1-000", "s1/1-001"}
    found = {(record.key, record.reason) for record in _bad(ranks)}
    broken = {reason for key, reason in found if key == "s0/0-002"}
    assert len(broken) == 1
    assert found - {("s0/0-002", *broken)} == {
        ("s0/0-005", "no image (png, jpg, jpeg, webp)"),
        ("s1/1-002", "tar ends without end-of-archive"),
    }
    for record in _bad(ranks):
        assert record.shard == str(tmp_path / f"{record.key[:2]}.tar")
        assert record.substitute in keys
        assert record.position >= 0


def test_a_loss_that_the_buffer_meets_many_times_is_told_once(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "s0.tar", _samples(0, 3))
    tar.write_bytes(_cut(tar.read_bytes(), 2 * NUM_MEMBERS))
    (batches,) = _load(str(tar), 4, buffer=200)
    assert [(record.key, record.reason) for record in _bad([batches])] == [
        ("s0/0-001", "tar ends without end-of-archive")
    ]


def test_too_many_bad_ones_in_a_row_stop_with_their_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "s0.tar", [(f"{n:02d}", {"png": broken_png()}) for n in range(30)])
    with pytest.raises(DataError, match=r"21 samples in a row in .*s0\.tar cannot be used .*s0/0"):
        _load(str(tmp_path / "s0.tar"), 1)
    (tmp_path / "s0.tar").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"21 samples in a row .*s0/\(all of it\) \(not a tar, or an empty one\)"):
        _load(str(tmp_path / "s0.tar"), 1)
    write_tar(tmp_path / "s0.tar", [("README", {"": b"x"})])
    with pytest.raises(DataError, match="in a row"):
        _load(str(tmp_path / "s0.tar"), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_web_server_that_breaks(tmp_path: Path, workers: int) -> None:
    _shards(tmp_path, 8, 8, 8)
    files = {f"/{path.name}": path.read_bytes() for path in tmp_path.glob("*.tar")}
    files["/s2.tar"] = _cut(files["/s2.tar"], 4 * NUM_MEMBERS)
    with FaultServer(files) as server:
        for path in files:
            server.plan(path, fault("reset", after=5000), fault("status", status=503), fault("close", after=9000))
        ranks = _load(f"http://user:secret@{server.host}/s{{0..3}}.tar?sig=abc", 12, world=2, workers=workers)
    keys = {key for batches in ranks for key in _keys(batches)}
    whole = {f"s{shard}/{name}" for shard in (0, 1) for name, _ in _samples(shard, 8)}
    assert keys == whole | {f"s2/{name}" for name, _ in _samples(2, 3)}
    assert {(record.key, record.reason) for record in _bad(ranks)} == {
        ("s2/2-003", "tar ends without end-of-archive"),
        ("s3/(all of it)", "shard cannot be read"),
    }
    assert {record.shard for record in _bad(ranks)} == {f"http://{server.host}/s{n}.tar" for n in (2, 3)}


def test_the_log_says_once_and_on_rank_0_what_is_not_guaranteed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "_said", set())
    monkeypatch.setattr(log.get_logger(), "info", said.append)
    _load(_shards(tmp_path, 4, 4), 1, world=2)
    assert len(said) == 1
    for word in (
        "any number of ranks",
        "once an epoch",
        "exact resumption",
        "lost samples",
        "checksums",
        "class names",
    ):
        assert word in said[0]
    assert f"`ldm-scale prepare index '{tmp_path}/s{{0..1}}.tar' --out MANIFEST`" in said[0]


def test_what_needs_a_manifest_says_so(tmp_path: Path) -> None:
    pattern = _shards(tmp_path, 4)
    with pytest.raises(ConfigError, match=r"s0\.tar names shards without a manifest, and a pass over every sample"):
        _load(pattern, 1, num_epochs=1)
    with pytest.raises(ConfigError, match=r"a conditioning on boxes or maps needs one: .*`ldm-scale prepare index"):
        _load(pattern, 1, annotations=frozenset({"layout"}))
    with pytest.raises(ConfigError, match="and this needs one"):
        open_manifest(pattern, "train")
    write_tar(tmp_path / "s0.tar", [("a", {"latents.json": b"{}", "txt": b"a"})])
    with pytest.raises(ConfigError, match="a cache of latents"):
        _load(pattern, 1)
    with pytest.raises(DataError, match="matches nothing"):
        _load(str(tmp_path / "t*.tar"), 1)
    with pytest.raises(DataError, match="pipe"):
        _load("pipe:cat s0.tar", 1)
