from __future__ import annotations

from itertools import permutations
from math import factorial

import numpy as np
import pytest

from ldm_scale.data.order import Order, check_batches, micro_batches, replacement_at, shuffled
from ldm_scale.data.permutation import derive, key_of, permute, uniforms
from ldm_scale.errors import ConfigError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 1000, 1024, 4097])
def test_a_permutation_is_a_bijection_that_keys_change(size: int) -> None:
    one, other = (permute(np.arange(size), size, key_of("test", key)).tolist() for key in (1, 2))
    assert sorted(one) == sorted(other) == list(range(size))
    assert one != other or size < 5


def test_all_permutations_are_equally_likely() -> None:
    # Chi-squared of 24,000 keys over the 120 orders of five: 119 degrees of freedom, 99.99% of it below 185.
    keys = derive(key_of("test"), np.arange(24_000))
    orders = permute(np.tile(np.arange(5), (24_000, 1)), 5, keys[:, None]).reshape(-1, 5)
    counts = dict.fromkeys(permutations(range(5)), 0)
    for order in map(tuple, orders.tolist()):
        counts[order] += 1
    expected = len(orders) / factorial(5)
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 185


def test_permutations_of_many_sizes_at_once_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 5000, size=200)
    places = rng.integers(0, sizes)
    keys = derive(key_of("test"), np.arange(200))
    together = permute(places, sizes, keys)
    for row in range(200):
        assert together[row] == permute(places[row : row + 1], sizes[row], keys[row : row + 1])[0]


# (samples, batch, lanes, chunk, chunks in a block): nothing divides anything, and the ends of every range.
SHAPES = [
    (1, 1, 1, 1, 1),
    (7, 3, 64, 4, 2),
    (97, 8, 3, 5, 2),
    (97, 10, 64, 1, 7),
    (100, 100, 7, 3, 1),
    (131, 60, 7, 9, 3),
    (400, 48, 5, 16, 4),
    (1000, 1, 4, 32, 2),
    (5, 64, 8, 2, 2),
]


def _order(shape: tuple[int, ...], seed: int = 3) -> Order:
    order = Order(shape[0], seed, *shape[1:])
    object.__setattr__(order, "__dict__", {**order.__dict__, "chunk_samples": min(shape[3], shape[0])})
    return order


@pytest.mark.parametrize("shape", SHAPES)
def test_every_sample_comes_once_an_epoch_whatever_does_not_divide(shape: tuple[int, ...]) -> None:
    samples = shape[0]
    found = _order(shape).locate(np.arange(4 * samples))
    for epoch in range(4):
        assert sorted(found.samples[epoch * samples : (epoch + 1) * samples].tolist()) == list(range(samples))
    assert found.epochs.tolist() == [position // samples for position in range(4 * samples)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_place_is_found_without_those_before_it_and_seeds_and_epochs_differ(shape: tuple[int, ...]) -> None:
    whole = _order(shape).locate(np.arange(3 * shape[0]))
    for position in range(0, 3 * shape[0], 7):
        assert _order(shape).locate(np.array([position])).samples[0] == whole.samples[position]
    if shape[0] > 50:
        first, second = whole.samples[: shape[0]].tolist(), whole.samples[shape[0] : 2 * shape[0]].tolist()
        assert first != second
        assert first != _order(shape, seed=4).locate(np.arange(shape[0])).samples.tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_list_the_positions_that_name_them(shape: tuple[int, ...]) -> None:
    order, end = _order(shape), 4 * shape[0]
    members: dict[tuple[int, int, int], list[int]] = {}
    for position, block in zip(range(end), order.block_at(np.arange(end)), strict=True):
        members.setdefault(block, []).append(position)
    for block, positions in members.items():
        listed = order.positions_in(order.block_at(np.array(positions[:1]))[0])
        assert listed.tolist() == positions, block
        assert len(positions) <= order.block_samples


def test_a_lane_owns_the_slots_that_the_formula_says_and_one_range_of_its_epoch() -> None:
    order = _order((5000, 24, 6, 8, 4))
    positions = np.arange(5000)
    lanes = np.array([block.lane for block in order.block_at(positions)])
    assert (lanes == positions % 24 * 6 // 24).all()
    places = np.empty(5000, dtype=np.int64)  # of each sample in the arrangement
    places[order.arrange(np.zeros(5000, dtype=np.int64), np.arange(5000))] = np.arange(5000)
    found = places[order.locate(positions).samples]
    for lane in range(6):
        own = np.sort(found[lanes == lane])
        assert (np.diff(own) == 1).all()


def test_a_chunk_holds_neighbours_and_a_block_few_chunks() -> None:
    order = _order((100_000, 64, 8, 16, 8))
    block = order.block_at(np.array([40_000]))[0]
    samples = np.sort(order.locate(order.positions_in(block)).samples)
    runs = np.split(samples, np.flatnonzero(np.diff(samples) != 1) + 1)
    assert len(samples) == 128
    assert len(runs) <= 9  # eight chunks, of which the first and the last may be cut by the block's ends


def test_every_chunk_of_a_block_has_a_turn_before_any_has_another() -> None:
    order = _order((100_000, 64, 8, 16, 8))
    for position in (40_000, 40_007, 70_031):
        samples = order.locate(order.positions_in(order.block_at(np.array([position]))[0])).samples
        ordered = np.sort(samples)
        chunk = dict(zip(ordered.tolist(), np.cumsum(np.diff(ordered, prepend=ordered[0]) > 1).tolist(), strict=True))
        rounds = np.array([chunk[sample] for sample in samples.tolist()]).reshape(16, 8)
        # Of nine chunks the first and the last share a turn: the block's ends cut them.
        assert all(len(set(row)) == 8 for row in rounds.tolist())
        assert len({tuple(row) for row in rounds.tolist()}) == 16


def test_small_data_sets_are_shuffled_sample_by_sample() -> None:
    assert Order(5000, 0, 32).chunk_samples == 1
    assert Order(10**8, 0, 32).chunk_samples == 32


def test_the_order_never_changes_because_runs_are_resumed_by_it() -> None:
    # Recorded once. A change here makes every interrupted run see some images twice and others never.
    assert Order(10, 0, 4).locate(np.arange(10)).samples.tolist() == [7, 9, 0, 3, 1, 5, 4, 6, 2, 8]
    far = 3 * 10**10 + np.arange(4) * 12345
    assert Order(10**10, 7, 1024).locate(far).samples.tolist() == [9758512957, 6576034880, 5924527939, 5184568143]
    assert shuffled(10, "x").tolist() == [0, 7, 4, 9, 8, 1, 6, 2, 3, 5]
    assert [replacement_at(3, attempt, 1000, 7) for attempt in (1, 2, 3)] == [689, 243, 255]
    assert uniforms(2, "x", 1) == pytest.approx((0.6664810153193216, 0.9250358171015794), abs=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_global_batch_is_the_same_at_any_world_size(world_size: int, micro_batch: int) -> None:
    for index in (0, 5):
        positions = [
            position
            for rank in range(world_size)
            for part in micro_batches(index, 24, micro_batch, rank, world_size)
            for position in part
        ]
        assert positions == list(range(24 * index, 24 * index + 24))
    assert all(len(part) == micro_batch for part in micro_batches(3, 24, micro_batch, 0, world_size))


@pytest.mark.parametrize("end", [0, 1, 5, 12, 13, 17, 23, 24])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 12), (1, 5), (2, 6), (2, 3), (3, 2), (4, 3), (4, 1)])
def test_a_stream_that_ends_is_covered_once_with_equal_numbers_of_micro_batches(
    end: int, world_size: int, micro_batch: int
) -> None:
    covered, index = [], 0
    while True:
        per_rank = [micro_batches(index, 12, micro_batch, rank, world_size, end) for rank in range(world_size)]
        assert len({len(parts) for parts in per_rank}) == 1
        if not per_rank[0]:
            break
        assert all(len(part) <= micro_batch for parts in per_rank for part in parts)
        if micro_batch > 1 and min(12, end - 12 * index) >= world_size:
            assert all(len(part) for parts in per_rank for part in parts)
        covered += [position for parts in per_rank for part in parts for position in part]
        index += 1
    assert covered == list(range(end))


def test_replacements_depend_on_position_and_attempt_alone() -> None:
    drawn = {(p, a): replacement_at(p, a, 10**6, seed=1) for p in range(20) for a in range(1, 5)}
    assert len(set(drawn.values())) == len(drawn)
    assert all(0 <= index < 10**6 for index in drawn.values())
    assert drawn == {(p, a): replacement_at(p, a, 10**6, seed=1) for p, a in drawn}
    assert replacement_at(0, 1, 10**6, seed=2) != drawn[0, 1]


@pytest.mark.parametrize(("global_batch", "micro_batch", "world_size"), [(10, 4, 1), (8, 8, 2), (9, 3, 2), (0, 1, 1)])
def test_impossible_batches_name_the_numbers(global_batch: int, micro_batch: int, world_size: int) -> None:
    with pytest.raises(ConfigError, match=f"train.global_batch={global_batch}.*{world_size} x {micro_batch}"):
        check_batches(global_batch, micro_batch, world_size)
    check_batches(16, 4, 2)
