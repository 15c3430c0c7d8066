"""The two trainings of the demonstration within a time: what is measured, what is planned, how one is stopped.

A stage's learning rate must reach zero when its time is over, so its number of images is decided when it begins, from
its own speed: it trains for a few seconds with the rate still warming up, is asked to stop (its checkpoint is kept),
and goes on with the number of images that the rest of its time holds. No image is wasted; a second start of the
process is. The stages divide the time equally; what the first takes too long, the second has less.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.pieces import ROOT
from ldm_scale.config.schema import Config
from ldm_scale.engine.checkpoint import latest_checkpoint
from ldm_scale.errors import DataError, LdmScaleError
from ldm_scale.telemetry.log import get_logger
from ldm_scale.telemetry.tensorboard import read_metrics

PLAN = "plan.json"
MEASURED_ROWS, ROW_STEPS = 8, 10  # of metrics that a speed is measured on, and steps from one to the next
LEAST_S = 60.0  # no training begins or goes on with less than this
STOP_S = 20.0  # kept for the checkpoint of a training that is asked to stop
KILL_S = 60.0  # after which it is ended without one
MARGIN = 0.8  # of a stage's time goes into steps; the rest: validation, pictures, checkpoints, its product
EVENTS = 3  # validations, pictures and checkpoints of a stage

# Starts a training with overrides, waits, and asks it to stop at a Unix time or when told that it is enough.
Launch = Callable[[Sequence[str], float, Callable[[], bool]], None]


@dataclass(frozen=True)
class Stage:
    """One training. `slowdown`: time of an image, on average, over that of its first ones."""

    name: str
    config: Config
    overrides: tuple[str, ...]
    slowdown: float

    @property
    def run_dir(self) -> Path:
        """Where it trains."""
        return Path(self.config.run_dir)

    @property
    def result(self) -> dict[str, Any] | None:
        """What it ended with; None before."""
        path = self.run_dir / "result.json"
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def has_checkpoint(self) -> bool:
        """Whether it has anything to show."""
        return latest_checkpoint(self.run_dir / "checkpoints") is not None

    @property
    def images(self) -> int:
        """Images that it has surely trained on."""
        rows = read_metrics(self.run_dir)
        return int(rows[-1]["images"]) if rows else 0


@dataclass
class Planned:
    """A stage's speed, measured when it began, and what follows."""

    images_per_s: float
    start_s: float  # until its first step
    seconds: float  # of the whole time, for this stage from there on: another start, steps, and all the rest
    total_images: int


@dataclass
class Plan:
    """The time of the whole demonstration, and what its stages do with it; a file, which the next call goes on with."""

    total_s: float
    used_s: float = 0.0  # by the calls before this one
    stages: dict[str, Planned] = field(default_factory=dict)

    @staticmethod
    def read(path: Path, total_s: float) -> Plan:
        """The plan in a file, or a new one."""
        if not path.is_file():
            return Plan(total_s)
        content = json.loads(path.read_text())
        stages = {name: Planned(**planned) for name, planned in content["stages"].items()}
        return Plan(content["total_s"], content["used_s"], stages)

    def write(self, path: Path) -> None:
        """Puts it into the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def require_inputs(stages: Sequence[Stage]) -> None:
    """Returns if the shards are there.

    Raises: DataError with the command that renders them.
    """
    for stage in stages:
        manifest = Path(stage.config.data.manifest)
        if not manifest.is_file():
            raise DataError(
                f"{stage.config.experiment}: there is no {manifest}; render it beforehand, which needs no GPU: "
                f"ldm-scale prepare openmoji --resolution 160 --subset no-skin-tones --out {manifest.parent}"
            )


def train(
    stages: Sequence[Stage], plan_path: Path, total_s: float, begin_s: float, end_s: float, launch: Launch
) -> bool:
    """Whether all stages have ended; trains until `end_s` (Unix time) at most, from where the last call stopped.

    `begin_s` is when this call began. Raises: LdmScaleError if a training fails; it has told why.
    """
    plan = Plan.read(plan_path, total_s)
    before_s = plan.used_s
    try:
        for place, stage in enumerate(stages):
            if stage.result is None and not _advance(stage, stages[place:], plan, begin_s, end_s, launch):
                return False
        return True
    finally:
        plan.used_s = before_s + time.time() - begin_s
        plan.write(plan_path)


def _advance(
    stage: Stage, remaining: Sequence[Stage], plan: Plan, begin_s: float, end_s: float, launch: Launch
) -> bool:
    """Whether the stage has ended."""
    until_s = end_s - STOP_S
    if stage.name not in plan.stages:
        if until_s - time.time() < LEAST_S:
            return False
        speed = measure(stage, until_s, launch)
        if speed is None:
            return False
        rate, start_s = speed
        seconds = max(0.0, plan.total_s - plan.used_s - (time.time() - begin_s)) / len(remaining)
        total = total_images(stage, rate, seconds - start_s)
        plan.stages[stage.name] = Planned(rate, start_s, seconds, total)
        get_logger().info(
            f"{stage.name}: {rate:.0f} images/s at its beginning, {start_s:.0f} s to start; {total} images for the "
            f"{seconds:.0f} s that are left for it"
        )
    if stage.result is not None or until_s <= time.time():
        return stage.result is not None
    total = plan.stages[stage.name].total_images
    launch([*stage.overrides, *scaled(stage.config, total)], until_s, lambda: False)
    return stage.result is not None


def measure(stage: Stage, until_s: float, launch: Launch) -> tuple[float, float] | None:
    """Images/s of the stage's first steps, and seconds until the first; None if the time was over before them."""
    every = ROW_STEPS * stage.config.train.global_batch
    started_s = time.time()

    def times() -> list[float]:
        return [row["time"] for row in read_metrics(stage.run_dir) if row["time"] > started_s and "lr" in row]

    launch([*stage.overrides, f"train.log_every_images={every}"], until_s, lambda: len(times()) > MEASURED_ROWS)
    found = times()
    if len(found) < 3 or (len(found) <= MEASURED_ROWS and stage.result is None):
        return None
    durations = [later - earlier for earlier, later in itertools.pairwise(found)]
    # The first steps compile kernels and fill the loader's queue.
    row_s = statistics.median(durations[len(durations) // 2 :])
    return every / row_s, max(0.0, found[0] - started_s - row_s)


def total_images(stage: Stage, rate: float, seconds: float) -> int:
    """Images, in whole steps, that the stage has seen when `seconds` more are over: at least a step and the warm-up."""
    batch = stage.config.train.global_batch
    images = stage.images + rate * max(0.0, seconds) * MARGIN / stage.slowdown
    least = max(stage.config.optimizer.warmup_images, stage.images) // batch + 1
    return max(int(images / batch), least) * batch


def scaled(config: Config, total: int) -> list[str]:
    """Overrides for another number of images than configured: what happens at image counts keeps its place."""
    batch = config.train.global_batch
    ratio = total / config.train.total_images

    def images(count: float) -> int:
        return max(1, round(count / batch)) * batch

    loss, events = config.autoencoder_loss, images(total / EVENTS)
    places = {
        "discriminator_start_images": loss.discriminator_start_images,
        "discriminator_pretrain_images": loss.discriminator_pretrain_images,
        "adversarial_ramp_images": loss.adversarial_ramp_images,
    }
    return [
        f"train.total_images={total}",
        *(f"train.{event}_every_images={events}" for event in ("validate", "sample", "checkpoint")),
        *(
            f"autoencoder_loss.{name}={images(count * ratio)}"
            for name, count in places.items()
            if config.stage == "autoencoder" and count
        ),
    ]


def run_process(overrides: Sequence[str], until_s: float, enough: Callable[[], bool]) -> None:
    """Returns when the training, in a process of its own, has ended or was asked to stop; see `Launch`.

    Raises: LdmScaleError if it failed.
    """
    command = [sys.executable, "-m", "ldm_scale", "train", *overrides]
    status, asked = supervise(command, until_s, enough)
    # Asked before it listens, it ends by the signal itself.
    if status != 0 and not (asked and status == -signal.SIGTERM):
        raise LdmScaleError(f"{' '.join(command[2:])} ended with status {status}; what it said stands above")


def supervise(command: Sequence[str], until_s: float, enough: Callable[[], bool]) -> tuple[int, bool]:
    """Exit status of the command, and whether it was asked to stop (SIGTERM; killed if that does not help)."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    # A session of its own, so that its loaders can be ended with it and Ctrl-C comes through us.
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True)
    try:
        while process.poll() is None and time.time() < until_s and not enough():
            time.sleep(0.2)
        asked = process.poll() is None
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(KILL_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return process.returncode, asked


def described(plan: Mapping[str, Planned], stages: Sequence[Stage]) -> str:
    """How far the stages are, for a person."""
    parts = []
    for stage in stages:
        total = plan[stage.name].total_images if stage.name in plan else None
        parts.append(f"{stage.name} {stage.images} of {total or 'a number still to be decided'} images")
    return ", ".join(parts)
