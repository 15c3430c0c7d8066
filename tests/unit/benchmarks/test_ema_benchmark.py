"""The benchmark of averages counts what is there and divides steps of one round."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import ema
from benchmarks.unet_step import Case
from ldm_scale.config.schema import TrainConfig
from ldm_scale.engine import env
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import UNET

CASE = Case(UNET, batch=2, latent_channels=3, latent_side=8, context_tokens=4, context_width=16)


def _measure(stage: int) -> dict[str, Any]:
    return ema.measure(CASE, env.start(env.read_launch(), TrainConfig(device="cpu")), stage, 3, "tiny")


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 2)])
def test_a_case_is_measured(ranks: int, stage: int) -> None:
    results = run_ranks(_measure, ranks, stage)
    parameters = [result["parameters_of_the_rank"] for result in results]
    assert max(parameters) < 1.01 * sum(parameters) / ranks, "the ranks share the averages"
    for result in results:
        sizes = result["bytes_per_parameter"]
        assert sizes == {"masters_and_moments": 12.0, "averages": {"1": 4.0, "3": 12.0}}
        assert all(result["step_s"][count]["min"] > 0 for count in ("0", "1", "3"))
        assert 0 < result["update_share_of_step"]["1"] < 1
    assert "averages: 3" in ema.table({"tiny": results[0]})
