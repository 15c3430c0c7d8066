"""Which checkpoints a run may go back to, and that they stay."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm_scale.config.schema import BatchPlan, Config, SpikesConfig, TrainConfig
from ldm_scale.engine.checkpoint import retire_older
from ldm_scale.engine.folder_write import write_folder
from ldm_scale.engine.rank_files import Piece, complete_folders, folder_of, images_of
from ldm_scale.training.rollback import is_target, target_images
from ldm_scale.training.state import TrainingState
from ldm_scale.training.trainer import Trainer


def _config(every: int, batch: int) -> Config:
    train = TrainConfig(checkpoint_every_images=every, global_batch=batch)
    return Config(train=train, spikes=SpikesConfig(action="rollback"))


@pytest.mark.parametrize(("every", "batch"), [(0, 8), (1, 8), (8, 8), (20, 8), (24, 8), (31, 8), (100, 7)])
def test_targets_are_where_the_trainer_saves_by_images(every: int, batch: int) -> None:
    config, last = _config(every, batch), 0
    for images in range(batch, 50 * batch, batch):
        progress = SimpleNamespace(state=TrainingState(images), plan=BatchPlan(batch, 1, batch))
        due = Trainer._due(progress, every)  # type: ignore[arg-type]
        last = images if due else last
        assert target_images(config, images) == last
        assert is_target(config, images) == due
        assert not is_target(config, images + 1), "a folder that no step of this run has left"


def test_the_newest_target_stays_beside_the_newest_checkpoints(tmp_path: Path) -> None:
    config = _config(32, 8)

    def left(keep: int) -> list[int]:
        retire_older(tmp_path, images, 0, keep, [lambda n: is_target(config, n)])
        return [images_of(folder) for folder in complete_folders(tmp_path)]

    for images in (32, 64, 72, 80, 88):
        piece = Piece("net", "weight", "weight", (1,), 0, torch.ones(1))
        write_folder(tmp_path, images, 0, [piece], {"models": {"net": {}}})
    assert left(keep=3) == [64, 72, 80, 88]
    assert left(keep=1) == [64, 88]
    folder_of(tmp_path, 88).rename(folder_of(tmp_path, 96))
    images = 96  # a target itself: none before it is needed
    assert left(keep=1) == [96]
