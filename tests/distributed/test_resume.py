"""Runs and their checkpoints: resumed bit for bit in the middle of anything, not ended by a save that fails."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from ldm_scale import faults
from ldm_scale.config.schema import Config
from ldm_scale.engine import env
from ldm_scale.engine.rank_files import complete_folders, read_manifest
from ldm_scale.operations.train import train
from ldm_scale.training import adversary, saving
from tests.helpers.cases import rarely
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_artifact, tiny_config
from tests.helpers.shards import make_dataset


def _train_run(config: Config, health_half_life_images: int | None = None) -> bool:
    if health_half_life_images is not None:
        adversary.HEALTH_HALF_LIFE_IMAGES = health_half_life_images  # in this rank's own process
    return train(config, env.read_launch())


# Everything of stage 1 that remembers: the discriminator's health, its hold, codes as averages, how long unused.
GAN = {
    "discriminator_start_images": 12,
    "discriminator_pretrain_images": 8,
    "adversarial_ramp_images": 16,
    "discriminator_hold_accuracy": 0.501,
    "discriminator_lr": 0.02,
    "lecam_weight": 0.1,
    "r1_weight": 0.1,
    "learned_variance": True,
}
EMA_CODES = {"codebook_update": "ema", "dead_code_images": 16}


@pytest.mark.parametrize(
    ("stage", "ranks", "zero_stage", "sections"),
    [
        ("autoencoder", 2, 2, {"autoencoder_loss": GAN}),
        rarely(
            "autoencoder",
            1,
            3,
            {"autoencoder": {"kind": "vq", "codebook_size": 64}, "autoencoder_loss": GAN | EMA_CODES},
        ),
        rarely("autoencoder", 1, 1, {"autoencoder_loss": GAN | {"discriminator_norm": "batch"}}),
        rarely("diffusion", 2, 3, {"ema": {"power_stds": (0.05, 0.1), "snapshot_every_images": 16}}),
    ],
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    tmp_path: Path, stage: str, ranks: int, zero_stage: int, sections: dict[str, dict[str, Any]]
) -> None:
    manifest = make_dataset(tmp_path / "data", num_samples=20, resolution=20)
    tiny_artifact(tmp_path / "artifact")
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    cadence = {"total_images": 64, "checkpoint_every_images": 32}
    config = tiny_config(
        stage,
        manifest,
        run,
        zero={"stage": zero_stage},
        train=cadence,
        **sections,
        optimizer={"warmup_images": 8, "decay": "cosine"},
        sampling={"prompts": ("a",)},
    )
    assert run_ranks(_train_run, ranks, config, 8) == [True] * ranks
    run.rename(unbroken)
    middle = unbroken / "checkpoints" / "images-0000000032"
    if sections.get("autoencoder_loss") == GAN:
        with safe_open(middle / "rank-00000.safetensors", "pt") as file:
            assert file.get_tensor("discriminator/buffer/health")[4] == 1, "it is not held: the test shows less"
    shutil.copytree(middle, run / "checkpoints" / middle.name)
    assert run_ranks(_train_run, ranks, config, 8) == [True] * ranks

    first, second = (folder / "checkpoints" / "images-0000000064" for folder in (unbroken, run))
    before, after = read_manifest(first), read_manifest(second)
    assert after["state"] | {"training_s": 0} == before["state"] | {"training_s": 0}
    assert after["models"] == before["models"], "other tensors, pieces or optimizer steps"
    assert {name: r["crc32"] for name, r in after["files"].items()} == {
        name: r["crc32"] for name, r in before["files"].items()
    }
    if "ema" in sections:
        _require_equal_snapshots(unbroken / "snapshots", run / "snapshots")
    results = [json.loads((folder / "result.json").read_text()) for folder in (unbroken, run)]
    assert results[0].pop("training_s") > 0
    assert results[1].pop("training_s") > 0
    if stage == "diffusion":  # the path is that of the folder that was renamed
        assert results[0] == results[1]
    else:
        assert results[0]["hash"] == results[1]["hash"]


def _require_equal_snapshots(unbroken: Path, resumed: Path) -> None:
    names = [folder.name for folder in complete_folders(unbroken)]
    assert names == [f"images-{images:010d}" for images in (16, 32, 48, 64)]
    assert [folder.name for folder in complete_folders(resumed)] == names[2:]
    for name in names[2:]:
        assert read_manifest(resumed / name)["files"] == read_manifest(unbroken / name)["files"]


def _train_under_faults(config: Config, rules: str) -> bool:
    os.environ[faults.VARIABLE] = rules  # of this rank's process alone
    saving.FIRST_PAUSE_S, saving.LAST_PAUSES_S = 0.0, (0.0, 0.0)
    return _train_run(config)


@pytest.mark.parametrize(
    ("fault", "in_background"),
    [
        ("enospc:at=save.write", True),
        rarely("enospc:at=save.write", False),
        rarely("eio:at=save.rename", True),
        rarely("eio:at=save.rename", False),
        rarely("erofs:at=save.begin,times=2", True),
        rarely("erofs:at=save.begin,times=2", False),
    ],
)
def test_training_goes_on_after_a_save_that_failed_and_soon_tries_again(
    tmp_path: Path, fault: str, in_background: bool
) -> None:
    manifest = make_dataset(tmp_path / "data", num_samples=16, resolution=20)
    tiny_artifact(tmp_path / "artifact")
    cadence = {"total_images": 392, "checkpoint_every_images": 200, "keep_checkpoints": 9}
    config = tiny_config("diffusion", manifest, tmp_path / "run", train=cadence | {"async_checkpoints": in_background})
    assert run_ranks(_train_under_faults, 1, config, fault) == [True]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names[-1] == "images-0000000392"
    assert "images-0000000200" not in names
    assert len(names) == 2, "not tried again before the end"


@pytest.mark.parametrize("in_background", [rarely(False), True])
def test_a_run_that_cannot_write_its_last_checkpoint_says_so(tmp_path: Path, in_background: bool) -> None:
    manifest = make_dataset(tmp_path / "data", num_samples=16, resolution=20)
    tiny_artifact(tmp_path / "artifact")
    cadence = {"total_images": 24, "checkpoint_every_images": 8, "async_checkpoints": in_background}
    config = tiny_config("diffusion", manifest, tmp_path / "run", train=cadence)
    with pytest.raises(AssertionError, match=r"CheckpointError: the run ends at 24 images without .*No space left"):
        run_ranks(_train_under_faults, 1, config, "enospc:at=save.sync,nth=2,times=99")
    (left,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert left.name == "images-0000000008"
    assert run_ranks(_train_run, 1, config) == [True], "with space again it goes on from there"
