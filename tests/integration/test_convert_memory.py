"""Conversions hold about one model in memory, however many passes and comparisons they make."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.convert_memory import CHECKPOINT, FOLDERS, GOAL, TINY, config_of, convert, make_artifact_folder
from ldm_scale.interchange.artifact import read_diffusion_artifact
from tests.helpers.checkpoints import write_checkpoint

CASE = "small"  # 186 MB
FIXED = 40 << 20  # what a larger model would not take more of: buffers of the libraries, pieces of the heap


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact, and a checkpoint of two ranks, in two sizes."""
    root = tmp_path_factory.mktemp("conversions")
    for case in (TINY, CASE):
        make_artifact_folder(root, case)
        made = read_diffusion_artifact(root / case / "artifact")
        config = config_of(case, str(root / case / "autoencoder"))
        state = {"weight": dict(made.state)}
        write_checkpoint(root / case / FOLDERS[CHECKPOINT], config, "diffusion", state, made.autoencoder.content_hash)
    return root


@pytest.mark.parametrize(
    "step", ["artifact:diffusers", "diffusers:safetensors", "checkpoint:diffusers", "checkpoint:load_diffusion"]
)
def test_a_conversion_takes_less_than_the_goal(folder: Path, step: str) -> None:
    """In this process, warm from the tiny model; a diffusers folder is there when its way back is."""
    size = sum(path.stat().st_size for path in (folder / CASE / "artifact").rglob("*.safetensors"))
    peak = convert(folder, CASE, step)["peak_bytes"]
    assert 0.1 * size < peak < GOAL * size + FIXED
