"""Mixtures and buckets: which data set or bucket a position belongs to, and that all samples come in their turn."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ldm_scale.data.manifest import Part, Rows, Split
from ldm_scale.data.order import Order
from ldm_scale.data.permutation import uniforms
from ldm_scale.data.shards import Dataset
from ldm_scale.data.stream import Stream, build_stream
from ldm_scale.errors import ConfigError


def _dataset(
    counts: list[int], weights: list[float] | None = None, sizes: list[tuple[int, int]] | None = None
) -> Dataset:
    parts = []
    for number, count in enumerate(counts):
        column = np.array([count], dtype=np.int64)
        rows = Rows(Path(), [f"{number}.tar"], [f"{number}.index"], [""], column, column, np.full(1, -1, np.int64))
        parts.append(Part(rows, sizes[number] if sizes else None, weights[number] if weights else None))
    return Dataset(Split(Path("m.json"), "train", tuple(parts)))


def _pools(stream: Stream, positions: range) -> np.ndarray:
    return stream.locate(np.array(positions)).pools


def test_one_part_is_the_order_itself() -> None:
    stream = build_stream(_dataset([50]), 3, 8)
    positions = np.arange(120)
    assert (stream.locate(positions).samples == Order(50, 3, 8).locate(positions).samples).all()


@pytest.mark.parametrize(
    ("weights", "batch", "quotas"),
    [([0.7, 0.3], 10, [7, 3]), ([0.5, 0.3, 0.2], 8, [4, 2, 2]), ([0.9, 0.08, 0.02], 32, [29, 2, 1])],
)
def test_every_batch_of_a_mixture_has_the_same_shares_spread_over_it(
    weights: list[float], batch: int, quotas: list[int]
) -> None:
    stream = build_stream(_dataset([40, 30, 20][: len(weights)], weights), 1, batch)
    pools = _pools(stream, range(6 * batch)).reshape(6, batch)
    assert (pools == pools[0]).all()
    assert np.bincount(pools[0]).tolist() == quotas
    for number, quota in enumerate(quotas):
        slots = np.flatnonzero(pools[0] == number)
        assert np.diff(slots).max(initial=0) <= -(-batch // quota) + 1


def test_each_data_set_of_a_mixture_is_walked_epoch_by_epoch() -> None:
    counts = [37, 20]
    stream = build_stream(_dataset(counts, [0.6, 0.4]), 1, 10)
    found = stream.locate(np.arange(10 * 60))
    for number, (count, first) in enumerate(zip(counts, (0, 37), strict=True)):
        own = found.samples[found.pools == number]
        for epoch in range(len(own) // count):
            assert sorted(own[epoch * count : (epoch + 1) * count].tolist()) == list(range(first, first + count))
    some = np.array([599, 3, 250])
    assert (stream.locate(some).samples == found.samples[some]).all()


def test_equal_data_sets_are_not_walked_in_step() -> None:
    found = build_stream(_dataset([64, 64], [0.5, 0.5]), 1, 8).locate(np.arange(128))
    assert (found.samples[found.pools == 0] != found.samples[found.pools == 1] - 64).any()


def test_a_weight_below_one_image_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a share of 0.01 is less than one image of train.global_batch=8"):
        build_stream(_dataset([10, 10], [0.99, 0.01]), 0, 8)


SIZES = [(16, 16), (8, 32), (32, 8)]


def test_buckets_give_whole_batches_as_often_as_they_have_samples() -> None:
    counts = [1000, 333, 70]
    stream = build_stream(_dataset(counts, sizes=SIZES), 5, 16)
    num_batches = 4 * sum(counts) // 16
    pools = _pools(stream, range(16 * num_batches)).reshape(num_batches, 16)
    assert (pools == pools[:, :1]).all()
    given = np.bincount(pools[:, 0]) * 16
    assert np.abs(given - 4 * np.array(counts)).max() <= 2 * 16
    assert [stream.size_at(16 * batch) for batch in range(40)] == [SIZES[pool] for pool in pools[:40, 0]]


def test_each_bucket_visits_all_its_samples_before_any_comes_again() -> None:
    counts = [100, 37, 5]
    stream = build_stream(_dataset(counts, sizes=SIZES), 5, 8)
    found = stream.locate(np.arange(8 * 200))
    for number, (count, first) in enumerate(zip(counts, (0, 100, 137), strict=True)):
        own = found.samples[found.pools == number]
        assert len(own) >= 8
        for epoch in range(len(own) // count):
            assert sorted(own[epoch * count : (epoch + 1) * count].tolist()) == list(range(first, first + count))
    some = np.array([1599, 3, 801])
    assert (stream.locate(some).samples == found.samples[some]).all()


def test_the_batches_of_a_bucket_are_spread_over_the_epoch() -> None:
    stream = build_stream(_dataset([900, 100], sizes=SIZES[:2]), 5, 10)
    turns = np.flatnonzero(_pools(stream, range(0, 1000, 10)) == 1)
    assert len(turns) == 10
    assert all(8 <= after - before <= 12 for before, after in pairwise(turns.tolist()))


def test_replacements_stay_in_their_part() -> None:
    stream = build_stream(_dataset([1000, 333, 70], sizes=SIZES), 5, 16)
    for pool, (first, end) in enumerate([(0, 1000), (1000, 1333), (1333, 1403)]):
        assert all(first <= stream.replacement_at(position, pool, 1) < end for position in range(50))


def test_a_stream_that_ends_takes_all_parts_as_one() -> None:
    stream = build_stream(_dataset([30, 20], [0.9, 0.1]), 5, 8, ends=True)
    assert sorted(stream.locate(np.arange(50)).samples.tolist()) == list(range(50))


def _sorted_turns(counts: list[int], batch: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    """Bucket and number of each batch of an epoch: all their times, sorted."""
    times, turns = [], []
    for bucket, count in enumerate(counts):
        start, stop = epoch * count // batch, (epoch + 1) * count // batch
        (phase,) = uniforms(1, "bucket", seed, epoch, bucket)
        times.append((np.arange(stop - start) + phase) / max(1, stop - start))
        turns += [(bucket, number) for number in range(start, stop)]
    return [turns[at] for at in np.argsort(np.concatenate(times), kind="stable").tolist()]


@pytest.mark.parametrize("seed", range(40))
def test_turns_of_buckets_are_those_of_a_full_sort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(0, 3.5, size=rng.integers(2, 24))
    counts, batch = np.maximum(1, scale.astype(int)).tolist(), int(rng.integers(1, 40))
    if seed % 4 == 0:
        counts = [counts[0]] * len(counts)
    stream = build_stream(_dataset(counts, sizes=[(8, 8 + n) for n in range(len(counts))]), seed, batch)
    for epoch in (0, 1, int(rng.integers(2, 1000))):
        wanted = _sorted_turns(counts, batch, seed, epoch)
        first = stream.first_batch(epoch)
        own = np.arange(len(wanted)) if len(wanted) < 300 else np.unique(rng.integers(0, len(wanted), 300))
        found = stream.locate((first + own) * batch)
        assert [*zip(found.pools.tolist(), (found.places // batch).tolist(), strict=True)] == [
            wanted[turn] for turn in own.tolist()
        ]


def test_a_turn_of_ten_billion_samples_needs_no_table() -> None:
    stream = build_stream(_dataset([10**9] * 10, sizes=[(8, 8 + n) for n in range(10)]), 0, 256)
    began = time.process_time()
    assert len(set(stream.locate(np.arange(10**8, 10**8 + 20 * 256, 256)).pools.tolist())) == 10
    assert time.process_time() - began < 0.5
