"""The benchmark of memory on a small UNet: ranks report, and the table says what is far from the plan."""

from __future__ import annotations

import dataclasses

from benchmarks.memory import UNET, Setting, compared, measure, settings, table
from tests.helpers.ranks import run_ranks


def test_a_rank_reports_what_its_network_takes() -> None:
    # Ranks inherit freed memory that the system still counts as resident: it is none of their network's.
    large = bytearray(30_000_000)  # whose end raises glibc's bound of what goes back at once
    del large
    blocks = [bytearray(1_000_000) for _ in range(300)]
    _between = blocks[::25]
    del blocks
    small = dataclasses.replace(UNET, base_channels=128)
    reports = run_ranks(measure, 2, Setting(2, 2).config(small))
    assert reports[0] == reports[1]
    assert len(reports[0]) == 2
    for report in reports[0]:
        parameters = 4_000_000  # about
        assert 12 * parameters < report["peak_of_steps_bytes"] < 100 * parameters
        assert report["before_bytes"] > 50e6


def test_all_stages_and_ways_are_measured_and_the_far_ones_marked() -> None:
    found = settings((1, 2))
    assert {(setting.ranks, setting.stage) for setting in found} == {(n, s) for n in (1, 2) for s in range(4)}
    assert {setting.recomputed for setting in found} == {"none", "selective", "full"}
    planned = compared(Setting(2, 2), [{"peak_of_steps_bytes": 1}])["planned_bytes"]
    reports = [compared(Setting(2, 2), [{"peak_of_steps_bytes": size}]) for size in (planned, 2 * planned)]
    lines = table(reports).splitlines()
    assert [line.endswith("*") for line in lines[1:3]] == [False, True]
