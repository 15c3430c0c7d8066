"""The order of events in the training loop, with a task that only writes down what it is asked to do."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_scale.config.schema import BatchPlan, Config, SpikesConfig
from ldm_scale.data import Batch
from ldm_scale.engine.env import Environment, Launch
from ldm_scale.engine.health import RankBatch
from ldm_scale.errors import CheckpointError, NumericsError, Restart
from ldm_scale.training import saving, trainer
from ldm_scale.training.diagnosis import Finding
from ldm_scale.training.skipping import StepGuard, read_records
from ldm_scale.training.state import TrainingState
from ldm_scale.training.task import Pictures, Task
from ldm_scale.training.trainer import Trainer
from tests.helpers.runs import tiny_config
from tests.helpers.shards import make_dataset

BATCH = 8
ENVIRONMENT = Environment(Launch(), torch.device("cpu"), torch.float32)


class NotingTask(Task):
    """Notes its calls; `loss` gives the loss of the step that starts at an image count."""

    def __init__(self, config: Config, loss: Callable[[int], float] = lambda images: 1.0) -> None:
        super().__init__(config, BatchPlan(BATCH // 2, 2, BATCH), ENVIRONMENT)
        self.events: list[tuple[str, int]] = []
        self.numbers: list[int] = []
        self.keys: list[str] = []
        self.cut = 100  # before the first step, by a validation
        self._loss = loss

    def accumulate(self, batches: Sequence[Batch], images: int) -> dict[str, Tensor]:
        assert [len(batch.images) for batch in batches] == [BATCH // 2] * 2
        self.keys += [key for batch in batches for key in batch.keys]
        self.numbers += torch.cat([batch.image_numbers for batch in batches]).tolist()
        self.events.append(("accumulate", images))
        self.cut += 1
        return {"loss": torch.tensor(self._loss(images))}

    @property
    def num_truncated(self) -> int:
        return self.cut

    def discard(self) -> None:
        super().discard()
        self.events.append(("discard", self.events[-1][1]))

    def update(self, images: int) -> dict[str, float]:
        self.events.append(("update", images))
        return {"lr": 0.5}

    def validate(self, images: int) -> dict[str, float]:
        self.events.append(("validate", images))
        return {"validation/x": 2.0}

    def findings(
        self, figures: Mapping[str, float], recent: Sequence[Mapping[str, float]], images: int
    ) -> list[Finding]:
        assert figures == {"validation/x": 2.0}
        self.recent = [step["lr"] for step in recent]
        late = [Finding("late", "seen", "matters", "advice")] if images >= 32 else []
        return [Finding("early", "seen", "matters", "advice"), *late]

    def pictures(self) -> dict[str, Pictures]:
        self.events.append(("pictures", self.numbers[-1] + 1))
        return {"grid": Pictures({"": torch.zeros(2, 3, 4, 4)}, ["x", "y"])}

    def finish(self, checkpoint: Path, images: int) -> dict[str, Any]:
        self.events.append(("finish", images))
        return {"checkpoint": checkpoint.name}


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Image counts at which a checkpoint was asked for; none is written."""
    counts: list[int] = []

    def save(root: Path, images: int, trained: object, state: dict[str, Any], *rest: object) -> Path:
        assert state["cur_images"] == images
        counts.append(images)
        return root / f"images-{images:010d}"

    monkeypatch.setattr(saving, "save_checkpoint", save)
    return counts


@pytest.fixture
def config(tmp_path: Path) -> Config:
    manifest = make_dataset(tmp_path / "data", num_samples=12, resolution=16)
    cadence = {
        "total_images": 44,  # no whole number of batches: the last step goes beyond
        "micro_batch": BATCH // 2,
        "validate_every_images": 16,
        "sample_every_images": 30,
        "checkpoint_every_images": 20,
        "async_checkpoints": False,
    }
    return tiny_config("diffusion", manifest, tmp_path / "run", train=cadence)


def _at(task: NotingTask, name: str) -> list[int]:
    return [images for event, images in task.events if event == name]


def test_events_fall_due_at_their_image_counts(config: Config, saved: list[int]) -> None:
    task = NotingTask(config)
    assert Trainer(config, task, ENVIRONMENT).run()
    steps = list(range(0, 48, BATCH))
    assert _at(task, "accumulate") == _at(task, "update") == steps
    assert task.numbers == list(range(48)), "images are seen once each, in order"
    assert _at(task, "validate") == [16, 32, 48]
    assert _at(task, "pictures") == [32, 48]  # 30 was crossed at 32; the end always shows
    assert saved == [24, 40, 48]
    assert task.events[-1] == ("finish", 48)
    result = json.loads((Path(config.run_dir) / "result.json").read_text())
    assert result["checkpoint"] == "images-0000000048"
    assert (result["images"], result["steps"], result["truncated"]) == (48, 6, 6)
    rows = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows if "loss" in row] == [8, 16, 24, 32, 40, 48]
    assert [row["images"] for row in rows if "validation/x" in row] == [16, 32, 48]
    assert [row["truncated"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_its_images_count(
    config: Config, saved: list[int], value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    task = NotingTask(config, lambda images: value if images == 16 else 1.0)
    assert Trainer(config, task, ENVIRONMENT).run()
    assert _at(task, "accumulate") == list(range(0, 48, BATCH))
    assert _at(task, "update") == [0, 8, 24, 32, 40]
    assert _at(task, "discard") == [16]
    assert saved == [24, 40, 48], "what falls due after the step does all the same"
    assert task.recent == [0.5] * 5, "the skipped step is no part of what later ones are judged by"
    logged = capsys.readouterr().err
    assert f"step 2 (images 16 to 23) is skipped: not finite: loss={value} (loss on rank 0); samples" in logged
    rows = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows if "loss" in row] == [0, 0, 1, 1, 1, 1]
    (record,) = read_records(Path(config.run_dir))
    assert record["images"] == [16, 24]
    assert [sample["image"] for sample in record["samples"]] == task.numbers[16:24]
    assert [sample["key"] for sample in record["samples"]] == task.keys[16:24]


def test_too_many_in_a_row_stop_the_run_and_say_what_to_try(config: Config, saved: list[int]) -> None:
    limited = dataclasses.replace(config, train=dataclasses.replace(config.train, max_skipped_steps=2))
    task = NotingTask(limited, lambda images: math.nan if images in (8, 24, 32) else 1.0)
    task.update = lambda images: {"lr": 0.5, "grad_norm": 1.0 + images}  # type: ignore[method-assign]
    with pytest.raises(NumericsError) as caught:
        Trainer(limited, task, ENVIRONMENT).run()
    message = str(caught.value)
    assert message.startswith("2 steps in a row could not be made (train.max_skipped_steps=2)")
    assert "step 4 (images 32 to 39) is skipped: not finite: loss=nan" in message
    assert "gradient norm of the last 2 steps: median 9, last 17" in message
    assert f"ldm-scale replay {config.run_dir}" in message
    assert task.events[-1] == ("accumulate", 32)
    assert [record["images"][0] for record in read_records(Path(config.run_dir))] == [8, 24, 32]
    assert not (Path(config.run_dir) / "result.json").exists()


def test_records_beyond_the_checkpoint_are_forgotten_with_the_steps(config: Config, saved: list[int]) -> None:
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True)
    lines = [json.dumps({"images": [begin, begin + BATCH]}) for begin in (0, 8, 16)]
    (run_dir / "skipped_steps.jsonl").write_text("\n".join(lines) + '\n{"images": [24, 3')  # cut short by a kill
    StepGuard(config, TrainingState(cur_images=16), rank=1)
    assert [record["images"][0] for record in read_records(run_dir)] == [0, 8, 16], "rank 0 alone writes"
    StepGuard(config, TrainingState(cur_images=16), rank=0)
    assert [record["images"][0] for record in read_records(run_dir)] == [0, 8]


@pytest.mark.parametrize(("action", "made"), [("log", True), ("skip", False)])
def test_a_spike_is_found_in_its_step_and_treated_as_configured(
    config: Config, saved: list[int], action: Any, made: bool
) -> None:
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, total_images=40 * BATCH),
        spikes=SpikesConfig(action=action, window_steps=16),
    )
    bad = 30 * BATCH
    task = NotingTask(config, lambda images: 9.0 if images == bad else 1.0)
    trainer_ = Trainer(config, task, ENVIRONMENT)
    assert trainer_.run()
    assert (bad in _at(task, "update")) == made
    assert len(_at(task, "update")) == 40 - (not made)
    (record,) = read_records(Path(config.run_dir))
    assert (record["images"][0], record["reason"], record["action"]) == (bad, "spike", action)
    assert record["values"]["loss"] == 9.0
    assert trainer_.state.skipped == (0 if made else 1)
    assert trainer_.state.spikes.logs == [0.0] * 16


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_is_met_after_the_running_step(
    config: Config, saved: list[int], number: signal.Signals
) -> None:
    def ask(images: int) -> float:
        if images == 8:
            os.kill(os.getpid(), number)
        return 1.0

    task = NotingTask(config, ask)
    trainer = Trainer(config, task, ENVIRONMENT)
    if number == signal.SIGTERM:
        assert not trainer.run()
    else:
        with pytest.raises(Restart, match=rf"{config.run_dir} stopped at \d+ images"):
            trainer.run()
    assert task.events[-1][0] == "update"
    assert saved == [_at(task, "update")[-1] + BATCH]
    assert _at(task, "update")[-1] in (8, 16), "the step in which the signal came, or the next one"
    assert not _at(task, "finish")


def test_saves_by_the_clock_as_well(config: Config, saved: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    timed = dataclasses.replace(config.train, checkpoint_every_images=10**6, checkpoint_every_s=60.0)
    now = [0.0]
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def tick(images: int) -> float:
        now[0] += 25.0
        return 1.0

    task = NotingTask(dataclasses.replace(config, train=timed), tick)
    assert Trainer(task.config, task, ENVIRONMENT).run()
    assert saved == [24, 48]  # 75 s, then 75 s later


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(CheckpointError, match="continue with the version that wrote it"):
        TrainingState.from_dict({"cur_images": 8})
    state = TrainingState(cur_images=8).to_dict()
    with pytest.raises(CheckpointError, match="continue with the version that wrote it"):
        TrainingState.from_dict(state | {"later": 1})


def test_a_state_of_before_runs_had_given_weights_is_of_random_ones() -> None:
    state = TrainingState(cur_images=8, step=1).to_dict()
    del state["init"]
    assert TrainingState.from_dict(state) == TrainingState(cur_images=8, step=1)


def test_findings_reach_log_and_result_and_the_log_has_each_once(
    config: Config, saved: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    task = NotingTask(config)
    assert Trainer(config, task, ENVIRONMENT).run()
    logged = capsys.readouterr().err
    assert logged.count("diagnosis: early: seen. matters. What to do: advice") == 1
    assert logged.count("diagnosis: late: seen") == 1
    findings = json.loads((Path(config.run_dir) / "result.json").read_text())["findings"]
    assert [finding["name"] for finding in findings] == ["early", "late"]
    assert findings[0] == {"name": "early", "seen": "seen", "matters": "matters", "advice": "advice"}
    assert task.recent == [0.5] * 6


@pytest.mark.parametrize(("every_images", "compared"), [(0, [0]), (24, [0, 24]), (8, [0, 8, 16, 24, 32, 40])])
def test_ranks_are_compared_before_the_first_step_and_at_intervals(
    config: Config, saved: list[int], monkeypatch: pytest.MonkeyPatch, every_images: int, compared: list[int]
) -> None:
    seen: list[tuple[int, list[int], int]] = []

    def note(trained: object, batch: RankBatch, images: int) -> None:
        assert len(batch.keys) == BATCH
        seen.append((images, list(batch.image_numbers), batch.num_samples))

    monkeypatch.setattr(trainer, "check_ranks", note)
    timed = dataclasses.replace(config, train=dataclasses.replace(config.train, check_ranks_every_images=every_images))
    assert Trainer(timed, NotingTask(timed), ENVIRONMENT).run()
    assert seen == [(images, list(range(images, images + BATCH)), 12) for images in compared]


def test_the_first_save_tells_how_often_saves_are_worth_it(
    config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.get_logger(0), "propagate", True)
    keeper = saving.Saving(config, Path(config.run_dir) / "checkpoints", 0)
    keeper._still_s = 20.0
    monkeypatch.setattr(saving.collectives, "world_size", lambda: 16_384)
    for _ in range(2):
        keeper._advise()
    (line,) = [record.getMessage() for record in caplog.records if "loses the least" in record.getMessage()]
    assert "16384 of them run 3 h between failures" in line
    assert "train.checkpoint_every_s=65" in line  # Young: sqrt(2 x 20 s x 3.09 h) = 667 s, less Daly's correction
