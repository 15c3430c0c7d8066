"""A run that goes on with other ranks and at other ZeRO stages: the same batches and counters, losses to rounding."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.engine.rank_files import folder_of, read_manifest
from tests.helpers.cases import rarely
from tests.helpers.resumptions import Setting, config_of, logged, run_to_end, seen

BATCH = 12  # a batch that 1, 2, 3 and 4 ranks divide
CHAIN = ((4, 2), (2, 3), (1, 0), (3, 2), (4, 3))  # ranks and stage, each for an equal part of the steps
SHORT = ((2, 2), (1, 0))


def _config(tmp_path: Path, name: str, setting: Setting, steps: int) -> Any:
    keys = {
        "global_batch": BATCH,
        "micro_batch": BATCH // setting.ranks,
        "total_images": steps * BATCH,
        "checkpoint_every_images": 4 * BATCH,
    }
    config = config_of(setting, tmp_path, name, **keys)
    # What depends on the length of the run would differ between a run to the end and one that ends in between.
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, decay="constant"))


def _loss(row: dict[str, str], name: str) -> float:
    return float.fromhex(row[name])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("chained", "steps", "precision", "tolerance"),
    [
        (SHORT, 8, "fp32", 1e-5),
        rarely(CHAIN, 20, "fp32", 1e-5),
        rarely(CHAIN, 20, "bf16", 1e-3),
    ],
)
def test_stage_2_goes_on_with_any_ranks_and_any_zero_stage(
    tmp_path: Path, chained: Sequence[tuple[int, int]], steps: int, precision: str, tolerance: float
) -> None:
    first = Setting("diffusion", chained[0][1], precision, chained[0][0], 1, 0)
    run_to_end(_config(tmp_path, "unbroken", first, steps), first.ranks)
    for part, (ranks, zero) in enumerate(chained, start=1):
        setting = dataclasses.replace(first, ranks=ranks, zero=zero)
        run_to_end(_config(tmp_path, "chain", setting, 4 * part), ranks)
    unbroken, chain = tmp_path / "unbroken", tmp_path / "chain"
    batches = seen(unbroken)
    assert [len(batch) for batch in batches.values()] == [BATCH] * steps
    assert seen(chain) == batches
    losses, others = logged(unbroken), logged(chain)
    assert sorted(others) == sorted(losses) == [step * BATCH for step in range(1, steps + 1)]
    worst = max(abs(_loss(others[i], "loss") / _loss(losses[i], "loss") - 1) for i in losses)
    assert 0 < worst <= tolerance, worst
    ends = [read_manifest(folder_of(run / "checkpoints", steps * BATCH)) for run in (unbroken, chain)]
    states = [{key: value for key, value in end["state"].items() if key != "training_s"} for end in ends]
    spikes = [state.pop("spikes") for state in states]  # of losses, which differ in the last digits
    assert spikes[1].keys() == spikes[0].keys()
    for name, values in spikes[0].items():
        assert spikes[1][name] == pytest.approx(values, rel=100 * tolerance, abs=100 * tolerance), name
    assert states[1] == states[0]
    for end in ends:
        assert {model["optimizer_steps"] for model in end["models"].values()} == {steps}


@pytest.mark.rest
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "zero"), [(2, 3), (1, 0), (3, 1)])
def test_the_next_step_of_stage_1_is_the_same_on_other_ranks(tmp_path: Path, ranks: int, zero: int) -> None:
    # An adversarial run amplifies rounding step by step; one step from the same checkpoint does not.
    first = Setting("autoencoder", 2, "fp32", 4, 1, 0)
    run_to_end(_config(tmp_path, "unbroken", first, 8), 4)
    run_to_end(_config(tmp_path, "chain", first, 4), 4)
    run_to_end(_config(tmp_path, "chain", dataclasses.replace(first, ranks=ranks, zero=zero), 5), ranks)
    expected, found = (logged(tmp_path / name)[5 * BATCH] for name in ("unbroken", "chain"))
    for name in ("loss/l1", "loss/reconstruction", "loss/discriminator"):
        assert _loss(found, name) == pytest.approx(_loss(expected, name), rel=1e-5), name
    assert seen(tmp_path / "chain")[4 * BATCH] == seen(tmp_path / "unbroken")[4 * BATCH]


@pytest.mark.rest
@pytest.mark.timeout(1_800)
def test_stage_1_passes_through_all_of_them(tmp_path: Path) -> None:
    """The whole chain: the same batches and counters, and at each link the step that the other division would make."""
    first, part = Setting("autoencoder", CHAIN[0][1], "fp32", CHAIN[0][0], 1, 0), 3
    settings = [dataclasses.replace(first, ranks=ranks, zero=zero) for ranks, zero in CHAIN]
    end, chain, unbroken = part * len(CHAIN), tmp_path / "chain", tmp_path / "unbroken"
    run_to_end(_config(tmp_path, "unbroken", first, end), first.ranks)
    for link, setting in enumerate(settings):
        if link:  # the step after the checkpoint, as those who wrote it would make it
            stays, before = tmp_path / f"stays {link}", settings[link - 1]
            shutil.copytree(chain, stays)
            run_to_end(_config(tmp_path, stays.name, before, part * link + 1), before.ranks)
        run_to_end(_config(tmp_path, "chain", setting, part * (link + 1)), setting.ranks)
        if link:
            expected, found = (logged(run)[(part * link + 1) * BATCH] for run in (stays, chain))
            for name in ("loss/l1", "loss/reconstruction", "loss/discriminator"):
                assert _loss(found, name) == pytest.approx(_loss(expected, name), rel=1e-5), (link, name)
    assert len(seen(unbroken)) == end
    assert seen(chain) == seen(unbroken)
    ends = [read_manifest(folder_of(run / "checkpoints", end * BATCH)) for run in (unbroken, chain)]
    counters = [{name: value for name, value in e["state"].items() if type(value) is int} for e in ends]
    assert counters[1] == counters[0]
    assert {"cur_images", "step", "skipped"} <= counters[0].keys()
    assert [e["state"]["losses"] for e in ends[1:]] == [ends[0]["state"]["losses"]]
    steps = [{name: model["optimizer_steps"] for name, model in e["models"].items()} for e in ends]
    assert steps[1] == steps[0]
    assert steps[0]["discriminator"] > 0
