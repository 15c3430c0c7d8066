"""What a rank reports of a hang, and what the reports of all ranks say: which rank it is, and in which phase.

A report is a file of the run folder: one line of JSON, then the stacks of all threads and of the loader processes.
A rank that is stopped, dead, or on a node that is gone writes none, which tells as much.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ldm_scale.engine.rendezvous import Place

FOLDER, VERDICT = "hangs", "verdict.txt"
_REPORT = "rank-{:05d}.txt"
_SHOWN = 8


@dataclass(frozen=True)
class Report:
    """Where a rank stands."""

    rank: int
    step: int
    phase: str
    position: int  # phases begun
    collectives: int  # begun
    in_collective: bool  # one of its threads stands in one
    waited_s: float
    at: str = ""  # our code's innermost line
    link: str = ""  # what is wrong with its way to rank 0
    neighbours: Mapping[str, str] = field(default_factory=dict)  # rank on this host -> state of its process
    loaders: tuple[str, ...] = ()  # loader processes and their states

    @property
    def progress(self) -> tuple[int, int]:
        """How far the rank came: the one that others wait for has the least."""
        return self.position, self.collectives


def write_report(folder: Path, report: Report, stacks: str) -> None:
    """Nothing; the report is a file of the folder, whole as soon as it has its name.

    Raises: OSError
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _REPORT.format(report.rank)
    partial = path.with_suffix(".partial")
    partial.write_text(f"{json.dumps(asdict(report))}\n\n{stacks}", encoding="utf-8")
    os.replace(partial, path)


def read_reports(folder: Path) -> list[Report]:
    """The reports that the folder has, by rank.

    Raises: OSError
    """
    reports = []
    for path in sorted(folder.glob("rank-*.txt")):
        with path.open(encoding="utf-8") as file:
            given = json.loads(file.readline())
        reports.append(Report(**given | {"loaders": tuple(given["loaders"])}))
    return reports


def count_reports(folder: Path) -> int:
    """Number of reports that the folder has; 0 where there is no folder."""
    return sum(1 for _ in folder.glob("rank-*.txt"))


def verdict(reports: Sequence[Report], places: Sequence[Place]) -> str:
    """Culprit and phase on the first line, the reason on the second.

    In this order: a link that is down, ranks without a report, ranks behind the others, ranks that are not in the
    collective in which all others wait.
    """
    by_rank = {report.rank: report for report in reports}
    absent = [rank for rank in range(len(places)) if rank not in by_rank]
    waiting = max(reports, key=lambda report: report.progress)
    linked = _broken_link(reports, places)
    if linked:
        return _lines(f"the network of {linked[0]}", waiting, linked[1], "the others")
    if absent:
        states = "; ".join(_absence(rank, reports, places) for rank in absent[:_SHOWN])
        return _lines(_ranks(absent, places), waiting, f"no report: {states}", "the others")
    least = min(report.progress for report in reports)
    behind = [report for report in reports if report.progress == least]
    if len(behind) < len(reports):
        reason = f"behind the others, which are in phase {waiting.phase} of step {waiting.step}"
        if waiting.position == least[0]:
            reason = "it has not begun the collective in which the others wait"
    else:
        outside = [report for report in reports if not report.in_collective]
        if not outside or len(outside) == len(reports) > 1:
            where = f"{waiting.collectives} collectives begun by every rank"
            return _lines(
                "unknown", waiting, f"all {len(reports)} ranks stand alike, {where}: the network, or a device", "all"
            )
        behind, reason = outside, "not in a collective, in which all others wait"
        if len(reports) == 1:
            reason = "alone"
    loaders = [f"rank {report.rank}'s {text}" for report in behind for text in report.loaders]
    if behind[0].phase == "data" and loaders:
        reason += f"; {'; '.join(loaders[:_SHOWN])}"
    reason += f"; it stands at {behind[0].at}" if behind[0].at else ""
    return _lines(_ranks([report.rank for report in behind], places), behind[0], reason)


def _lines(culprit: str, report: Report, reason: str, who: str = "") -> str:
    phase = f"phase {report.phase} of step {report.step}" + (f", where {who} are" if who else "")
    return f"culprit: {culprit}; {phase}\n{reason}\n"


def _ranks(ranks: Sequence[int], places: Sequence[Place]) -> str:
    shown = ", ".join(f"rank {rank} ({places[rank].host}, process {places[rank].pid})" for rank in ranks[:_SHOWN])
    return shown + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")


def _absence(rank: int, reports: Sequence[Report], places: Sequence[Place]) -> str:
    """Why a rank has written nothing, as far as others can see."""
    for report in reports:
        state = report.neighbours.get(str(rank))
        if state in ("running", "sleeping"):
            return f"the process of rank {rank} is {state} but does not come to report (it may hold Python's lock)"
        if state is not None:
            return f"the process of rank {rank} is {state}"
    host = places[rank].host
    if any(places[report.rank].host == host for report in reports):
        return f"rank {rank} is silent"
    return f"no rank of host {host} reports: the node or its network is down, or all its ranks are stopped"


def _broken_link(reports: Sequence[Report], places: Sequence[Place]) -> tuple[str, str] | None:
    """The host whose network is down and the reason, as far as the reports tell."""
    down = {places[report.rank].host: report.link for report in reports if "is down" in report.link}
    if down:
        return " and ".join(f"host {host}" for host in sorted(down)), "; ".join(sorted(set(down.values())))
    first = places[0].host
    others = {places[report.rank].host for report in reports} - {first}
    cut = {places[r.rank].host: r.link for r in reports if r.link and places[r.rank].host != first}
    if not cut:
        return None
    reason = "; ".join(f"{host}: {link}" for host, link in sorted(cut.items())[:_SHOWN])
    if len(others) > 1 and len(cut) == len(others):
        return f"host {first}", reason
    if len(others) == 1:
        return f"host {first} or host {next(iter(cut))}, or between them", reason
    return " and ".join(f"host {host}" for host in sorted(cut)), reason
