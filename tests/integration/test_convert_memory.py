"""Conversions hold about one model in memory, however many passes and comparisons they make."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.convert_memory import CHECKPOINT, FOLDERS, GOAL, TINY, config_of, make_artifact_folder, run_steps
from ldm_scale.interchange.artifact import read_diffusion_artifact
from tests.helpers.checkpoints import write_checkpoint

CASE = "small"  # 186 MB
STEPS = ("artifact:diffusers", "diffusers:safetensors", "checkpoint:diffusers", "artifact:load_diffusion")


@pytest.mark.rest  # a minute, of a property that few changes touch
def test_conversions_take_less_than_the_goal(tmp_path: Path) -> None:
    """In one process, warm from a tiny model; a diffusers folder is there when its way back is."""
    for case in (TINY, CASE):
        make_artifact_folder(tmp_path, case)
        made = read_diffusion_artifact(tmp_path / case / FOLDERS["artifact"])
        config = config_of(case, str(tmp_path / case / "autoencoder"))
        checkpoint = tmp_path / case / FOLDERS[CHECKPOINT]
        write_checkpoint(checkpoint, config, "diffusion", {"weight": dict(made.state)}, made.autoencoder.content_hash)
    ratios = {step["step"]: step["ratio"] for step in run_steps(tmp_path, CASE, STEPS)}
    assert ratios.keys() == set(STEPS)
    assert all(0.1 < ratio < GOAL for ratio in ratios.values()), ratios
    assert ratios["artifact:load_diffusion"] > 0.9, "a loaded model is in memory"
