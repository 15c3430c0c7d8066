"""The verdict on a hang, from what the ranks report: the culprit and its phase, or that it cannot be told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.engine import hangs
from ldm_scale.engine.hangs import Report, verdict
from ldm_scale.engine.rendezvous import Place

PLACES = [Place(host, 100 + rank, host, "eth0") for rank, host in enumerate(["n1", "n1", "n2", "n2", "n3", "n3"])]
WAITING = Report(0, step=7, phase="backward", position=30, collectives=99, in_collective=True, waited_s=60.0)


def _reports(changes: dict[int, dict[str, Any]], absent: tuple[int, ...] = ()) -> list[Report]:
    ranks = [rank for rank in range(len(PLACES)) if rank not in absent]
    return [dataclasses.replace(WAITING, **{"rank": rank} | changes.get(rank, {})) for rank in ranks]


BEHIND = {"phase": "data", "position": 28, "in_collective": False, "loaders": ("loader process 9 is stopped",)}
CUT = {"link": "10.0.0.1 is not reached (timed out)"}


@pytest.mark.parametrize(
    ("changes", "absent", "culprit", "reason"),
    [
        (
            {4: BEHIND},
            (),
            "rank 4 (n3, process 104); phase data of step 7",
            "in phase backward of step 7; rank 4's loader",
        ),
        (
            {3: {"collectives": 98, "at": "unet.py:3 in f"}},
            (),
            "rank 3 (n2, process 103); phase backward of step 7",
            "it has not begun the collective in which the others wait; it stands at unet.py:3 in f",
        ),
        ({1: {"in_collective": False}}, (), "rank 1 (n1, process 101); phase backward", "not in a collective"),
        ({}, (), "unknown; phase backward of step 7, where all are", "all 6 ranks stand alike, 99 collectives"),
        ({0: {"neighbours": {"1": "stopped"}}}, (1,), "rank 1 (n1, process 101); phase backward", "rank 1 is stopped"),
        ({0: {"neighbours": {"1": "gone"}}}, (1,), "rank 1 (n1,", "the process of rank 1 is gone"),
        ({}, (2, 3), "rank 2 (n2, process 102), rank 3 (n2, process 103); phase", "no rank of host n2 reports"),
        # A rank that does not report comes before one that is behind: the report may only be late for it.
        ({0: BEHIND}, (5,), "rank 5 (n3, process 105)", "rank 5 is silent"),
        ({2: {"link": "eth0 is down"}, 0: {}}, (), "the network of host n2;", "eth0 is down"),
        ({2: CUT, 3: CUT}, (), "the network of host n2;", "n2: 10.0.0.1 is not reached"),
        ({2: CUT, 3: CUT, 4: CUT, 5: CUT}, (), "the network of host n1;", "n2: 10.0.0.1 is not reached"),
        ({2: CUT, 3: CUT}, (4, 5), "the network of host n1 or host n2, or between them;", "n2: 10.0.0.1"),
    ],
)
def test_the_culprit_and_its_phase(
    changes: dict[int, dict[str, Any]], absent: tuple[int, ...], culprit: str, reason: str
) -> None:
    first, second = verdict(_reports(changes, absent), PLACES).splitlines()
    assert first.startswith(f"culprit: {culprit}")
    assert reason in second


def test_a_run_on_one_rank_names_it() -> None:
    report = dataclasses.replace(WAITING, phase="data", in_collective=False)
    assert verdict([report], PLACES[:1]) == "culprit: rank 0 (n1, process 100); phase data of step 7\nalone\n"


def test_reports_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = _reports({4: BEHIND, 0: {"neighbours": {"1": "stopped"}}})
    for report in written:
        hangs.write_report(tmp_path / "hangs", report, "Thread 1\n  File ...\n")
    assert hangs.read_reports(tmp_path / "hangs") == written
    assert hangs.count_reports(tmp_path / "hangs") == 6
    assert hangs.count_reports(tmp_path / "none") == 0
    assert (tmp_path / "hangs" / "rank-00004.txt").read_text().endswith("Thread 1\n  File ...\n")
