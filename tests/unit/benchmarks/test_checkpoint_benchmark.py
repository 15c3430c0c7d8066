"""The benchmark of checkpoints on a network of a few thousand weights: every figure is there, and the table of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.checkpoint import Measurement, table
from benchmarks.unet_step import Case
from ldm_scale.config.schema import TrainConfig
from ldm_scale.engine import env
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import UNET


def _measure(folder: Path) -> dict[str, Any]:
    here = env.start(env.read_launch(), TrainConfig(device="cpu"))
    case = Case(UNET, batch=2, latent_channels=3, latent_side=8, context_tokens=4, context_width=16)
    return Measurement(case, here, 1, folder).run(2, "tiny")


def test_all_is_measured(tmp_path: Path) -> None:
    result = run_ranks(_measure, 1, tmp_path)[0]
    assert result["seconds"].keys() == {
        "save",
        "save_without_checksum",
        "save_read_back",
        "deepspeed_save_and_sync",
        "verify_and_load",
        "load",
        "deepspeed_load",
        "stall",
    }
    for spreads in (result["seconds"], result["ratios"]):
        assert all(values["min"] > 0 for values in spreads.values())
    assert 1.1 < result["bytes"]["deepspeed"] / result["bytes"]["ours"] < 1.5  # it has the weights twice
    assert "tiny: ZeRO 1, 1 rank(s); ours" in table({"tiny": result})
