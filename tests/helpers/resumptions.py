"""Tiny runs that stop and are started again, and what they leave, in a form that can be compared exactly."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_scale import faults
from ldm_scale.config.schema import Config
from ldm_scale.data import Batch
from ldm_scale.engine import env
from ldm_scale.engine.rank_files import folder_of, read_manifest
from ldm_scale.operations.train import train
from ldm_scale.training import adversary
from ldm_scale.training.trainer import Trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_artifact, tiny_config
from tests.helpers.shards import make_dataset

BATCH, STEPS = 8, 13
# Everything of stage 1 that remembers: the discriminator's health, its hold, its ramp.
GAN = {
    "discriminator_start_images": 12,
    "discriminator_pretrain_images": 8,
    "adversarial_ramp_images": 16,
    "discriminator_hold_accuracy": 0.501,
    "discriminator_lr": 0.02,
    "lecam_weight": 0.1,
    "r1_weight": 0.1,
}
TIMES = ("training_s", "images_per_s", "data_wait_share")  # what no two runs have in common
MEASURED = ("time_share/", "throughput/", "memory/")  # nor figures whose names begin so


@dataclass(frozen=True)
class Setting:
    """How a run is divided and computed, and after which steps it is interrupted."""

    stage: str
    zero: int
    precision: str
    ranks: int
    accumulation: int
    workers: int
    after: tuple[int, ...] = (1, 5, 12)

    def __str__(self) -> str:
        return f"{self.stage}-zero{self.zero}-{self.precision}-{self.ranks}x{self.accumulation}-{self.workers}workers"


def config_of(setting: Setting, root: Path, name: str, **train_keys: Any) -> Config:
    """A run that saves after each step; run directories of one root share data and artifact."""
    manifest = root / "data" / "manifest.json"
    if not manifest.exists():
        manifest = make_dataset(root / "data", num_samples=20, resolution=20)
        tiny_artifact(root / "artifact")
    cadence = {
        "total_images": STEPS * BATCH,
        "global_batch": BATCH,
        "micro_batch": BATCH // setting.ranks // setting.accumulation,
        "precision": setting.precision,
        "checkpoint_every_images": BATCH,
        "keep_checkpoints": 99,
    }
    return tiny_config(
        setting.stage,
        manifest,
        root / name,
        train=cadence | train_keys,
        zero={"stage": setting.zero},
        data={"num_workers": setting.workers},
        autoencoder_loss=GAN if setting.stage == "autoencoder" else {},
        optimizer={"warmup_images": 8, "decay": "cosine"},
        sampling={"prompts": ("a",)},
    )


def run_to_end(config: Config, ranks: int) -> None:
    """Nothing; the run directory has what the run left, and in seen/ which samples each step took."""
    assert run_ranks(_run, ranks, config, timeout_s=600) == [True] * ranks


def interrupted(config: Config, unbroken: Path, steps: int) -> None:
    """Nothing; the run directory is as if the unbroken run had ended after so many steps."""
    checkpoint = folder_of(unbroken / "checkpoints", steps * BATCH)
    shutil.copytree(checkpoint, Path(config.run_dir) / "checkpoints" / checkpoint.name)


def left_by(run_dir: Path, images: int) -> dict[str, Any]:
    """All of a checkpoint but its times: files by CRC-32, pieces, steps, state."""
    manifest = read_manifest(folder_of(run_dir / "checkpoints", images))
    state = {key: value for key, value in manifest["state"].items() if key not in TIMES}
    return {key: manifest[key] for key in ("files", "models", "world_size", "images")} | {"state": state}


def logged(run_dir: Path, after_images: int = 0) -> dict[int, dict[str, str]]:
    """Every figure of every step after so many images, as hex floats."""
    steps: dict[int, dict[str, str]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        images = row.pop("images")
        if images > after_images:
            figures = {name: float(value).hex() for name, value in row.items() if _is_repeatable(name)}
            steps.setdefault(images, {}).update(figures)
    return steps


def seen(run_dir: Path) -> dict[int, list[tuple[int, str]]]:
    """The global batch of each step: numbers and keys of its images, in order, by the images before the step."""
    batches: dict[int, list[tuple[int, str]]] = {}
    for path in (run_dir / "seen").iterdir():
        for line in path.read_text().splitlines():
            images, samples = json.loads(line)
            batches.setdefault(images, []).extend((number, key) for number, key in samples)
    return {images: sorted(batch) for images, batch in sorted(batches.items())}


def _run(config: Config) -> bool:
    os.environ.pop(faults.VARIABLE, None)
    adversary.HEALTH_HALF_LIFE_IMAGES = 8
    launch = env.read_launch()
    folder = Path(config.run_dir) / "seen"
    folder.mkdir(parents=True, exist_ok=True)
    step = Trainer._step

    def noting(trainer: Trainer, batches: list[Batch], *rest: Any) -> bool:
        samples = [pair for batch in batches for pair in zip(batch.image_numbers.tolist(), batch.keys, strict=True)]
        with (folder / f"{launch.world_size}-{launch.rank}.jsonl").open("a") as file:
            file.write(json.dumps([trainer.state.cur_images, samples]) + "\n")
        return step(trainer, batches, *rest)

    setattr(Trainer, "_step", noting)  # noqa: B010  # in this rank's own process
    return train(config, launch)


def _is_repeatable(name: str) -> bool:
    """Whether a figure of that name is the same in every run of one configuration."""
    return name not in (*TIMES, "time") and not name.startswith(MEASURED)
