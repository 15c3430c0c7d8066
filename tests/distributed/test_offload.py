"""What lies in the CPU's memory trains as what lies on the device: the same steps, averages, checkpoints and skips."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_scale.config.compose import load_config
from ldm_scale.config.schema import EmaConfig
from ldm_scale.config.validate import validate
from ldm_scale.engine.checkpoint import Trained, load_checkpoint, save_checkpoint
from ldm_scale.engine.ema import ShardedEma
from ldm_scale.errors import ConfigError
from tests.helpers.ranks import run_ranks
from tests.helpers.sharded import BATCH, masters, max_difference, moments, network, predict, sharded, train_step

OFFLOADED = {"offload_optimizer": True}
ALL_OFFLOADED = OFFLOADED | {"offload_parameters": True}


def _train(stage: int, precision: str, root: Path, zero: dict[str, bool]) -> dict[str, Any]:
    model = sharded(network(), stage, precision, **zero)
    trained = Trained(model, ShardedEma(model, EmaConfig(half_life_images=10.0)))
    assert trained.ema is not None
    assert [getattr(model.engine, f"zero_{name}")() is not None for name in ("offload_optimizer", "offload_param")] == [
        "offload_optimizer" in zero,
        "offload_parameters" in zero,
    ], "DeepSpeed was not told"
    norms = [train_step(model, 0, 1e-2, 30.0), train_step(model, 1, 5e-3)]
    trained.ema.update(2 * BATCH, BATCH)
    path = save_checkpoint(root, 16, {"net": trained}, {}, {}, 1)
    norms.append(train_step(model, 2, 1e-2))
    report = {"norms": norms, "weights": masters(model), "moment": moments(model, "exp_avg_sq")}
    with trained.ema.active():
        report["average"] = predict(model)
    report["prediction"] = predict(model)
    # A gradient that is not finite, as on the last rank alone, and one that is, are forgotten; the next step is not
    # touched by them.
    for scale in (math.nan, 1.0):
        train_step_without_update(model, 5, scale)
    load_checkpoint(path, {"net": trained})
    report["norms_again"] = [train_step(model, 2, 1e-2)]
    report["weights_again"] = masters(model)
    return report


def train_step_without_update(model: Any, step: int, scale: float) -> None:
    """Gradients of a batch, judged and forgotten."""
    update, model.step = model.step, lambda lr: 0.0
    train_step(model, step, 1.0, scale if model.environment.rank == 1 else 1.0)
    model.step = update
    before = masters(model)
    square = model.gradient_square()
    assert square is not None
    squares = torch.stack([square]).clone()
    torch.distributed.all_reduce(squares)
    assert bool(squares.isfinite()) == math.isfinite(scale), "known to all ranks before any optimizer moves"
    model.discard()
    assert max_difference(masters(model), before) == 0
    assert model.gradient_square() is None


@pytest.mark.parametrize(
    ("stage", "precision", "zero"),
    [
        (1, "bf16", OFFLOADED),
        (2, "fp32", OFFLOADED),
        (3, "bf16", OFFLOADED),
        (3, "fp32", ALL_OFFLOADED),
    ],
)
def test_the_same_training(tmp_path: Path, stage: int, precision: str, zero: dict[str, bool]) -> None:
    expected = run_ranks(_train, 2, stage, precision, tmp_path / "plain", {})[0]
    for actual in run_ranks(_train, 2, stage, precision, tmp_path / "offloaded", zero):
        assert actual["norms"] == pytest.approx(expected["norms"], rel=1e-6)
        for name in ("weights", "moment"):
            assert max_difference(actual[name], expected[name]) <= 1e-7, name
        for name in ("prediction", "average"):
            assert torch.allclose(actual[name], expected[name], rtol=0, atol=1e-6), name
        assert actual["norms_again"] == actual["norms"][-1:]
        assert max_difference(actual["weights_again"], actual["weights"]) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["zero.stage=0", "zero.offload_optimizer=true"], "zero.offload_optimizer=true needs zero.stage of 1 to 3"),
        (["zero.stage=2", "zero.offload_optimizer=true", "zero.offload_parameters=true"], "got zero.stage=2"),
        (["zero.stage=3", "zero.offload_parameters=true"], "and zero.offload_optimizer=false"),
    ],
)
def test_what_cannot_be_offloaded(settings: list[str], words: str) -> None:
    run = ["experiment=demo_autoencoder", "data.manifest=x", "run_dir=x"]
    with pytest.raises(ConfigError, match=words):
        validate(load_config([*run, *settings]), world_size=1)
