"""Damaged tars and pictures, by the hundred: whatever is lost is accounted for, whoever reads."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from ldm_scale.config.schema import DataConfig
from ldm_scale.data import Batch, build_loader, open_manifest
from ldm_scale.data.sources.tars import IndexOptions, index_tars
from tests.helpers.mutations import mutate
from tests.helpers.shards import make_sample, write_tar

PER_SHARD, NUM_SHARDS, BATCH = 16, 8, 16


def _stream(manifest: Path, world: int, workers: int, num_batches: int) -> list[list[Batch]]:
    """The global batches, each as its parts by rank."""
    data = DataConfig(
        manifest=str(manifest), resolution=8, num_workers=workers, lanes=4, max_bad_share=1.0, max_consecutive_bad=60
    )
    ranks = [
        list(
            islice(
                build_loader(data, seed=1, global_batch=BATCH, micro_batch=BATCH // world, rank=rank, world_size=world),
                num_batches,
            )
        )
        for rank in range(world)
    ]
    return [list(step) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_first_deliveries_and_bad_samples_are_the_index_and_repeats_are_as_many_as_bad_ones(
    tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    for shard in range(NUM_SHARDS):
        samples = []
        for number in range(PER_SHARD):
            members = make_sample(number, 12, rng)
            if rng.random() < 0.3:  # what the index may or may not see
                members["png"] = mutate(members["png"], members["txt"], rng)
            samples.append((f"{number:03d}", members))
        path = write_tar(tmp_path / f"s{shard}.tar", samples)
        if rng.random() < 0.4:
            path.write_bytes(mutate(path.read_bytes(), samples[0][1]["png"], rng))
    options = IndexOptions(workers=1, max_bad=1.0, max_bad_total=1.0)
    index_tars([tmp_path / "*.tar"], tmp_path / "manifest.json", "train", options=options)
    # Bytes that change after the index was made.
    victim = tmp_path / "s1.tar"
    content = bytearray(victim.read_bytes())
    for place in rng.integers(0, len(content), size=6).tolist():
        content[place] ^= 0xFF
    victim.write_bytes(content)

    dataset = open_manifest(tmp_path / "manifest.json", "train")
    total = dataset.num_samples
    listed_bad = json.loads((tmp_path / "manifest.json").read_text())["splits"]["train"]["shards"]
    assert sum(row["num_samples"] for row in listed_bad) == total
    num_batches = -(-2 * total // BATCH)
    whole = _stream(tmp_path / "manifest.json", 1, 0, num_batches)
    keys = [key for step in whole for batch in step for key in batch.keys]
    bad = [record for step in whole for batch in step for record in batch.bad]
    assert len(keys) == num_batches * BATCH
    epoch = keys[:total]
    bad_here = {record.position: record for record in bad if 0 <= record.position < total}
    lost = {record.key for record in bad if record.position < total}
    first = [key for position, key in enumerate(epoch) if position not in bad_here]
    # What the order has at each position either came or was bad, and nothing came in its own place twice.
    assert Counter(first).most_common(1)[0][1] == 1
    assert set(first) | lost == set(dataset.keys())
    assert len(first) + len(bad_here) == total
    assert set(first).isdisjoint({record.key for record in bad})
    assert {record.substitute for record in bad if record.position >= 0} <= set(first)
    for position, record in bad_here.items():
        assert epoch[position] == record.substitute
    if seed % 4 == 0:
        for world, workers in ((2, 2), (4, 0)):
            other = _stream(tmp_path / "manifest.json", world, workers, num_batches)
            assert [key for step in other for batch in step for key in batch.keys] == keys
            assert sorted(record for step in other for batch in step for record in batch.bad) == sorted(bad)
