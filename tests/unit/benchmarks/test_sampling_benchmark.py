"""The benchmark of sampling: every setting is a call of its own, whose parts add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import sampling
from tests.helpers.runs import tiny_config


def test_calls_are_timed_and_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "APART_CALLS", 1)
    base = sampling.Setting(num_steps=2, batch=2)
    chosen = {
        "sampler": [base, replace(base, sampler="plms"), replace(base, sampler="heun")],
        "guidance": [replace(base, guided=False), base],
    }
    results = sampling.measure(tiny_config("diffusion", Path(), Path("run")), chosen, torch.device("cpu"), 2)
    rows = results["rows"]
    # heun asks twice as often less one, plms once more (`SamplingConfig.num_steps`); guidance for more rows at once.
    assert [row["unet_calls"] for row in rows] == [2, 3, 3, 2, 2]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(2 / row["latency_s"]["median"])
        assert all(seconds > 0 for seconds in row["parts_s"].values())
    assert rows[0]["latency_s"] == rows[-1]["latency_s"], "timed once, in two cases"
    assert "guidance: ddim, 2 steps, batch 2, not guided" in sampling.table(results)
    sampling.draw(results, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_settings_differ_from_the_base_in_one_thing() -> None:
    for settings in sampling.cases().values():
        assert sampling.BASE in settings
        for setting in settings:
            changed = [key for key, value in vars(setting).items() if value != getattr(sampling.BASE, key)]
            assert len(changed) <= 1
