"""A rank or a network that is slower than the others is named, and no other is."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch

from ldm_scale.config.schema import TrainConfig
from ldm_scale.engine import env, phases
from ldm_scale.engine.stragglers import WINDOW, Stragglers, slow_links, slow_ranks, usual
from tests.helpers.ranks import run_ranks

HOSTS = ["n1", "n1", "n2", "n2", "n3", "n3"]


def _rows(name: str, *seconds: float, step: float = 1.0) -> list[dict[str, float]]:
    return [{"step": step, name: value} for value in seconds]


@pytest.mark.parametrize(
    ("seconds", "step", "expected"),
    [
        ((0.2, 0.2, 0.2, 0.4), 1.0, [3]),
        ((0.2, 0.4), 1.0, [1]),  # of two ranks the faster one is the measure
        ((0.0, 0.0, 0.3, 0.3), 1.0, [2, 3]),
        ((0.2, 0.2, 0.2, 0.24), 1.0, []),  # within the factor
        ((0.2, 0.2, 0.2, 0.4), 5.0, []),  # costs the run 4%
        ((0.4, 0.4, 0.4, 0.1), 1.0, []),  # a fast rank makes nobody wait
    ],
)
def test_ranks_that_the_others_wait_for(seconds: tuple[float, ...], step: float, expected: list[int]) -> None:
    found = slow_ranks(_rows("forward", *seconds, step=step), "forward", HOSTS)
    assert [slow.who for slow in found] == [f"rank {rank}" for rank in expected]
    for slow, rank in zip(found, expected, strict=True):
        assert f"rank {rank} ({HOSTS[rank]}) is slow: phase forward takes it {seconds[rank]:.3g} s" in slow.text


def test_a_pause_is_no_slowness() -> None:
    assert usual([0.1] * 95 + [30.0] * 5) == pytest.approx(0.1)
    assert usual([0.1] * 94 + [30.0] * 6) > 0.3
    assert usual([]) == 0


@pytest.mark.parametrize(
    ("trips", "expected"),
    [
        ({2: 0.0002, 4: 0.050}, ["host n3"]),
        ({2: 0.050, 4: 0.051}, ["host n1"]),
        ({2: 0.050}, ["hosts n1, n2"]),
        ({2: 0.0002, 4: 0.002}, []),
        ({}, []),
    ],
)
def test_the_host_with_a_slow_network(trips: dict[int, float], expected: list[str]) -> None:
    rows = [{"step": 1.0} | ({"link": trips[rank]} if rank in trips else {}) for rank in range(len(HOSTS))]
    assert [slow.who for slow in slow_links(rows, HOSTS)] == expected


def _steps(slow_phase: str) -> tuple[list[str], list[dict[str, float]], int]:
    """What rank 0's log says over two windows in which rank 1 is slow in a phase, and the figures."""
    environment = env.start(env.read_launch(), TrainConfig(device="cpu"))
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("ldm_scale").addHandler(Keep())
    watched, figures, last = Stragglers(environment, zero_stage=1), [], 0
    for step in range(1, 2 * WINDOW + 1):
        started = time.perf_counter()
        for phase in ("data", "forward", "backward"):
            phases.enter(phase, step)
            if environment.rank == 1 and phase == slow_phase:
                time.sleep(0.004)
        torch.distributed.all_reduce(torch.zeros(1))
        phases.enter("reduce")
        phases.enter("update")
        if row := watched.step(step, time.perf_counter() - started):
            figures.append(row)
            last = step
    return said, figures, last


@pytest.mark.parametrize("phase", ["data", "forward"])
def test_a_slow_rank_is_named_once_within_a_window(phase: str) -> None:
    results: list[Any] = run_ranks(_steps, 2, phase)
    said = [text for text in results[0][0] if "is slow" in text]
    assert len(said) == 1
    assert "rank 1 (" in said[0]
    assert f"phase {phase} " in said[0]
    assert not [text for text in results[1][0] if "is slow" in text]
    for _, figures, last in results:
        assert last == 2 * WINDOW
        assert [row["ranks/slow"] for row in figures] == [1.0, 1.0]
        assert all(row[f"ranks/{phase}_slowest"] == 1.0 and row[f"ranks/{phase}_s_max"] > 0.004 for row in figures)
