"""Phases count alike on all ranks, and the time that a rank spends alone ends where the ranks meet."""

from __future__ import annotations

import time

import pytest

from ldm_scale.engine.phases import Phases


def test_a_step_has_one_clock_and_everything_else_its_own() -> None:
    phases = Phases()
    phases.enter("start")
    first = phases.since_s
    phases.enter("data", 3)
    assert (phases.phase, phases.step, phases.position, phases.follows_other) == ("data", 3, 2, True)
    begun = phases.since_s
    assert begun >= first
    for phase in ("forward", "backward", "backward", "reduce", "update"):
        phases.enter(phase)
    assert phases.since_s == begun
    assert phases.position == 6, "a second backward pass is the same phase"
    phases.enter("data", 4)
    assert not phases.follows_other
    phases.enter("save")
    assert phases.since_s > begun
    phases.enter("data", 5)
    assert phases.follows_other


def test_phases_of_a_step_do_not_count_outside_of_one() -> None:
    phases = Phases()
    phases.enter("evaluate")
    phases.enter("backward")
    assert (phases.phase, phases.position) == ("evaluate", 1)


@pytest.mark.parametrize("meets_early", [False, True])
def test_what_a_rank_does_alone_is_timed(meets_early: bool) -> None:
    phases = Phases()
    phases.enter("data", 1)
    time.sleep(0.02)
    phases.enter("forward")
    time.sleep(0.03)
    if meets_early:
        phases.meet()
        time.sleep(0.5)
    phases.enter("backward")
    time.sleep(0.5)
    phases.enter("reduce")
    phases.meet()
    assert 0.02 <= phases.alone_s["data"] < 0.4
    assert 0.03 <= phases.alone_s["forward"] < 0.4
