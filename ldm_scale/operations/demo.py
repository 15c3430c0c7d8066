"""The demonstration: every command of the project once, on real images, each in its own process where that matters.

The trainings see the number of images that their experiments say, or fewer where a short measurement of this machine
says that they would not end in the time allowed; the plan is written down, so that a second call continues the same
runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm_scale.config.schema import Config
from ldm_scale.data.sources.openmoji import prepare_openmoji
from ldm_scale.engine.env import cpu_threads
from ldm_scale.errors import LdmScaleError
from ldm_scale.interchange.load import read_source
from ldm_scale.interchange.publish import publish
from ldm_scale.operations.demo_report import write_report
from ldm_scale.operations.demo_speed import images_per_s
from ldm_scale.telemetry.log import get_logger
from ldm_scale.telemetry.side_files import read_record

INTERRUPTED = 130
SAMPLES_PER_SHARD = 256
HELDOUT_PERCENT = 5.0


@dataclass(frozen=True)
class Recipe:
    """What the demonstration trains, and where its files go."""

    autoencoder: str  # names of experiments
    diffusion: str
    captions: str  # the subset of emoji that the diffusion model learns
    resolution: int  # of the rendered images; the loader crops and shrinks them
    data: Path
    runs: Path

    def folder(self, subset: str) -> Path:
        """Where the rendered images of a subset go."""
        return self.data / f"openmoji_{subset.replace('-', '_')}_{self.resolution}"

    def run(self, experiment: str) -> Path:
        """Run directory of an experiment."""
        return self.runs / experiment

    @property
    def out(self) -> Path:
        """Where the results go."""
        return self.runs / "demo"

    def overrides(self) -> list[list[str]]:
        """Overrides of the two trainings, in their order."""
        return [
            [
                f"experiment={self.autoencoder}",
                f"data.manifest={self.folder('no-skin-tones') / 'manifest.json'}",
                f"run_dir={self.run(self.autoencoder)}",
            ],
            [
                f"experiment={self.diffusion}",
                f"data.manifest={self.folder(self.captions) / 'manifest.json'}",
                f"run_dir={self.run(self.diffusion)}",
                f"artifact={self.run(self.autoencoder) / 'artifact'}",
            ],
        ]


def choose_recipe(data: Path, runs: Path) -> Recipe:
    """The experiments that fit this machine: the small ones for a CPU, the larger ones for a CUDA GPU."""
    if torch.cuda.is_available():
        return Recipe("openmoji_autoencoder", "openmoji_text", "no-skin-tones", 128, data, runs)
    return Recipe("demo_autoencoder", "demo_text", "demo", 64, data, runs)


def run_demo(recipe: Recipe, autoencoder: Config, diffusion: Config, minutes: float) -> int:
    """Exit status: 0 when everything was made, 130 when a training was interrupted (calling again continues).

    Raises: DataError, CheckpointError or ConfigError where a step cannot be done.
    """
    log = get_logger(0)
    started = time.monotonic()
    torch.set_num_threads(cpu_threads())
    device = "a CUDA GPU" if torch.cuda.is_available() else "the CPU"
    log.info(f"demo on {device}: {recipe.autoencoder}, then {recipe.diffusion}")
    for subset in dict.fromkeys(("all", "no-skin-tones", recipe.captions)):
        _render(recipe, subset)
    totals = _plan_totals(recipe, autoencoder, diffusion, minutes)
    for config, overrides, total in zip((autoencoder, diffusion), recipe.overrides(), totals, strict=True):
        log.info(f"training {config.experiment} on {total} images")
        if not _train(Path(config.run_dir), [*overrides, *_scaled(config, total)], total):
            log.info("stopped; run the same command to continue")
            return INTERRUPTED
    report = write_report(recipe.out, Path(diffusion.run_dir), Path(autoencoder.run_dir), _report_data(recipe))
    for run_dir, name in ((autoencoder.run_dir, "autoencoder"), (diffusion.run_dir, "pipeline")):
        publish(read_source(Path(run_dir)), "diffusers", recipe.out / "diffusers" / name)
    _announce(recipe, report, time.monotonic() - started)
    return 0


def _render(recipe: Recipe, subset: str) -> None:
    """Renders a subset of the emoji as shards, or finds them rendered."""
    prepared = prepare_openmoji(
        recipe.folder(subset),
        recipe.resolution,
        None if subset == "all" else subset,
        0.0 if subset == "demo" else HELDOUT_PERCENT,
        SAMPLES_PER_SHARD,
    )
    counts = ", ".join(f"{name} {split['num_samples']}" for name, split in prepared.manifest["splits"].items())
    get_logger(0).info(f"{'reused' if prepared.reused else 'rendered'} {prepared.manifest_path} ({counts})")


def _report_data(recipe: Recipe) -> dict[str, Path]:
    """Manifests that the report looks at."""
    return {
        "all": recipe.folder("all") / "manifest.json",
        "autoencoder": recipe.folder("no-skin-tones") / "manifest.json",
        "captions": recipe.folder(recipe.captions) / "manifest.json",
    }


def _plan_totals(recipe: Recipe, autoencoder: Config, diffusion: Config, minutes: float) -> list[int]:
    """Images of the two trainings: as configured, or the same share of both so that they fit the time."""
    path = recipe.out / "plan.json"
    planned = read_record(path, lambda plan: [int(total) for total in plan["total_images"]])
    if planned is not None and len(planned) == 2:
        return planned
    log = get_logger(0)
    rates = images_per_s(autoencoder, diffusion)
    configs = (autoencoder, diffusion)
    needed_s = sum(config.train.total_images / rate for config, rate in zip(configs, rates, strict=True))
    share = min(1.0, minutes * 60.0 / needed_s)
    totals = [_whole_steps(config, share) for config in configs]
    log.info(
        f"this machine trains about {rates[0]:.0f} and {rates[1]:.0f} images/s: {needed_s / 60:.1f} minutes for the "
        f"configured images, {minutes:g} allowed; training on {share:.0%} of them, {totals[0]} and {totals[1]}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"total_images": totals, "images_per_s": rates, "share": share}) + "\n")
    return totals


def _whole_steps(config: Config, share: float) -> int:
    """Share of the configured images, in whole steps, beyond the warm-up."""
    batch = config.train.global_batch
    steps = round(config.train.total_images * share / batch)
    return max(steps, config.optimizer.warmup_images // batch + 1) * batch


def _scaled(config: Config, total: int) -> list[str]:
    """Overrides that keep the discriminator's start at the same share of a shortened training."""
    if config.stage != "autoencoder":
        return []
    batch = config.train.global_batch
    start = config.autoencoder_loss.discriminator_start_images * total / config.train.total_images
    return [f"autoencoder_loss.discriminator_start_images={round(start / batch) * batch}"]


def _train(run_dir: Path, overrides: Sequence[str], total_images: int) -> bool:
    """Whether the training has ended; runs in a process of its own, which continues what it finds.

    Raises: LdmScaleError if the process failed; it has told why.
    """
    result = run_dir / "result.json"
    if read_record(result, lambda written: int(written["images"]) >= total_images):
        get_logger(0).info(f"{run_dir} is finished: reused")
        return True
    command = [sys.executable, "-m", "ldm_scale", "train", *overrides, f"train.total_images={total_images}"]
    process = subprocess.Popen(command)
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:
            # The terminal has sent Ctrl-C to the training as well: it writes its checkpoint, and we wait for it.
            continue
    if status not in (0, INTERRUPTED):
        raise LdmScaleError(f"training in {run_dir} ended with status {status}; its own message stands above")
    return result.is_file()


def _announce(recipe: Recipe, report: dict[str, Any], seconds: float) -> None:
    """Prints where everything lies."""
    print(f"\nDone in {seconds / 60:.1f} minutes.")
    for name, value in report["summary"].items():
        print(f"  {name:<44} {value}")
    print(f"\n  picture              {recipe.out / 'samples.png'}")
    print(f"  report               {recipe.out / 'report.md'}")
    print(f"  TensorBoard folder   {recipe.runs}   (.venv/bin/tensorboard --logdir {recipe.runs})")
    print(f"  exported pipeline    {recipe.out / 'diffusers' / 'pipeline'}")
    print(f"  exported autoencoder {recipe.out / 'diffusers' / 'autoencoder'}")
