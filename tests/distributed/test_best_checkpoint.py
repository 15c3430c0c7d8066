"""Runs that end early keep and name their best checkpoint, whether they were stopped, killed or neither."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.engine import env
from ldm_scale.engine.rank_files import complete_folders, images_of, read_manifest
from ldm_scale.errors import CheckpointError, Restart
from ldm_scale.interchange.initial import read_initial
from ldm_scale.interchange.load import read_source
from ldm_scale.operations.train import train
from ldm_scale.training.diffusion_step import DiffusionTask
from tests.helpers.ranks import run_ranks, started_ranks
from tests.helpers.resumptions import BATCH, Setting, config_of

SETTING = Setting("diffusion", 1, "fp32", 1, 1, 0)
FIGURES = {8: 5.0, 16: 3.0, 24: 4.0, 32: 3.5, 40: 3.2, 48: 1.0}
KEYS = {
    "best_metric": "validation/ema/mean",
    "patience_images": 2 * BATCH,
    "validate_every_images": BATCH,
    "checkpoint_every_images": 0,
    "keep_checkpoints": 1,
}


def attempt(config: Any, at: int, event: str) -> str:
    """How the run ended, of which something happens in the validation after `at` images."""
    plain = DiffusionTask.validate

    def scripted(task: DiffusionTask, images: int) -> dict[str, float]:
        figures = plain(task, images)
        if images == at and event == "kill":
            os._exit(9)
        if images == at and event == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        return figures | {"validation/ema/mean": FIGURES[images]}

    DiffusionTask.validate = scripted  # type: ignore[method-assign]
    try:
        return "finished" if train(config, env.read_launch()) else "stopped"
    except Restart:
        return "stopped"


def left(run_dir: Path) -> dict[str, Any]:
    """What the run says and holds."""
    folders = complete_folders(run_dir / "checkpoints")
    state = read_manifest(folders[-1])["state"]
    result = json.loads((run_dir / "result.json").read_text())
    return {
        "folders": [images_of(folder) for folder in folders],
        "named": json.loads((run_dir / "best.json").read_text()),
        "state": {name: value for name, value in state.items() if name != "training_s"},
        "result": {name: result[name] for name in ("best", "ended_early", "images")},
    }


def test_a_run_ends_early_and_keeps_its_best(tmp_path: Path) -> None:
    unbroken = config_of(SETTING, tmp_path, "unbroken", **KEYS)
    assert run_ranks(attempt, 1, unbroken, 0, "") == ["finished"]
    found = left(tmp_path / "unbroken")
    assert found["folders"] == [16, 32]
    assert found["state"]["best"] == [[8, 5.0], [16, 3.0]]
    assert found["named"] == found["result"]["best"]
    assert (found["named"]["images"], found["result"]["images"]) == (16, 32)
    assert "has not been better than 3 for 16 images" in found["result"]["ended_early"]
    best = read_source(tmp_path / "unbroken" / "best.json")
    assert best.provenance["images"] == 16
    assert read_source(tmp_path / "unbroken").provenance["images"] == 32
    begins = dataclasses.replace(unbroken, init=str(tmp_path / "unbroken" / "best.json"), run_dir=str(tmp_path / "new"))
    assert read_initial(begins).content_hash == best.content_hash
    assert run_ranks(attempt, 1, unbroken, 0, "") == ["finished"], "again: nothing is left to do"
    assert left(tmp_path / "unbroken") == found
    shutil.rmtree(tmp_path / "unbroken" / found["named"]["checkpoint"])
    with pytest.raises(CheckpointError, match=r"best\.json names .*0016, which is not there \(there: .*32\): put"):
        read_source(tmp_path / "unbroken" / "best.json")


@pytest.mark.rest
def test_a_run_that_is_stopped_or_killed_keeps_the_same_best(tmp_path: Path) -> None:
    unbroken = config_of(SETTING, tmp_path, "unbroken", **KEYS)
    assert run_ranks(attempt, 1, unbroken, 0, "") == ["finished"]
    found = left(tmp_path / "unbroken")
    # Asked to stop in the validation before the best step: that step is saved first, and looked at later.
    stopped = config_of(SETTING, tmp_path, "stopped", **KEYS)
    assert run_ranks(attempt, 1, stopped, 8, "stop") == ["stopped"]
    assert run_ranks(attempt, 1, stopped, 0, "") == ["finished"]
    assert left(tmp_path / "stopped") == found

    killed = config_of(SETTING, tmp_path, "killed", **KEYS)
    with started_ranks(attempt, 1, tmp_path / "logs", killed, 24, "kill") as (rank,):
        assert rank.end() == 9
    assert run_ranks(attempt, 1, killed, 0, "") == ["finished"]
    assert left(tmp_path / "killed") == found
