"""Losses over ranks: written down once, counted alike everywhere, and a bad shard leaves the run on all of them."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.config.schema import DataConfig
from ldm_scale.data import build_loader, open_manifest
from ldm_scale.data.policy import LossAccount
from ldm_scale.engine import env
from ldm_scale.errors import DataError
from ldm_scale.training.sample_losses import SampleLosses
from ldm_scale.training.state import TrainingState
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_config
from tests.helpers.shards import make_dataset

NUM_BATCHES, BATCH = 30, 8


def _settled(
    run_dir: Path, data: DataConfig, state: dict[str, Any], start: int
) -> tuple[list[list[str]], dict[str, Any]]:
    """Keys of this rank's batches, and the state after them."""
    launch = env.read_launch()
    config = tiny_config("autoencoder", Path(data.manifest), run_dir)
    environment = env.start(launch, config.train)
    account = TrainingState.from_dict(state).losses if state else LossAccount()
    loader = build_loader(
        data,
        seed=1,
        global_batch=BATCH,
        micro_batch=BATCH // launch.world_size,
        rank=launch.rank,
        world_size=launch.world_size,
        start_image=start,
        quarantined={int(number): begins for number, begins in account.quarantined.items()},
    )
    losses = SampleLosses(account, run_dir, open_manifest(data.manifest, "train", False), data, environment.is_main)
    keys = []
    for index, batch in enumerate(islice(loader, NUM_BATCHES - start // BATCH)):
        losses.settle(losses.named([batch]), start + index * BATCH, BATCH, loader)
        keys.append(batch.keys)
    return keys, TrainingState(losses=account).to_dict()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """48 samples in six shards, of which the second changes its bytes."""
    monkeypatch.setattr("ldm_scale.training.sample_losses.QUARANTINE_DELAY_BATCHES", 12)
    manifest = make_dataset(tmp_path / "data", num_samples=48, samples_per_shard=8, resolution=8)
    shard = tmp_path / "data" / "train-000001.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    (tmp_path / "run").mkdir()
    return DataConfig(manifest=str(manifest), resolution=8, num_workers=0, prefetch_batches=2, max_bad_share=0.5)


def test_ranks_agree_and_a_bad_shard_is_left_alone(tmp_path: Path, data: DataConfig) -> None:
    (alone, state), *_ = run_ranks(_settled, 1, tmp_path / "run", data, {}, 0)
    assert state["losses"]["quarantined"].keys() == {"1"}
    begins = state["losses"]["quarantined"]["1"]
    assert begins % BATCH == 0
    assert begins < 48 + 12 * BATCH
    files = {name: (tmp_path / "run" / name).read_text() for name in ("bad_samples.jsonl", "substitutions.jsonl")}
    samples = [json.loads(line) for line in files["bad_samples.jsonl"].splitlines()]
    assert {sample["key"] for sample in samples} == {f"train-000001/train{n:05d}" for n in range(8, 16)}
    assert {sample["reason"] for sample in samples} == {"bytes are not those that were indexed"}
    places = [json.loads(line) for line in files["substitutions.jsonl"].splitlines()]
    assert len({place["position"] for place in places}) == 8 * (NUM_BATCHES * BATCH // 48)
    assert state["losses"]["total"] >= len(places)  # a bad substitute may be met twice at a position

    (tmp_path / "two").mkdir()
    ranks = run_ranks(_settled, 2, tmp_path / "two", data, {}, 0)
    assert [state for _, state in ranks] == [state] * 2
    assert [left + right for left, right in zip(ranks[0][0], ranks[1][0], strict=True)] == alone
    assert {name: (tmp_path / "two" / name).read_text() for name in files} == files


def test_a_resumed_run_decides_and_writes_as_the_unbroken_one(tmp_path: Path, data: DataConfig) -> None:
    (alone, state), *_ = run_ranks(_settled, 1, tmp_path / "run", data, {}, 0)
    for stop in (2, 20):
        folder = tmp_path / f"stopped{stop}"
        folder.mkdir()
        part = dataclasses.replace(data)
        first, middle = run_ranks(_first_batches, 1, folder, part, stop)[0]
        second, end = run_ranks(_settled, 1, folder, part, middle, stop * BATCH)[0]
        assert first + second == alone
        assert end == state
        for name in ("bad_samples.jsonl", "substitutions.jsonl"):
            assert (folder / name).read_text() == (tmp_path / "run" / name).read_text()


def _first_batches(folder: Path, data: DataConfig, stop: int) -> tuple[list[list[str]], dict[str, Any]]:
    global NUM_BATCHES
    whole, NUM_BATCHES = NUM_BATCHES, stop
    try:
        return _settled(folder, data, {}, 0)
    finally:
        NUM_BATCHES = whole


def _stops(run_dir: Path, data: DataConfig) -> str:
    try:
        _settled(run_dir, data, {}, 0)
    except DataError as error:
        return str(error)
    return ""


def test_a_run_with_too_many_losses_stops_on_all_ranks(tmp_path: Path, data: DataConfig) -> None:
    data = dataclasses.replace(data, max_bad_share=0.1)
    messages = run_ranks(_stops, 2, tmp_path / "run", data)
    assert messages[0] == messages[1]
    assert "more than data.max_bad_share=0.1 of them" in messages[0]
    assert "bytes are not those that were indexed" in messages[0]
