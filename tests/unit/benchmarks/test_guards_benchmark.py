"""The benchmark of the guards times the trainer's own step, with all of them and with none."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks import guards, train_step
from ldm_scale.config.schema import TrainConfig
from ldm_scale.engine import env, phases
from ldm_scale.training import skipping
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_config


def _case() -> train_step.Case:
    return train_step.Case(tiny_config("diffusion", Path(), Path("run")), latent_channels=4, latent_side=8)


def _here() -> env.Environment:
    return env.start(env.read_launch(), TrainConfig(device="cpu"))


def _measure() -> dict[str, Any]:
    return guards.measure(_case(), _here(), 1, 4, "tiny")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_case_is_measured(ranks: int) -> None:
    for result in run_ranks(_measure, ranks):
        assert result["ranks"] == ranks
        assert result["ratio_on_to_off"]["median"] > 0.3
        assert result["overall_ratio"] == result["ratio_on_to_off"]["median"] + result["check_ranks_share_of_step"]
    assert f"tiny (1.0M, {ranks} rank(s))" in guards.table({"tiny": result})


def _what_is_done(root: Path) -> dict[str, Any]:
    done: dict[str, Any] = {}
    with train_step.prepared(_case(), _here(), 1) as steps:
        run = guards.Run(steps.task, root)
        weight = next(iter(steps.task.trained["diffusion"].model.fragments)).master
        for name, block in (("on", run.guarded), ("off", run.unguarded)):
            before, position = weight.clone(), phases.current.position
            with block(), mock.patch.object(skipping, "judge", return_value=None) as judge:
                run.step()
            done[name] = [judge.call_count, phases.current.position > position, bool((weight != before).any())]
        done["steps"] = run._trainer.state.step
    return done


def test_both_train_and_one_is_guarded(tmp_path: Path) -> None:
    (done,) = run_ranks(_what_is_done, 1, tmp_path)
    assert done == {"on": [1, True, True], "off": [0, False, True], "steps": 2}
