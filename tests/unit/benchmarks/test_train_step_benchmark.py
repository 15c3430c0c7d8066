"""The benchmark of the whole step times two steps on one network, of which one does everything."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train_step
from ldm_scale.config.schema import TrainConfig
from ldm_scale.engine import env
from ldm_scale.errors import NumericsError
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_config


def _case() -> train_step.Case:
    config = tiny_config("diffusion", Path(), Path("run"), diffusion={"stratified_times": True})
    return train_step.Case(config, latent_channels=4, latent_side=8)


def _here() -> env.Environment:
    return env.start(env.read_launch(), TrainConfig(device="cpu"))


def _measure(stage: int) -> dict[str, Any]:
    return train_step.measure(_case(), _here(), stage, 3, "tiny")


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 2)])
def test_a_case_is_measured(ranks: int, stage: int) -> None:
    results = run_ranks(_measure, ranks, stage)
    for result in results:
        assert result["ranks"] == ranks
        assert result["step_s"]["bare"]["min"] > 0
        assert result["ratio_to_bare"]["median"] > 0.5
        assert result["overall_ratio"] == result["ratio_to_bare"]["median"] + result["check_ranks_share_of_step"]
        assert 0 < result["check_ranks_share_of_step"] < 1
    if ranks == 2:
        assert results[0]["check_ranks_s"] > 1e-4, "two ranks have something to compare"
    table = train_step.table({"tiny": results[0]})
    assert f"{ranks} rank(s)" in table
    assert "goal: at most 1.03" in table


def _what_the_steps_do() -> dict[str, Any]:
    calls: dict[str, Any] = {"drops": 0}
    with train_step.prepared(_case(), _here(), 1) as steps:
        task = steps.task
        trained = task.trained["diffusion"]
        assert trained.ema is not None
        (average,) = trained.ema.averages.values()
        drop = task.network.conditioner.drop

        def counted(*arguments: Any) -> Any:
            calls["drops"] += 1
            return drop(*arguments)

        task.network.conditioner.drop = counted  # type: ignore[method-assign]

        def state() -> tuple[float, float]:
            return sum(float(x.sum()) for x in average), sum(float(f.master.sum()) for f in trained.model.fragments)

        start = state()
        steps.bare()
        calls["bare"] = [a != b for a, b in zip(start, state(), strict=True)]
        assert calls["drops"] == 0
        start = state()
        steps.everything()
        calls["everything"] = [a != b for a, b in zip(start, state(), strict=True)]
        steps.batch = dataclasses.replace(steps.batch, moments=steps.batch.moments * float("nan"))  # type: ignore[operator]
        with pytest.raises(NumericsError):
            steps.everything()
    return calls


def test_one_step_does_everything_and_the_other_nothing_of_it() -> None:
    (calls,) = run_ranks(_what_the_steps_do, 1)
    assert calls == {"bare": [False, True], "everything": [True, True], "drops": 2}


def test_the_cases_have_everything_on() -> None:
    for case in train_step.cases().values():
        config = case.config
        assert config.ema.half_life_images > 0
        assert config.diffusion.stratified_times
        assert config.train.check_ranks_every_images > 0
        (section,) = [s for s in dataclasses.asdict(config.conditioning).values() if s is not None]
        assert section["drop_probability"] > 0
