"""Which rank makes the others wait, before a slow node has cost a week.

Every step all ranks wait for the slowest, so that the step's time says nothing about who it is. What does are the
phases that a rank spends alone: the wait for its data, and the forward pass up to the first exchange with the others.
Every `WINDOW` steps the ranks compare theirs, and how long an exchange with rank 0's host takes. A CUDA rank's forward
pass is timed by the device, and read when the step has waited for the device anyway.

What it cannot tell: at ZeRO stage 3 the forward pass exchanges weights, so that all ranks are as slow as the slowest,
and only the data and the network are compared. The network is the one that leads to MASTER_ADDR; a slow InfiniBand link
beside it is not seen. Of two hosts with a slow link between them it cannot say whose it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median_low

from ldm_scale.engine import collectives, network, phases
from ldm_scale.engine.env import Environment
from ldm_scale.telemetry.log import get_logger

WINDOW = 100  # steps
SLOW_FACTOR = 1.3  # times the median rank
SLOW_SHARE = 0.05  # of a step's time, above the median: what the run loses
SLOW_LINK_S = 0.010  # a round trip within a data centre takes less than one thousandth of a second
_OUTLIERS = 20  # one in so many steps does not count: a pause is no slowness
_TRIES = 3
LINK = "link"


@dataclass(frozen=True)
class Slow:
    """A rank, or the network of a host, that is slower than the others."""

    who: str
    phase: str
    text: str


class Stragglers:
    """Compares the ranks' times now and then."""

    def __init__(self, environment: Environment, zero_stage: int) -> None:
        self._environment = environment
        self._alone = (phases.FIRST,) if zero_stage == 3 else (phases.FIRST, phases.FORWARD)
        self._times: dict[str, list[float]] = {name: [] for name in (*self._alone, "step")}
        self._named: set[tuple[str, str]] = set()

    def step(self, step: int, seconds: float) -> dict[str, float]:
        """Figures for the log of scalars, where a window of steps ends; {} elsewhere.

        `seconds` is what the step has taken, `step` the number of steps of the run. Collective: all ranks.
        """
        if collectives.world_size() == 1:
            return {}
        for name in self._alone:
            self._times[name].append(phases.current.alone_s.get(name, 0.0))
        self._times["step"].append(seconds + self._times[phases.FIRST][-1])
        if step % WINDOW:
            return {}
        means = {name: usual(times) for name, times in self._times.items()}
        self._times = {name: [] for name in self._times}
        return self._compare(means)

    def _compare(self, own: dict[str, float]) -> dict[str, float]:
        meeting = self._environment.meeting
        hosts = [place.host for place in meeting.places] if meeting is not None else []
        link = self._round_trip_s(hosts)
        rows = collectives.gather_objects(own | ({} if link is None else {LINK: link}))
        found = [slow for name in self._alone for slow in slow_ranks(rows, name, hosts)] + slow_links(rows, hosts)
        for slow in found:
            if (slow.who, slow.phase) not in self._named:
                self._named.add((slow.who, slow.phase))
                if self._environment.is_main:
                    get_logger().warning(slow.text)
        figures: dict[str, float] = {}
        for name in (*self._alone, LINK):
            values = {rank: row[name] for rank, row in enumerate(rows) if name in row}
            if values:
                slowest = max(values, key=lambda rank: values[rank])
                figures |= {
                    f"ranks/{name}_s_median": median_low(values.values()),
                    f"ranks/{name}_s_max": values[slowest],
                }
                figures[f"ranks/{name}_slowest"] = float(slowest)
        return figures | {"ranks/slow": float(len(found))}

    def _round_trip_s(self, hosts: Sequence[str]) -> float | None:
        """Seconds of an exchange with rank 0's host, by one rank of each other host."""
        meeting, rank = self._environment.meeting, self._environment.rank
        if meeting is None or not hosts or hosts[rank] == hosts[0] or hosts.index(hosts[rank]) != rank:
            return None
        tries = [network.round_trip_s(meeting.address, meeting.port) for _ in range(_TRIES)]
        return min((seconds for seconds in tries if seconds is not None), default=network.CONNECT_S)


def usual(times: Sequence[float]) -> float:
    """Mean without the longest few."""
    kept = sorted(times)[: len(times) - len(times) // _OUTLIERS]
    return fmean(kept) if kept else 0.0


def slow_ranks(rows: Sequence[Mapping[str, float]], name: str, hosts: Sequence[str] = ()) -> list[Slow]:
    """Ranks whose phase takes longer than the median rank's by a factor, and by a share of the step."""
    middle, step = median_low(row[name] for row in rows), median_low(row["step"] for row in rows)
    found = []
    for rank, row in enumerate(rows):
        excess = row[name] - middle
        if row[name] > SLOW_FACTOR * middle and excess > SLOW_SHARE * step:
            who = f"rank {rank}" + (f" ({hosts[rank]})" if hosts else "")
            text = (
                f"{who} is slow: phase {name} takes it {row[name]:.3g} s a step and the median rank {middle:.3g} s "
                f"(the last {WINDOW} steps of {step:.3g} s); all ranks wait for it"
            )
            found.append(Slow(f"rank {rank}", name, text))
    return found


def slow_links(rows: Sequence[Mapping[str, float]], hosts: Sequence[str]) -> list[Slow]:
    """The host whose network is slow, judged by the round trips of all others to rank 0's host."""
    trips = {hosts[rank]: row[LINK] for rank, row in enumerate(rows) if LINK in row}
    slow = {host: seconds for host, seconds in trips.items() if seconds > SLOW_LINK_S}
    if not slow:
        return []
    shown = ", ".join(f"{host} {seconds * 1000:.3g} ms" for host, seconds in sorted(trips.items())[:8])
    tail = f"a round trip to {hosts[0]}, rank 0's host, takes from {shown}"
    if len(slow) < len(trips):
        return [Slow(f"host {host}", LINK, f"host {host} has a slow network: {tail}") for host in sorted(slow)]
    if len(trips) == 1:
        (other,) = trips
        return [Slow(f"hosts {hosts[0]}, {other}", LINK, f"the network of host {hosts[0]} or {other} is slow: {tail}")]
    return [Slow(f"host {hosts[0]}", LINK, f"host {hosts[0]} has a slow network: {tail}")]
