"""Training from shards on a web server: the batches of local shards, whatever goes wrong on the way, at little cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_scale.config.schema import DataConfig
from ldm_scale.data import Batch, build_loader, open_manifest
from ldm_scale.data import loader as loader_module
from ldm_scale.data.sources.tars import IndexOptions, index_tars
from ldm_scale.data.storage import Storage, StorageSettings
from ldm_scale.errors import DataError
from tests.helpers.fault_server import OK, FaultServer, fault
from tests.helpers.shards import make_sample, write_tar

NUM_SHARDS, PER_SHARD = 6, 24
QUICK = StorageSettings(connect_s=1, stall_s=0.5, budget_s=3, max_retries=4, backoff_s=0.01, max_backoff_s=0.05)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    rng = np.random.default_rng(0)
    for shard in range(NUM_SHARDS):
        samples = [(f"{n:03d}", make_sample(PER_SHARD * shard + n, 24, rng)) for n in range(PER_SHARD)]
        # Bytes that tell neighbours apart, and make a sample larger than the gap that one request bridges.
        padded = [(name, {**members, "bin": rng.bytes(20_000)}) for name, members in samples]
        write_tar(folder / f"s{shard}.tar", padded)
    index_tars([folder / "*.tar"], folder / "manifest.json", "train")
    return folder


@pytest.fixture(scope="module")
def server(local: Path) -> Iterator[FaultServer]:
    with FaultServer({f"/{path.name}": path.read_bytes() for path in local.glob("*.tar")}) as server:
        yield server


@pytest.fixture
def remote(local: Path, server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The manifest of the same shards on the server, which has counted nothing yet."""
    monkeypatch.setattr(loader_module, "build_storage", lambda data: Storage(QUICK))
    server.reset({f"/{path.name}": path.read_bytes() for path in local.glob("*.tar")})
    urls = [server.url(path) for path in sorted(server.files)]
    index_tars(urls, tmp_path / "manifest.json", "train", options=IndexOptions(workers=1, checksums=True))
    server.counts.clear()
    return tmp_path / "manifest.json"


@pytest.fixture(autouse=True)
def _chunks_in_small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_scale.data.order._CHUNKS_PER_LANE", 1)


def _load(
    manifest: Path, *, rank: int = 0, world: int = 1, workers: int = 0, batch: int = 16, **rest: int
) -> Iterator[Batch]:
    data = DataConfig(
        manifest=str(manifest),
        resolution=16,
        num_workers=workers,
        prefetch_batches=1,
        lanes=8,
        chunk_samples=4,
        block_chunks=3,
        read_ahead_batches=2,
        fetch_threads=3,
        max_bad_share=1.0,
    )
    arguments = {"global_batch": batch, "micro_batch": batch // world, "rank": rank, "world_size": world, **rest}
    return iter(build_loader(data, seed=5, **arguments))  # type: ignore[arg-type]


def _same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return all(
        one.keys == other.keys and torch.equal(one.images, other.images) and one.bad == other.bad == []
        for one, other in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (4, 0)])
def test_batches_are_those_of_local_shards(local: Path, remote: Path, world: int, workers: int) -> None:
    for rank in range(world):
        wanted = list(islice(_load(local / "manifest.json", rank=rank, world=world), 12))
        assert _same(list(islice(_load(remote, rank=rank, world=world, workers=workers), 12)), wanted)


FAULTS = [
    fault("reset", after=30_000),
    fault("close", after=100),
    fault("status", status=503, retry_after="0"),
    fault("status", status=429, retry_after="0.01"),
    fault("stall", after=1000, seconds=2.0),
    fault("corrupt"),
    fault("less"),
    fault("html"),
    fault("wrong_range"),
]


@pytest.mark.parametrize("what", FAULTS, ids=lambda what: what.kind)
def test_what_goes_wrong_on_the_way_changes_nothing(
    local: Path, remote: Path, server: FaultServer, what: object
) -> None:
    for path in server.files:
        server.plan(path, what, OK, what)
    assert _same(list(islice(_load(remote), 9)), list(islice(_load(local / "manifest.json"), 9)))


def test_a_shard_that_is_gone_costs_its_samples_alone_and_alike_on_any_rank(
    local: Path, remote: Path, server: FaultServer
) -> None:
    dataset = open_manifest(local / "manifest.json", "train")
    ordered = [key for batch in islice(_load(local / "manifest.json"), 9) for key in batch.keys]
    assert sorted(ordered) == sorted(dataset.keys())
    opened = {world: [_load(remote, rank=rank, world=world) for rank in range(world)] for world in (1, 2)}
    server.always("/s2.tar", fault("status", status=404))  # a run that finds it missing at its start does not begin
    streams = {world: [list(islice(batches, 9)) for batches in ranks] for world, ranks in opened.items()}
    delivered = {
        world: [key for step in zip(*ranks, strict=True) for batch in step for key in batch.keys]
        for world, ranks in streams.items()
    }
    assert delivered[1] == delivered[2]
    lost = [record for batch in streams[1][0] for record in batch.bad]
    assert {record.reason for record in lost} == {"its shard cannot be read"}
    assert {record.shard for record in lost} == {server.url("/s2.tar")}
    replaced = {record.position: record.substitute for record in lost if record.position >= 0}
    assert len(replaced) == PER_SHARD
    for position, (wanted, found) in enumerate(zip(ordered, delivered[1], strict=True)):
        assert found == (replaced[position] if wanted.startswith("s2/") else wanted)
    assert not any(key.startswith("s2/") for key in delivered[1])


def test_eight_ranks_together_read_little_more_than_the_data(local: Path, remote: Path, server: FaultServer) -> None:
    for rank in range(8):
        assert len(list(islice(_load(remote, rank=rank, world=8), 45))) == 45  # five epochs
    served = sum(server.count(path).num_bytes for path in server.files)
    total = sum(map(len, server.files.values()))
    assert 4.8 * total < served < 5.6 * total  # with what is fetched ahead at the end
    requests = sum(server.count(path).requests for path in server.files)
    # Chunks of four, some cut by lanes, blocks and shards; besides, the sizes of four shards for each rank.
    assert requests < 5.6 * NUM_SHARDS * PER_SHARD / 2 + 8 * 4


def test_more_ranks_than_lanes_fetch_their_own_samples_alone(local: Path, remote: Path, server: FaultServer) -> None:
    for rank in range(16):
        list(islice(_load(remote, rank=rank, world=16), 45))
    served = sum(server.count(path).num_bytes for path in server.files)
    assert served < 5.7 * sum(map(len, server.files.values()))


def test_a_resumed_run_fetches_the_rest_of_its_blocks_and_nothing_before(remote: Path, server: FaultServer) -> None:
    last = list(islice(_load(remote, start_image=8 * 16, num_epochs=1), 1))
    assert len(last[0].keys) == 16
    served = sum(server.count(path).num_bytes for path in server.files)
    assert served < 2.5 / 9 * sum(map(len, server.files.values()))  # a ninth is delivered


def test_bytes_are_let_go_when_they_have_been_delivered(remote: Path) -> None:
    data = DataConfig(manifest=str(remote), resolution=16, num_workers=0, lanes=8, chunk_samples=4, block_chunks=3)
    loader = build_loader(data, seed=5, global_batch=16, micro_batch=16, rank=0, world_size=1, num_epochs=1)
    (ahead,) = [stage for stage in loader._pipeline.pipeline if type(stage).__name__ == "ReadAhead"]
    most = 0
    for _ in loader:
        most = max(most, sum(len(ranges) for ranges in ahead._by_shard.values()))
    assert most > 0
    assert ahead._by_shard == ahead._ranges == {}


def test_credentials_are_in_no_message(
    local: Path, server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "build_storage", lambda data: Storage(replace(QUICK, budget_s=0.5)))
    server.reset({f"/{path.name}": path.read_bytes() for path in local.glob("*.tar")})
    urls = [server.url(path).replace("http://", "http://u:hush@") + "?sig=hush" for path in sorted(server.files)]
    index_tars(urls, tmp_path / "manifest.json", "train", options=IndexOptions(workers=1))
    for path in server.files:
        server.always(path, fault("status", status=403))
    with pytest.raises(DataError) as caught:
        next(_load(tmp_path / "manifest.json"))
    assert "hush" not in str(caught.value) + repr(caught.value)
