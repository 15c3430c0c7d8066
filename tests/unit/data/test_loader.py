from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_scale.config.schema import DataConfig
from ldm_scale.data import Batch, Loader, build_loader, open_manifest
from ldm_scale.data.decode import DecodeSettings, decode_sample
from ldm_scale.data.order import Order, replacement_at
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.errors import ConfigError, DataError
from tests.helpers.shards import broken_png, make_dataset, make_sample, write_tar


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("shards"), num_samples=22, samples_per_shard=8, resolution=16)


def _load(
    manifest: Path,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    batch: int = 8,
    micro: int | None = None,
    **rest: object,
) -> Loader:
    data = DataConfig(
        manifest=str(manifest),
        resolution=8,
        crop_scale_min=0.7,
        horizontal_flip=True,
        num_workers=workers,
        prefetch_batches=2,
        max_consecutive_bad=3,
    )
    size = batch // world if micro is None else micro
    return build_loader(data, seed=3, global_batch=batch, micro_batch=size, rank=rank, world_size=world, **rest)  # type: ignore[arg-type]


def _same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.classes, other.classes)
        and torch.equal(one.image_numbers, other.image_numbers)
        and (one.captions, one.keys, one.bad) == (other.captions, other.keys, other.bad)
    )


def test_batches_hold_what_order_and_decoder_say(manifest: Path) -> None:
    dataset = open_manifest(manifest, "train")
    settings = DecodeSettings(8, 0.7, True, seed=3)
    for batch_index, batch in enumerate(islice(_load(manifest), 7)):
        assert batch.images.shape == (8, 3, 8, 8)
        for row in range(8):
            position = 8 * batch_index + row
            raw = dataset.read(int(Order(22, 3, 8).locate(np.array([position])).samples[0]))
            wanted = decode_sample(raw, settings, dataset.vocabulary, position, position // 22)
            picture = torch.tensor(wanted.image.transpose(2, 0, 1) / 127.5 - 1.0, dtype=torch.float32)
            torch.testing.assert_close(batch.images[row], picture, atol=1e-6, rtol=0)
            assert batch.image_numbers[row] == position
            assert (batch.captions[row], batch.keys[row]) == (wanted.caption, wanted.key)
            assert batch.classes[row] == wanted.label


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_a_global_batch_is_the_same_at_any_number_of_ranks_and_workers(
    manifest: Path, workers: int, world: int, micro: int
) -> None:
    reference = list(islice(_load(manifest), 6))
    parts = 8 // world // micro
    streams = [
        list(islice(_load(manifest, rank=r, world=world, workers=workers, micro=micro), 6 * parts))
        for r in range(world)
    ]
    for index, whole in enumerate(reference):
        pieces = [batch for stream in streams for batch in stream[index * parts : (index + 1) * parts]]
        assert all(len(piece.keys) == micro for piece in pieces)
        assert [key for piece in pieces for key in piece.keys] == whole.keys
        assert torch.equal(torch.cat([piece.images for piece in pieces]), whole.images)
        assert torch.equal(torch.cat([piece.image_numbers for piece in pieces]), whole.image_numbers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_where_it_stopped(manifest: Path, workers: int) -> None:
    unbroken = list(islice(_load(manifest, workers=workers), 9))
    resumed = list(islice(_load(manifest, workers=workers, start_image=40), 4))
    assert all(_same(one, other) for one, other in zip(unbroken[5:], resumed, strict=True))


def test_more_ranks_than_shards_and_samples_trains(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path, num_samples=3, samples_per_shard=3, resolution=8)
    keys = [
        key
        for rank in range(8)
        for batch in islice(_load(manifest, rank=rank, world=8, workers=1, batch=8), 3)
        for key in batch.keys
    ]
    assert Counter(Counter(keys).values()) == {8: 3}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 4), (2, 3), (4, 2), (4, 1)])
def test_validation_sees_every_sample_once_in_equal_numbers_of_batches(
    manifest: Path, workers: int, world: int, micro: int
) -> None:
    batch = world * micro
    ranks = [
        list(
            _load(manifest, rank=r, world=world, workers=workers, batch=batch, micro=micro, num_epochs=1, augment=False)
        )
        for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [key for batches in ranks for piece in batches for key in piece.keys]
    assert len(seen) == len(set(seen)) == 22
    numbers = torch.cat([piece.image_numbers for batches in ranks for piece in batches])
    assert sorted(numbers.tolist()) == list(range(22))


def _with_bad_samples(folder: Path, bad: dict[int, dict[str, bytes]], num_samples: int = 16) -> Path:
    rng = np.random.default_rng(0)
    samples = [(f"{n:03d}", {**make_sample(n, 8, rng), **bad.get(n, {})}) for n in range(num_samples)]
    index_tars([write_tar(folder / "s.tar", samples)], folder / "manifest.json", "train")
    return folder / "manifest.json"


def test_bad_samples_are_replaced_alike_on_any_rank_counted_and_named(tmp_path: Path) -> None:
    manifest = _with_bad_samples(tmp_path, {2: {"png": broken_png()}, 9: {"txt": b"\x81"}})
    whole = _load(manifest)
    reference = list(islice(whole, 4))
    assert all(len(batch.keys) == 8 for batch in reference)
    assert whole.bad_samples.names == {
        "s/002": "image does not decode",
        "s/009": "caption is not text in UTF-8, UTF-16 or cp1252",
    }
    assert whole.bad_samples.counts.total() == sum(len(batch.bad) for batch in reference) >= 4
    delivered = {key for batch in reference for key in batch.keys}
    assert len(delivered) == 14
    assert not delivered & {"s/002", "s/009"}
    order = [f"s/{n:03d}" for n in Order(16, 3, 8).locate(np.arange(32)).samples]
    wanted = [key for batch in reference for key in batch.keys]
    for position, (ordered, key) in enumerate(zip(order, wanted, strict=True)):
        attempt = 0
        while ordered in ("s/002", "s/009"):
            attempt += 1
            ordered = f"s/{replacement_at(position, attempt, 16, seed=3):03d}"
        assert key == ordered

    for world, workers in ((2, 0), (4, 2)):
        streams = [list(islice(_load(manifest, rank=r, world=world, workers=workers), 4)) for r in range(world)]
        assert [key for step in zip(*streams, strict=True) for batch in step for key in batch.keys] == wanted


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_in_a_row_stop_with_their_names(tmp_path: Path, workers: int) -> None:
    manifest = _with_bad_samples(tmp_path, {n: {"png": broken_png()} for n in range(16)})
    with pytest.raises(DataError) as caught:
        list(_load(manifest, workers=workers, num_epochs=1))
    message = str(caught.value)
    assert re.match(r"4 samples in a row in \S+s.tar cannot be used \(data.max_consecutive_bad=3\): s/", message)
    assert message.count("image does not decode") == 4
    assert "Traceback" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changes_under_way_is_a_plain_data_error(tmp_path: Path, workers: int) -> None:
    manifest = make_dataset(tmp_path, num_samples=8, samples_per_shard=8, resolution=8)
    loader = _load(manifest, workers=workers)
    shard = tmp_path / "train-000000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DataError, match=r"^4 samples in a row in \S+train-000000.tar cannot be used .*those that were"):
        next(iter(loader))


def test_workers_do_not_touch_the_random_numbers_of_the_training(manifest: Path) -> None:
    drawn = []
    for workers in (0, 1):
        torch.manual_seed(0)
        list(islice(_load(manifest, workers=workers), 2))
        drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[1]


def test_arithmetic_that_does_not_work_out_names_the_keys(manifest: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.global_batch=8 .* ranks x train.micro_batch = 3 x 2"):
        _load(manifest, world=3, micro=2)
    with pytest.raises(ConfigError, match=r"cannot start at image 20: .* multiple of train.global_batch=8"):
        _load(manifest, start_image=20)
    with pytest.raises(ConfigError, match=r"data\.manifest is empty"):
        build_loader(replace(DataConfig(), manifest=""), seed=0, global_batch=1, micro_batch=1, rank=0, world_size=1)
    with pytest.raises(DataError, match="no split 'heldout'; it has: train"):
        _load(manifest, split="heldout")


SCRIPT = """
    import sys, torch
    from ldm_scale.config.schema import DataConfig
    from ldm_scale.data import build_loader
    data = DataConfig(manifest=sys.argv[1], resolution=8, num_workers=2, prefetch_batches=1)
    try:
        for batch in build_loader(data, seed=0, global_batch=4, micro_batch=4, rank=0, world_size=1):
            print(int(batch.image_numbers[0]), flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the children of a process from /proc")
def test_workers_leave_signals_to_the_training_process(manifest: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(manifest)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        # Background jobs of a shell ignore SIGINT, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        for _ in range(4):
            process.stdout.readline()
        workers = _children(process.pid)
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        before = int(process.stdout.readline())
        lines = [int(process.stdout.readline()) for _ in range(200)]
        assert lines == list(range(before + 4, before + 804, 4))
        assert all(_alive(pid) for pid in workers)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert out.splitlines()[-1] == "interrupted"
        assert err == ""
        assert process.returncode == 0
        deadline = time.monotonic() + 10
        while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(_alive(pid) for pid in workers)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the children of a process from /proc")
def test_a_loader_that_is_let_go_leaves_no_worker_behind(manifest: Path) -> None:
    before = set(_children(os.getpid()))
    batches = iter(_load(manifest, workers=2))
    next(batches)
    workers = set(_children(os.getpid())) - before
    assert len(workers) == 2
    batches.close()  # type: ignore[attr-defined]
    assert not any(_alive(pid) for pid in workers)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the children of a process from /proc")
def test_a_loader_whose_processes_hang_leaves_nothing_behind(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(_load(manifest, workers=2, num_epochs=1))  # what a process keeps for all its loaders
    monkeypatch.setattr("ldm_scale.data.loader._END_S", 0.2)
    others, files = set(_children(os.getpid())), len(os.listdir("/proc/self/fd"))
    batches = iter(_load(manifest, workers=2))
    next(batches)
    workers = set(_children(os.getpid())) - others
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    batches.close()  # type: ignore[attr-defined]
    assert not any(_alive(pid) for pid in workers)
    assert "batches" not in {thread.name for thread in threading.enumerate()}
    given_up = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > files and time.monotonic() < given_up:
        time.sleep(0.01)  # threads of the standard library close the queues
    assert len(os.listdir("/proc/self/fd")) <= files


def test_a_loader_process_that_dies_is_an_error_in_words(manifest: Path) -> None:
    before = set(_children(os.getpid()))
    batches = iter(_load(manifest, workers=2))
    next(batches)
    os.kill((set(_children(os.getpid())) - before).pop(), signal.SIGKILL)
    with pytest.raises(DataError, match=r"a loader process died .* lower data\.num_workers"):
        list(batches)


KILLED = """
    import sys, torch
    from ldm_scale.config.schema import DataConfig
    from ldm_scale.data import build_loader
    manifest, start, workers, micro = sys.argv[1], *map(int, sys.argv[2:])
    data = DataConfig(manifest=manifest, resolution=8, num_workers=workers, prefetch_batches=2, lanes=4)
    arguments = dict(seed=2, global_batch=8, micro_batch=micro, rank=0, world_size=1, start_image=start)
    for batch in build_loader(data, **arguments):
        print(*batch.keys, flush=True)
"""


@pytest.mark.rest
def test_a_run_that_is_killed_again_and_again_sees_the_sequence_of_an_unbroken_one(manifest: Path) -> None:
    data = DataConfig(manifest=str(manifest), resolution=8, num_workers=0, lanes=4)
    unbroken = build_loader(data, seed=2, global_batch=8, micro_batch=8, rank=0, world_size=1)
    wanted = [key for batch in islice(unbroken, 24) for key in batch.keys]
    seen: list[str] = []
    for workers, micro, num_batches in ((0, 8, 5), (2, 4, 7), (3, 8, 12)):  # in batches of eight
        arguments = [str(manifest), str(len(seen)), str(workers), str(micro)]
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        for _ in range(num_batches * 8 // micro):
            seen += process.stdout.readline().split()
        process.kill()
        process.wait()
        process.stdout.close()
    assert seen == wanted


def test_a_small_limit_of_open_files_costs_no_sample(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path, num_samples=200, samples_per_shard=1, resolution=8)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    try:
        batches = list(islice(_load(manifest, workers=0), 50))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not [record for batch in batches for record in batch.bad]


def test_a_sidecar_with_damaged_names_costs_its_samples(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path, num_samples=40, samples_per_shard=8, resolution=8)
    sidecar = tmp_path / "train-000001.index.safetensors"
    sidecar.write_bytes(sidecar.read_bytes().replace(b"train00010", b"train\xff0010"))
    records = [record for batch in islice(_load(manifest), 10) for record in batch.bad]
    assert {record.reason for record in records} == {"its shard's index cannot be used"}
    assert {record.key for record in records if record.position >= 0} == {"train-000001/(sample 2)"}
