"""`ldm-scale doctor order`: the keys that loaders deliver, whatever the ranks; mistakes are one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_scale.__main__ import main
from ldm_scale.config.schema import DataConfig
from ldm_scale.data import build_loader, open_manifest
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.data.stream import build_stream
from ldm_scale.operations.doctor_order import held_by
from tests.helpers.shards import make_dataset, png, write_tar

SEED, BATCH = 3, 8
SMALL = ("--lanes", "3", "--chunk-samples", "2", "--block-chunks", "2")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("plain"), num_samples=22, samples_per_shard=8, resolution=16)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    for seed, (name, count) in enumerate((("a", 11), ("b", 30))):
        make_dataset(folder / name, num_samples=count, resolution=16, seed=seed)
        for file in (folder / name).glob("train-*"):  # keys that tell the data sets apart
            file.rename(file.with_name(f"{name}{file.name}"))
        manifest = folder / name / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"train-', f'"{name}train-'))
    out = folder / "mixture.json"
    assert main(["prepare", "mix", f"{folder / 'a'}=3", f"{folder / 'b'}=1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def buckets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("buckets")
    shapes = ([(32, 32)] * 3 + [(40, 24)] * 2 + [(24, 40)]) * 6
    samples = [(f"{n:03d}", {"png": png(Image.new("RGB", shape)), "txt": b"x"}) for n, shape in enumerate(shapes)]
    tars = [write_tar(folder / f"s{k}.tar", samples[9 * k : 9 * k + 9]) for k in range(4)]
    index_tars(tars, folder / "manifest.json", "train")
    out = folder / "buckets.json"
    options = ["--resolution", "32", "--step", "8", "--out", str(out)]
    assert main(["prepare", "buckets", str(folder / "manifest.json"), *options]) == 0
    return out


@pytest.fixture
def manifest(request: pytest.FixtureRequest) -> Path:
    """The one that the test is parametrized with."""
    path: Path = request.getfixturevalue(request.param)
    return path


EVERY_KIND = pytest.mark.parametrize("manifest", ["plain", "mixture", "buckets"], indirect=True)


def _asked(manifest: Path, world: int = 1, epoch: int = 0, batches: str = "0:6", *more: str) -> list[str]:
    numbers = ["--seed", str(SEED), "--epoch", str(epoch), "--global-batch", str(BATCH), "--world-size", str(world)]
    return ["doctor", "order", str(manifest), *numbers, "--batches", batches, *more]


def _keys(
    capsys: pytest.CaptureFixture[str], manifest: Path, world: int = 1, epoch: int = 0, batches: str = "0:6", *more: str
) -> list[list[str]]:
    capsys.readouterr()
    assert main(_asked(manifest, world, epoch, batches, *more, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["batches"]
    keys: list[list[str]] = found["batches"]
    return keys


def _delivered(manifest: Path, world: int, workers: int, num_batches: int) -> list[list[str]]:
    """What the loaders of all ranks hand out, in two micro-batches each."""
    data = DataConfig(
        manifest=str(manifest), resolution=16, num_workers=workers, lanes=3, chunk_samples=2, block_chunks=2
    )
    micro = BATCH // world // 2
    streams = []
    for rank in range(world):
        loader = build_loader(
            data, seed=SEED, global_batch=BATCH, micro_batch=micro, rank=rank, world_size=world, start_image=BATCH
        )
        streams.append([batch.keys for batch in islice(loader, 2 * num_batches)])
    return [
        [key for stream in streams for keys in stream[2 * index : 2 * index + 2] for key in keys]
        for index in range(num_batches)
    ]


@EVERY_KIND
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_the_keys_are_those_that_loaders_deliver(
    manifest: Path, world: int, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _keys(capsys, manifest, world, 0, "1:7", *SMALL) == _delivered(manifest, world, workers, 6)


@EVERY_KIND
def test_the_keys_are_the_same_for_any_number_of_ranks(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = _keys(capsys, manifest)
    assert [len(keys) for keys in reference] == [BATCH] * 6
    for world in (2, 4, 8):
        assert _keys(capsys, manifest, world) == reference
    assert _keys(capsys, manifest, 1, 0, "0:6", *SMALL) == _keys(capsys, manifest, 8, 0, "0:6", *SMALL) != reference


def test_an_epoch_has_every_sample_once_and_begins_where_the_last_one_ends(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = sorted(open_manifest(plain, "train").keys())
    stream = [key for keys in _keys(capsys, plain, 2, 0, "0:30") for key in keys]
    for epoch in range(4):
        first = 22 * epoch // BATCH
        own = [key for keys in _keys(capsys, plain, 2, epoch, "0:4") for key in keys]
        assert own == stream[first * BATCH : (first + 4) * BATCH]
        skipped = 22 * epoch - first * BATCH  # images of the epoch before
        assert sorted(own[skipped : skipped + 22]) == everything
    assert _keys(capsys, plain, 1, 1, "2:3") == [stream[4 * BATCH : 5 * BATCH]]


def test_a_mixture_has_its_shares_in_every_batch(mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for keys in _keys(capsys, mixture, 4, 2, "0:9"):
        assert Counter(key[0] for key in keys) == {"a": 6, "b": 2}


def test_an_epoch_of_buckets_begins_with_its_first_batch(buckets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [18, 12, 6]
    stream = _keys(capsys, buckets, 1, 0, "0:40")
    for epoch in range(5):
        first = sum(epoch * size // BATCH for size in sizes)
        assert _keys(capsys, buckets, 2, epoch, "0:3") == stream[first : first + 3]
    dataset = open_manifest(buckets, "train")
    numbers = {key: number for number, key in enumerate(dataset.keys())}
    ends = np.cumsum([part.num_samples for part in dataset.parts])
    assert all(len({int(np.searchsorted(ends, numbers[key], side="right")) for key in keys}) == 1 for keys in stream)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"--world-size": "3"}, "--global-batch=8 must be a multiple of --world-size=3"),
        ({"--world-size": "16"}, "--global-batch=8 must be a multiple of --world-size=16"),
        ({"--world-size": "0"}, "--world-size=0 must be at least 1"),
        ({"--global-batch": "0"}, "--global-batch=0 must be at least 1"),
        ({"--epoch": "-1"}, "--epoch=-1 must be at least 0"),
        ({"--lanes": "0"}, "--lanes=0 must be at least 1"),
        ({"--batches": "4"}, "--batches=4 must be FROM:TO"),
        ({"--batches": "4:4"}, "--batches=4:4 must be FROM:TO"),
        ({"--batches": "a:b"}, "--batches=a:b must be FROM:TO"),
        ({"--epoch": str(10**18)}, "image numbers must stay below 2**62"),
    ],
)
def test_arguments_that_cannot_work_are_one_line(
    plain: Path, options: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _asked(plain)
    for name, value in options.items():
        arguments += [name, value]
    assert main(arguments) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"error: {said}" if said.startswith("--") else "error: ")
    assert said in errors
    assert errors.count("\n") == 1


def test_a_split_and_a_manifest_that_are_not_there(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*_asked(plain), "--split", "trian"]) != 0
    assert "no split 'trian'; it has: train" in capsys.readouterr().err
    assert main(_asked(tmp_path)) != 0
    assert "no manifest here" in capsys.readouterr().err


def test_a_table_tells_what_the_order_is_made_of(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (keys,) = _keys(capsys, plain, 1, 1, "0:1")
    capsys.readouterr()
    assert main(_asked(plain, 2, 1, "0:2")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        "samples per epoch: 22 in 3 shards; the epoch begins in global batch 2, after 6 images of epoch 0"
    )
    assert lines[2] == "order: 8 lanes, chunks of 1 samples, permuted in blocks of 1,024"
    # Slots 0 to 3 are lanes of their own, and epoch 1 (positions 22 to 43) has three of each.
    assert lines[-4].split() == ["0", "2", "16", "0", *", ".join(keys[:4]).split()]
    assert lines[-3].split() == ["20", "1", *", ".join(keys[4:]).split()]
    assert "a rank of 2 holds about 4 blocks open: 12 samples of 3 shards, 0.0 MiB" in lines[3]


def test_what_a_rank_holds_by_hand(plain: Path) -> None:
    dataset = open_manifest(plain, "train")
    stream = build_stream(dataset, SEED, BATCH, lanes=3, chunk=2, block_chunks=2)
    order = stream.pools[0].order
    # Slots 3 to 5 of a batch of 8 are the second of three lanes (ceil(8 / 3) = 3, ceil(16 / 3) = 6), slots 6 and 7 the
    # third; rank 1 of 2 has slots 4 to 7. The middle of epoch 1 is batch 33 // 8 = 4.
    positions = np.array([36, 37, 38, 39])
    assert [block.lane for block in order.block_at(positions)] == [1, 1, 2, 2]
    blocks = set(order.block_at(positions))
    held = [n for n in range(22 * 3) if order.block_at(np.array([n]))[0] in blocks]
    numbers = order.locate(np.array(held)).samples.tolist()
    shards = [dataset.shard_of(number) for number in numbers]
    found = held_by(dataset, stream, 1, 1, 2)
    assert (found.blocks, found.samples, found.shards) == (len(blocks), len(held), len({s.path for s in shards}))
    assert found.bytes == int(sum(shard.num_bytes / shard.num_samples for shard in shards))


def test_the_parts_of_a_mixture_and_buckets_are_told(
    mixture: Path, buckets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_asked(mixture)) == 0
    assert "6 of 8 slots: " in capsys.readouterr().out
    assert main(_asked(buckets)) == 0
    assert "bucket of (32, 32): 18 samples: 8 lanes" in capsys.readouterr().out


def test_nothing_is_imported_that_data_do_not_need(plain: Path) -> None:
    program = (
        "import sys; from ldm_scale.__main__ import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *_asked(plain), "--json"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    loaded = set(done.stderr.split())
    assert not loaded & {"deepspeed", "matplotlib", "diffusers", "torchvision", "ldm_scale.models", "hydra"}
