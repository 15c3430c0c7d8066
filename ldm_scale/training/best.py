"""Which checkpoint has been the best by a figure of validation or evaluation, and whether a run gets no better.

Each validation whose figure is better than all before asks for a checkpoint of that very step; an evaluation is of a
checkpoint that is there. The best one stays, however many newer ones there are; `best.json` of the run names it. If it
could not be written, the best one that could stays and is named. All of it follows from the figures, which are part of
the run's state, so that a run that was stopped and resumed keeps, names and ends as the unbroken one does. A figure
that is no number is never better.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.fit import judges_evaluation
from ldm_scale.config.schema import Config, TrainConfig
from ldm_scale.engine.rank_files import complete_folders, folder_of, images_of
from ldm_scale.engine.tensor_file import replace_file
from ldm_scale.engine.weights import BEST
from ldm_scale.errors import ConfigError
from ldm_scale.telemetry.log import get_logger
from ldm_scale.telemetry.side_files import side_write
from ldm_scale.training.state import TrainingState


def judge(figures: Mapping[str, float], state: TrainingState, config: Config, *, is_evaluation: bool = False) -> bool:
    """Whether the figures of a validation, or of an evaluation, are the best so far, which the state then knows.

    Raises: ConfigError if train.best_metric should be one of them and is not.
    """
    train = config.train
    name = train.best_metric
    if name is None or not figures or is_evaluation != judges_evaluation(train):
        return False
    if name not in figures:
        raise ConfigError(
            f"train.best_metric={name}: this run's {'evaluation' if is_evaluation else 'validation'} has no such "
            f"figure; it has {', '.join(sorted(figures))}"
        )
    forget_others(state, config)
    state.judged_by = judged_by(config)
    value, state.judged_images = figures[name], state.cur_images
    sign = 1.0 if train.best_is == "lowest" else -1.0
    is_known = bool(state.best) and state.best[-1][0] == state.cur_images  # looked at once more, after a stop
    if is_known or not math.isfinite(value) or (state.best and sign * value >= sign * state.best[-1][1]):
        return False
    state.best.append((state.cur_images, value))
    return True


def judged_by(config: Config) -> dict[str, Any]:
    """All that figures must have in common to be compared: their name, which are better, how they are measured."""
    train, found = config.train, {"metric": config.train.best_metric, "is": config.train.best_is}
    if not judges_evaluation(train):
        return found
    measured = config_to_dict(config.evaluation) | {"sampling": config_to_dict(config.sampling)}
    return found | {name: value for name, value in measured.items() if name not in ("every_images", "batch")}


def forget_others(state: TrainingState, config: Config) -> None:
    """Nothing; the state holds no best figures that were judged by something else than the configuration says."""
    now = judged_by(config)
    if not state.best or state.judged_by == now:
        return
    names = [name for name in now | state.judged_by if now.get(name) != state.judged_by.get(name)]
    get_logger().warning(
        f"the best checkpoint so far ({int(state.best[-1][0])} images) was told by other figures (another "
        f"{', '.join(names)}), and counts no more"
    )
    state.best, state.judged_images = [], 0


def has_ended_early(state: TrainingState, train: TrainConfig) -> bool:
    """Whether the last figure came train.patience_images after the best one."""
    if not train.patience_images or not state.best:
        return False
    return state.judged_images - int(state.best[-1][0]) >= train.patience_images


def has_ended(state: TrainingState, train: TrainConfig) -> bool:
    """Whether the run is over: all images were seen, or it ended early."""
    return state.cur_images >= train.total_images or has_ended_early(state, train)


def found(state: TrainingState, train: TrainConfig, checkpoints: Path) -> dict[str, Any] | None:
    """The best checkpoint that is there, with its figure; None if there is none."""
    there = {images_of(folder) for folder in complete_folders(checkpoints)}
    for images, value in reversed(state.best):
        if images in there:
            path = folder_of(Path(checkpoints.name), int(images))
            return {"figure": train.best_metric, "value": value, "images": images, "checkpoint": str(path)}
    return None


class BestRecord:
    """`best.json` of a run, written by rank 0 when another checkpoint is the best that is there."""

    def __init__(self, run_dir: Path, train: TrainConfig, is_main: bool) -> None:
        self._path, self._train, self._writes = run_dir / BEST, train, is_main and train.best_metric is not None
        self._named = -1  # images of the checkpoint in the file

    def update(self, state: TrainingState) -> None:
        """Nothing; the file names the best checkpoint. Nothing is done while that is the same."""
        if not self._writes or not state.best or state.best[-1][0] == self._named:
            return
        best = found(state, self._train, self._path.parent / "checkpoints")
        if best is None or best["images"] == self._named:
            return
        with side_write(self._path):
            replace_file(self._path, json.dumps(best, indent=2) + "\n")
            self._named = best["images"]


def summary(state: TrainingState, train: TrainConfig, checkpoints: Path) -> dict[str, Any]:
    """What the run's result says of its best checkpoint, and of why it ended early if it did."""
    if train.best_metric is None:
        return {}
    told: dict[str, Any] = {"best": found(state, train, checkpoints)}
    if has_ended_early(state, train):
        images, value = state.best[-1]
        told["ended_early"] = (
            f"{train.best_metric} has not been better than {value:.6g} for {state.judged_images - int(images)} images "
            f"(train.patience_images={train.patience_images})"
        )
    return told
