from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ldm_scale.data.policy import (
    BadSample,
    BadSampleFiles,
    BadSampleLog,
    Budgets,
    ConsecutiveLimit,
    LossAccount,
    Quarantine,
    SkippedSample,
)
from ldm_scale.errors import DataError
from tests.helpers.disks import full_disk


def test_only_bad_samples_in_a_row_stop_and_all_of_them_are_named() -> None:
    limit = ConsecutiveLimit(2)
    for number in range(10):
        limit.bad(SkippedSample(f"s/{number}", "r"))
        if number % 2:
            limit.good()
    limit.bad(SkippedSample("s/a", "image does not decode"))
    limit.bad(SkippedSample("s/b", "caption is not UTF-8"))
    with pytest.raises(
        DataError, match=r"3 samples in a row .*max_consecutive_bad=2\): s/a \(image.*; s/b \(cap.*; s/c"
    ):
        limit.bad(SkippedSample("s/c", "image does not decode"))


def test_the_log_counts_by_reason_and_names_each_sample_once() -> None:
    log = BadSampleLog()
    assert log.describe() == ""
    log.add([SkippedSample("s/1", "x"), SkippedSample("s/2", "y")])
    log.add([SkippedSample("s/1", "x")])
    assert log.counts == {"x": 2, "y": 1}
    assert log.describe() == "skipped 3 samples (2 x x, 1 x y), such as s/1, s/2"


def _skipped(position: int, shard: int = 0, key: str = "") -> SkippedSample:
    return SkippedSample(key or f"s{shard}/{position}", "r", f"s{shard}.tar", shard, position, "s9/1")


def test_quarantine_begins_at_its_position_and_is_seen_by_processes_forked_before() -> None:
    quarantine = Quarantine(3)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)
        seen = []
        for position in (99, 100, 500):
            try:
                quarantine.check(1, position)
                seen.append(False)
            except BadSample:
                seen.append(True)
        os._exit(0 if seen == [False, True, True] else 1)
    quarantine.add(1, 100)
    os.write(write, b".")
    assert os.waitpid(child, 0)[1] == 0
    quarantine.check(0, 10**9)
    quarantine.check(2, 0)


def test_a_shard_beyond_its_budget_is_named_once_and_epochs_count_anew() -> None:
    account, budgets, sizes = LossAccount(), Budgets(0.2, 1.0), [100, 10]
    account.add([_skipped(n) for n in range(20)], epoch_samples=110)
    assert account.beyond(sizes, budgets) == []
    account.add([_skipped(n) for n in range(110, 130)], epoch_samples=110)  # the same ones in the next epoch
    assert account.beyond(sizes, budgets) == []
    account.add([_skipped(130)], epoch_samples=110)
    assert account.beyond(sizes, budgets) == [0]
    account.quarantined["0"] = 1000
    assert account.beyond(sizes, budgets) == []
    account.add([_skipped(131, shard=1), _skipped(132, shard=1)], epoch_samples=110)
    assert account.beyond(sizes, budgets) == []  # two of ten say nothing
    account.add([_skipped(133, shard=1)], epoch_samples=110)
    assert account.beyond(sizes, budgets) == [1]
    assert account.total == 44


def test_a_run_beyond_its_budget_stops_with_names() -> None:
    account, log, budgets = LossAccount(), BadSampleLog(), Budgets(1.0, 0.05)
    records = [_skipped(n) for n in range(21)]
    account.add(records[:20], 1000)
    account.check(10, budgets, log)  # twenty at the very beginning say nothing
    account.add(records[20:], 1000)
    log.add(records)
    account.check(420, budgets, log)
    with pytest.raises(DataError, match=r"21 of 400 images .* data.max_bad_share=0.05 .*21 x r.* s0/0"):
        account.check(400, budgets, log)


def test_bad_samples_are_listed_once_and_every_place_that_they_left(tmp_path: Path) -> None:
    files = BadSampleFiles(tmp_path)
    files.add([_skipped(7, key="s0/a"), _skipped(3, key="s0/b")])
    (tmp_path / "substitutions.jsonl").open("a").write('null\n{"position": 9, "ke')  # damage; a kill while writing
    files = BadSampleFiles(tmp_path)  # resumed: passes some positions again
    with full_disk():
        files.add([_skipped(7, key="s0/a"), _skipped(107, key="s0/a")])
    files.add([])
    samples = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert samples == [{"shard": "s0.tar", "key": key, "reason": "r"} for key in ("s0/b", "s0/a")]
    places = (tmp_path / "substitutions.jsonl").read_text().splitlines()
    assert [line if line == "null" else json.loads(line)["position"] for line in places] == [3, 7, "null", 107]
