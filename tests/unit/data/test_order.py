from __future__ import annotations

import pytest

from ldm_scale.data.order import check_batches, global_order, micro_batches, replacement_at, sample_at, uniforms
from ldm_scale.errors import ConfigError


def test_an_epoch_visits_every_sample_once_and_epochs_and_seeds_differ() -> None:
    orders = [global_order(100, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_never_changes_because_runs_are_resumed_by_it() -> None:
    # Recorded once. A change here makes every interrupted run see some images twice and others never.
    assert global_order(10, 0, 0).tolist() == [2, 1, 6, 8, 5, 7, 4, 0, 9, 3]
    assert [replacement_at(3, attempt, 1000, 7) for attempt in (1, 2, 3)] == [689, 243, 255]
    assert uniforms(2, "x", 1) == pytest.approx((0.6664810153193216, 0.9250358171015794), abs=1e-12)


def test_positions_run_through_epochs_without_a_seam() -> None:
    seen = [sample_at(position, 7, seed=5) for position in range(21)]
    assert all(sorted(seen[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert seen[:7] != seen[7:14]


def test_an_order_is_close_to_uniform() -> None:
    counts = [0] * 5
    for seed in range(2000):
        counts[int(global_order(5, seed, 0)[0])] += 1
    assert all(abs(count - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5 for count in counts)


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
