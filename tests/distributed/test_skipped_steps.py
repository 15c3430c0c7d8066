"""A value that is not finite, anywhere, on one rank: the step is made on none, and it is as if it had never been.

Each case trains twice in the same ranks: once with a fault in one step, once with that step left out, and compares
everything that the two have bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm_scale import faults
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import ConditioningConfig, Config
from ldm_scale.engine import env
from ldm_scale.engine.health import checksum
from ldm_scale.engine.rank_files import complete_folders
from ldm_scale.engine.spikes import NUM_LEVELS
from ldm_scale.training.autoencoder_step import AutoencoderTask
from ldm_scale.training.diffusion_step import DiffusionTask
from ldm_scale.training.skipping import LEVEL
from ldm_scale.training.task import Task
from ldm_scale.training.trainer import Trainer
from tests.helpers.cases import rarely
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_artifact, tiny_config
from tests.helpers.shards import make_dataset

BATCH, STEPS, BAD_STEP = 8, 3, 1
SAVED, SPIKE = 8 * BATCH, 9 * BATCH  # images, of the test that goes back
Sums = dict[str, int]


def _sums(task: Task) -> Sums:
    """Checksums of everything that a run has trained, on this rank."""
    sums: Sums = {}
    for name, item in task.trained.items():
        sums[f"{name}/steps"] = item.model.optimizer_steps
        for fragment, kind, values in item.tensors():
            sums[f"{name}/{kind}/{fragment.name}"] = checksum(values)
        for key, value in (dict(item.model.module.named_buffers()) | item.buffers).items():
            sums[f"{name}/buffer/{key}"] = checksum(value)
        if item.model.stage < 3:
            sums |= {f"{name}/parameter/{key}": checksum(p) for key, p in item.model.module.named_parameters()}
    return sums


class _Watched(Trainer):
    """Notes checksums after each step."""

    after: list[Sums]
    left_out: frozenset[int] = frozenset()

    def _step(self, *args: Any) -> bool:
        if not hasattr(self, "after"):
            self.after = [_sums(self.task)]
        if len(self.after) - 1 in self.left_out:
            self.state.cur_images += BATCH
            self.state.step += 1
            stopping = False
        else:
            stopping = super()._step(*args)
        self.after.append(_sums(self.task))
        return stopping

    def _now_and_then(self, *args: Any) -> None:
        """Nothing to look at and nothing to save."""

    _finish = _now_and_then


class _Saving(_Watched):
    """Writes the checkpoints that fall due; the step at SPIKE looks a hundred times as bad as it is."""

    def _now_and_then(self, *args: Any) -> None:
        self.saving.settle()
        if self.saving.is_due(self._due(self.config.train.checkpoint_every_images)):
            self.saving.save(self.task.trained, self.state)

    def _reduce(self, *args: Any) -> Any:
        means, *rest = super()._reduce(*args)
        sums = {f"{LEVEL}{i:02d}" for i in range(NUM_LEVELS)} if self.state.cur_images == SPIKE else ()
        factors = dict.fromkeys(sums, 100.0)
        return ({name: value * factors.get(name, 1.0) for name, value in means.items()}, *rest)


class _Stopping(_Saving):
    """Is asked to stop in the step after the checkpoint of SAVED."""

    def _step(self, *args: Any) -> bool:
        if self.state.cur_images == SAVED:
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._step(*args)


class _Damaged(_Saving):
    """Has a flipped bit in its newest checkpoints when the spike comes."""

    checkpoints_damaged = 1

    def _reduce(self, *args: Any) -> Any:
        if self.state.cur_images == SPIKE:
            self.saving.complete()
            for folder in complete_folders(self.checkpoints)[-self.checkpoints_damaged :]:
                path = folder / "rank-00001.safetensors"
                if self.environment.rank == 1:
                    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        return super()._reduce(*args)


class _AllDamaged(_Damaged):
    checkpoints_damaged = 9


def _train(
    config: Config,
    run_dir: str,
    environment: env.Environment,
    left_out: frozenset[int] = frozenset(),
    kind: type[_Watched] = _Watched,
) -> _Watched:
    config = replace(config, run_dir=f"{config.run_dir}-{run_dir}")
    task = AutoencoderTask if config.stage == "autoencoder" else DiffusionTask
    trainer = kind(config, task(config, batch_plan(config, environment.world_size), environment), environment)
    trainer.left_out = left_out
    if kind is not _Stopping:
        trainer.saving.save_last = lambda *_, **__: trainer.saving.complete()  # type: ignore[method-assign]
    trainer.run()
    return trainer


def _compare(config: Config, fault: str) -> dict[str, Any]:
    environment = env.start(env.read_launch(), config.train)
    os.environ.pop(faults.VARIABLE, None)
    faults.configure(environment.rank, print)
    expected = _train(config, "expected", environment, frozenset({BAD_STEP}))
    os.environ[faults.VARIABLE] = fault
    faults.configure(environment.rank, print)
    actual = _train(config, "actual", environment)
    return {
        "differences": [_different(a, b) for a, b in zip(expected.after, actual.after, strict=True)],
        "moved": [len(_different(a, b)) for a, b in zip(actual.after, actual.after[1:], strict=False)],
        "skipped": (actual.state.skipped, actual.state.skipped_in_a_row),
        "position": (actual.state.cur_images, actual.state.step),
    }


def _different(a: Sums, b: Sums) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if a[name] != b[name]]


GAN: dict[str, Any] = {"autoencoder_loss": {"discriminator_norm": "batch", "lecam_weight": 0.1}}
SMALLEST: dict[str, Any] = {
    "unet": {"channel_multipliers": (1,), "attention_levels": (), "attention": "self"},
    "conditioning": ConditioningConfig(),
}
VQ: dict[str, Any] = {
    "autoencoder": {"kind": "vq", "codebook_size": 64},
    "autoencoder_loss": {"codebook_update": "ema", "dead_code_images": 16},
}


def _case(
    stage: str, zero: int, precision: str, fault: str, accumulation: int = 1, *, rare: bool = False, **sections: Any
) -> Any:
    name = f"{stage}-{zero}-{precision}-{fault.split(':')[0]}-{fault.split('at=')[1].split(',')[0]}"
    return (rarely if rare else pytest.param)(stage, zero, precision, fault, accumulation, sections, id=name)


@pytest.mark.parametrize(
    ("stage", "zero", "precision", "fault", "accumulation", "sections"),
    [
        _case("diffusion", 0, "fp32", "nan:at=step.gradients,rank=1,nth=2", rare=True),
        _case("diffusion", 0, "bf16", "inf:at=step.latents,rank=0,nth=3", 2, rare=True),
        _case("diffusion", 1, "fp32", "inf:at=step.input,rank=1,nth=3", 2, rare=True),
        _case("diffusion", 1, "bf16", "nan:at=step.gradients,rank=0,nth=2", rare=True),
        _case("diffusion", 2, "fp32", "nan:at=step.loss,rank=0,nth=4", 2),
        _case("diffusion", 2, "bf16", "nan:at=step.latents,rank=1,nth=2", rare=True),
        _case("diffusion", 3, "fp32", "nan:at=step.latents,rank=1,nth=3", 2, rare=True),
        _case("diffusion", 3, "bf16", "inf:at=step.gradients,rank=1,nth=2"),
        # Of two engines the generator's gradient is asked for first, then the discriminator's.
        _case("autoencoder", 0, "fp32", "nan:at=step.gradients,rank=1,nth=4", rare=True, **GAN),
        _case("autoencoder", 1, "bf16", "nan:at=step.gradients,rank=1,nth=3", 2, rare=True),
        _case("autoencoder", 2, "fp32", "nan:at=step.input,rank=0,nth=4", 2, **GAN),
        _case("autoencoder", 3, "fp32", "inf:at=step.loss,rank=1,nth=2", rare=True, **VQ),
        _case("autoencoder", 1, "fp32", "nan:at=step.input,rank=1,nth=3", 2, rare=True, **VQ),
    ],
)
def test_a_step_that_is_not_finite_on_one_rank_never_was(
    tmp_path: Path, stage: str, zero: int, precision: str, fault: str, accumulation: int, sections: dict[str, Any]
) -> None:
    manifest = make_dataset(tmp_path / "data", num_samples=20, resolution=20)
    tiny_artifact(tmp_path / "artifact")
    train = {
        "total_images": STEPS * BATCH,
        "precision": precision,
        "micro_batch": BATCH // 2 // accumulation,
    }
    config = tiny_config(stage, manifest, tmp_path / "run", train=train, zero={"stage": zero}, **SMALLEST | sections)
    reports = run_ranks(_compare, 2, config, fault)
    for report in reports:
        assert report["differences"] == [[]] * (STEPS + 1)
        assert report["moved"][BAD_STEP] == 0
        assert all(report["moved"][step] > 0 for step in range(STEPS) if step != BAD_STEP)
        assert report["skipped"] == (1, 0)
        assert report["position"] == (STEPS * BATCH, STEPS)
    _require_record(tmp_path / "run-actual", fault)


def _require_record(run_dir: Path, fault: str) -> None:
    (record,) = [json.loads(line) for line in (run_dir / "skipped_steps.jsonl").read_text().splitlines()]
    rank = int(fault.split("rank=")[1][0])
    assert record["images"] == [BAD_STEP * BATCH, (BAD_STEP + 1) * BATCH]
    assert (record["step"], record["reason"], record["action"]) == (BAD_STEP, "not finite", "skip")
    assert set(record["values"].values()) <= {"nan", "inf"}
    mine = set(range(BAD_STEP * BATCH + rank * BATCH // 2, BAD_STEP * BATCH + (rank + 1) * BATCH // 2))
    images = {sample["image"] for sample in record["samples"]}
    if "gradients" in fault:
        assert all(rank in given for given in record["ranks"].values()), "the norm is that of all ranks' parts"
        assert all(name.startswith("gradient of ") for name in record["values"])
        assert images == set(range(*record["images"])), "an averaged gradient cannot tell whose images it was"
    else:
        assert any(given == [rank] for name, given in record["ranks"].items() if not name.startswith("gradient"))
        assert images == mine, "only the rank's own samples are suspect"
    assert all(sample["key"].startswith("train-") or "/" in sample["key"] for sample in record["samples"])
    row = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][BAD_STEP]
    assert row["skipped_steps"] == 1


def _rollback_config(root: Path, checkpoint_every_images: int) -> Config:
    manifest = make_dataset(root / "data", num_samples=20, resolution=20)
    tiny_artifact(root / "artifact")
    return tiny_config(
        "diffusion",
        manifest,
        root / "run",
        train={"total_images": 11 * BATCH, "checkpoint_every_images": checkpoint_every_images},
        zero={"stage": 2},
        spikes={"action": "rollback", "window_steps": 16},
        **SMALLEST,
    )


def _go_back(config: Config) -> dict[str, Any]:
    environment = env.start(env.read_launch(), config.train)
    between = range(SAVED // BATCH, SPIKE // BATCH + 1)
    expected = _train(config, "expected", environment, frozenset(between))
    actual = _train(config, "actual", environment, kind=_Saving)
    # A kill after the spike and before the next checkpoint: the run comes to the same place again and goes back again.
    resumed = _train(config, "actual", environment, kind=_Saving)
    return {
        "differences": _different(expected.after[-1], actual.after[-1]),
        "at_once": _different(actual.after[SAVED // BATCH], actual.after[SPIKE // BATCH + 1]),
        "between": len(_different(actual.after[SAVED // BATCH], actual.after[SPIKE // BATCH])),
        "resumed": _different(resumed.after[-1], actual.after[-1]),
        "resumed_steps": len(resumed.after) - 1,
        "states": [(t.state.passed_over, t.state.skipped, t.state.spikes) for t in (actual, resumed)],
    }


def test_a_rollback_leaves_out_what_led_to_the_spike_and_does_so_again_when_resumed(tmp_path: Path) -> None:
    config = _rollback_config(tmp_path, SAVED)
    for report in run_ranks(_go_back, 2, config):
        assert report["differences"] == report["at_once"] == report["resumed"] == []
        assert report["between"] > 0
        assert report["resumed_steps"] == 3, "the second attempt continued at the checkpoint"
        assert report["states"][0] == report["states"][1]
        assert report["states"][0][:2] == ([[SAVED, SPIKE + BATCH]], 1)


def _go_back_disturbed(config: Config) -> dict[str, Any]:
    """Differences of disturbed runs from such as left the steps out that they should have."""
    environment = env.start(env.read_launch(), config.train)
    expected = {
        images: _train(config, f"from-{images}", environment, frozenset(range(images // BATCH, SPIKE // BATCH + 1)))
        for images in (SAVED // 2, SAVED, SPIKE)
    }
    by_clock = replace(config, train=replace(config.train, checkpoint_every_s=1e-6, keep_checkpoints=1))
    _train(config, "stopped", environment, kind=_Stopping)
    cases = {
        "stopped": (SAVED, _train(config, "stopped", environment, kind=_Saving)),
        "clock": (SAVED, _train(by_clock, "clock", environment, kind=_Saving)),
        "damaged": (SAVED // 2, _train(config, "damaged", environment, kind=_Damaged)),
        "all": (SPIKE, _train(config, "all", environment, kind=_AllDamaged)),
    }
    return {
        name: (_different(expected[images].after[-1], run.after[-1]), len(run.after) - 1, run.state.passed_over)
        for name, (images, run) in cases.items()
    }


@pytest.mark.rest
def test_a_rollback_leads_where_configuration_and_images_say_or_to_the_one_before_in_plain_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = _rollback_config(tmp_path, SAVED // 2)
    for report in run_ranks(_go_back_disturbed, 2, config):
        assert report["stopped"] == ([], 2, [[SAVED, SPIKE + BATCH]]), "a stop moved it"
        assert report["clock"] == ([], 11, [[SAVED, SPIKE + BATCH]]), "saves by the clock moved it"
        assert report["damaged"] == ([], 11, [[SAVED // 2, SPIKE + BATCH]])
        assert report["all"] == ([], 11, []), "without any the step is skipped and no more"
    said = capfd.readouterr().err
    target, before = (tmp_path / "run-damaged" / "checkpoints" / f"images-{n:010d}" for n in (SAVED, SAVED // 2))
    assert f"DAMAGED CHECKPOINT {target}: {target}/rank-00001.safetensors is damaged" in said
    assert f"{target} could not be written, was removed or is damaged; the run goes back to {before} instead" in said
    assert said.count("ROLLBACK WITHOUT ITS CHECKPOINT") == 2
    assert (target.parent / f"damaged-{target.name}").is_dir()
