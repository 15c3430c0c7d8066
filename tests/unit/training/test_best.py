"""Which validation is the best, when a run that does not get better ends, and which checkpoint stays and is named."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_scale.config.schema import Config, EvaluationConfig, SamplingConfig, TrainConfig
from ldm_scale.engine.checkpoint import retire_older
from ldm_scale.engine.folder_write import remove_folder, write_folder
from ldm_scale.engine.rank_files import Piece, complete_folders, folder_of, images_of
from ldm_scale.errors import ConfigError
from ldm_scale.training.best import BestRecord, forget_others, found, has_ended, has_ended_early, judge, summary
from ldm_scale.training.state import TrainingState

LOWEST = TrainConfig(best_metric="loss", patience_images=20, total_images=1000)


def judged(values: list[float], train: TrainConfig) -> tuple[list[bool], TrainingState]:
    """Whether each of the validations, ten images apart, was the best so far."""
    state, answers = TrainingState(), []
    for value in values:
        state.cur_images += 10
        answers.append(judge({"loss": value, "other": 0.0}, state, Config(train=train)))
    return answers, state


def test_only_better_ones_are_the_best() -> None:
    values = [math.nan, 3.0, 3.0, 2.0, math.nan, -math.inf, 2.5, 1.0]
    answers, state = judged(values, LOWEST)
    assert answers == [False, True, False, True, False, False, False, True]
    assert state.best == [(20, 3.0), (40, 2.0), (80, 1.0)]
    highest = TrainConfig(best_metric="loss", best_is="highest")
    assert judged([1.0, 2.0, 1.5, math.inf, 3.0], highest)[0] == [True, True, False, False, True]
    assert judged([1.0], TrainConfig())[1] == TrainingState(cur_images=10), "nothing is told unasked"


def test_a_run_ends_when_nothing_better_came_for_so_many_images() -> None:
    assert not has_ended_early(judged([2.0, 3.0], LOWEST)[1], LOWEST)
    state = judged([2.0, 3.0, 3.0], LOWEST)[1]
    assert has_ended(state, LOWEST)
    assert "loss has not been better than 2 for 20 images (train.patience_images=20)" in str(
        summary(state, LOWEST, Path("none"))["ended_early"]
    )
    assert not has_ended(state, TrainConfig(best_metric="loss", patience_images=21)), "more patience goes on"
    assert not has_ended(judged([math.nan] * 9, LOWEST)[1], LOWEST), "no validation was the best yet"
    between = judged([2.0, 3.0], LOWEST)[1]
    between.cur_images += 500
    assert not has_ended(between, LOWEST), "only a validation ends a run"


def test_the_state_comes_back_from_json() -> None:
    state = judged([2.0, 1.0 / 3.0], LOWEST)[1]
    assert TrainingState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_a_validation_that_is_made_again_changes_nothing() -> None:
    state = judged([2.0], LOWEST)[1]
    assert not judge({"loss": 1.9999}, state, Config(train=LOWEST))
    assert state.best == [(10, 2.0)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train": TrainConfig(best_metric="evaluation/b", patience_images=20)}, "metric"),
        ({"train": TrainConfig(best_metric="evaluation/a", best_is="highest", patience_images=20)}, "is"),
        ({"evaluation": EvaluationConfig(every_images=10, num_images=9)}, "num_images"),
        ({"sampling": SamplingConfig(num_steps=3)}, "sampling"),
        ({"evaluation": EvaluationConfig(every_images=20, batch=2)}, ""),
    ],
)
def test_figures_of_another_kind_are_not_compared(
    change: dict[str, Any], named: str, capfd: pytest.CaptureFixture[str]
) -> None:
    train = TrainConfig(best_metric="evaluation/a", patience_images=20)
    config = Config(train=train, evaluation=EvaluationConfig(every_images=10))
    figures, state = {"evaluation/a": 1.0, "evaluation/b": 5.0}, TrainingState(cur_images=10)
    assert judge(figures, state, config, is_evaluation=True)
    state = TrainingState.from_dict(json.loads(json.dumps(state.to_dict())))
    forget_others(state, config)
    assert state.best == [(10, 1.0)]
    other, state.cur_images = dataclasses.replace(config, **change), 30
    forget_others(state, other)
    assert state.best == ([] if named else [(10, 1.0)])
    assert not has_ended_early(state, other.train), "unlike figures end nothing"
    assert (f"another {named})" in capfd.readouterr().err) == bool(named)
    assert judge(figures, state, other, is_evaluation=True) == bool(named)


def test_validation_does_not_judge_evaluations_nor_they_it() -> None:
    config, state = Config(train=TrainConfig(best_metric="evaluation/a")), TrainingState(cur_images=1)
    assert not judge({"validation/a": 1.0}, state, config)
    assert judge({"evaluation/a": 1.0}, state, config, is_evaluation=True)
    of_validation = Config(train=TrainConfig(best_metric="validation/a"))
    assert not judge({"evaluation/a": 1.0}, TrainingState(), of_validation, is_evaluation=True)
    with pytest.raises(ConfigError, match="this run's evaluation has no such figure; it has evaluation/b"):
        judge({"evaluation/b": 1.0}, TrainingState(), config, is_evaluation=True)


def test_a_figure_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"train\.best_metric=fid: this run's validation .*; it has a, b"):
        judge({"b": 1.0, "a": 2.0}, TrainingState(), Config(train=TrainConfig(best_metric="fid")))


def test_the_best_that_is_there_stays_and_is_named(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    for images in (10, 20, 30, 40):
        piece = Piece("net", "weight", "weight", (1,), 0, torch.ones(1))
        write_folder(root, images, 0, [piece], {"models": {"net": {}}})
    state = judged([3.0, 2.0, 4.0, 5.0, 1.0], LOWEST)[1]
    best = {images for images, _ in state.best}
    assert best == {10, 20, 50}, "that of 50 could not be written"
    retire_older(root, 40, 0, 1, [best.__contains__])
    assert [images_of(folder) for folder in complete_folders(root)] == [20, 40]

    record = BestRecord(tmp_path, LOWEST, is_main=True)
    record.update(state)
    named = json.loads((tmp_path / "best.json").read_text())
    assert named == {
        "figure": "loss",
        "value": 2.0,
        "images": 20,
        "checkpoint": f"checkpoints/{folder_of(root, 20).name}",
    }
    assert (tmp_path / named["checkpoint"]).is_dir()
    (tmp_path / "best.json").unlink()
    record.update(state)
    assert not (tmp_path / "best.json").exists(), "it is not written again while nothing is better"
    for folder in complete_folders(root):
        remove_folder(folder)
    assert found(state, LOWEST, root) is None
