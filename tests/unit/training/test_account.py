"""Attempts and figures of a run: what it has cost, whatever ended it, and how it used its machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.engine import phases
from ldm_scale.engine.env import Environment, Launch
from ldm_scale.engine.phase_times import PhaseTimes
from ldm_scale.errors import NumericsError
from ldm_scale.planning.flops import measure_run
from ldm_scale.telemetry.side_files import read_rows
from ldm_scale.training import account
from ldm_scale.training.account import ATTEMPTS, Account
from ldm_scale.training.state import TrainingState
from tests.helpers.runs import tiny_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "run").mkdir()
    return tiny_config("diffusion", tmp_path / "manifest.json", tmp_path / "run", train={"total_images": 16})


def _account(config: Config, rank: int = 0) -> Account:
    environment = Environment(Launch(rank, 2, rank, 2), torch.device("cpu"), torch.bfloat16)
    return Account(config, batch_plan(config, 2), environment)


def _rows(config: Config) -> list[dict[str, Any]]:
    return read_rows(Path(config.run_dir) / ATTEMPTS)


def test_an_attempt_says_what_it_runs_on_and_how_it_ended(config: Config) -> None:
    state = TrainingState()
    with _account(config).attempt(state):
        state.cur_images = 8
    with _account(config).attempt(state):
        state.cur_images = 16
    with pytest.raises(NumericsError), _account(config).attempt(state):
        raise NumericsError("loss is nan\nat s3://user:canary@host/x?sig=canary")
    first, *_ = rows = _rows(config)
    assert [(row["event"], row["images"]) for row in rows] == [
        ("start", 0),
        ("end", 8),
        ("start", 8),
        ("end", 16),
        ("start", 16),
        ("end", 16),
    ]
    assert [row["reason"] for row in rows[1::2]][:2] == ["stopped", "finished"]
    assert rows[-1]["reason"].startswith("NumericsError: loss is nan at s3://host/x")
    assert "canary" not in json.dumps(rows)
    assert (first["ranks"], first["micro_batch"], first["precision"]) == (2, 4, "bfloat16")
    assert list(first["hosts"].values()) == [1]
    assert first["config"]["train"]["total_images"] == 16
    assert {"python", "torch", "deepspeed", "ldm-scale"} <= first["versions"].keys()
    assert first["step_flops"] == 3 * first["forward_flops"] + 3 * _tau_theta(config)


def _tau_theta(config: Config) -> int:
    size = measure_run(config).tau_theta
    assert size is not None
    return size.forward_flops


def test_other_ranks_keep_no_account(config: Config) -> None:
    other = _account(config, rank=1)
    with other.attempt(TrainingState()):
        other.step()
        assert other.figures() == {}
    assert _rows(config) == []


def test_mfu_is_the_models_flops_over_the_time_of_all_steps(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 10.0, 11.0, 12.0, 20.0])
    monkeypatch.setattr(phases.current, "times", PhaseTimes(phases.STEP, lambda: next(now), lambda: None))
    monkeypatch.setattr(account, "peak_flops", lambda name, dtype: 1e9)
    kept = _account(config)
    with kept.attempt(TrainingState()):
        for phase in ("data", "forward", "backward", "reduce", "update", "save", "data"):
            phases.current.times.enter(phase)
        kept.step()
        figures = kept.figures()
        again = kept.figures()
    assert figures["time_share/data"] == 0.05
    assert figures["time_share/backward"] == 0.3
    assert figures["time_share/save"] == 0.4
    assert sum(value for name, value in figures.items() if name.startswith("time_share/")) == pytest.approx(1.0)
    size = measure_run(config)
    rate = size.step_flops * 8 / 12.0 / 2  # 8 images, 12 seconds without the save, 2 ranks
    assert figures["throughput/model_tflops_per_s"] == pytest.approx(rate / 1e12)
    assert figures["throughput/mfu"] == pytest.approx(rate / 1e9)
    assert figures["memory/host_peak_gib"] > 0.01
    assert again.keys() == {"memory/host_peak_gib"}, "nothing has happened since"


def test_a_device_without_a_known_peak_has_no_mfu(config: Config) -> None:
    kept = _account(config)
    with kept.attempt(TrainingState()):
        phases.current.times.enter("data")
        phases.current.times.enter("forward")
        kept.step()
        assert "throughput/mfu" not in kept.figures()
