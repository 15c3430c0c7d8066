"""One global batch of a run again, image by image: data, noise and times are functions of seed and image numbers."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm_scale.config.convert import config_from_dict
from ldm_scale.config.schema import BatchPlan, Config
from ldm_scale.data import Batch, build_loader
from ldm_scale.engine import env
from ldm_scale.engine.checkpoint import load_checkpoint
from ldm_scale.engine.rank_files import complete_folders, images_of, read_manifest
from ldm_scale.engine.spikes import NORMAL_MAD, SpikeHistory
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.operations.train import build_task
from ldm_scale.telemetry.tensorboard import image_grid
from ldm_scale.training.latent_task import LatentTask
from ldm_scale.training.skipping import GRADIENT, LOSSES, SKIPPED_STEPS, read_records
from ldm_scale.training.state import TrainingState
from ldm_scale.training.task import Task

FAR_DEVIATIONS, LEAST_DEVIATION = 5.0, 0.2  # robust, of the logarithm of a loss or a norm among those of its batch
SHOWN = 20  # rows of the table


def replay(arguments: argparse.Namespace) -> dict[str, Any]:
    """The document of `ldm-scale replay`: the step, the checkpoint that it was made from, and each image's figures.

    Raises: ConfigError if the run has no such step; CheckpointError if it has no checkpoint before it.
    """
    run: Path = arguments.run
    record = _record(run, arguments.image)
    position = arguments.image if record is None else record["images"][0]
    checkpoint = _checkpoint_before(run, position)
    manifest = read_manifest(checkpoint)
    config = _for_one_process(config_from_dict(manifest["config"]), arguments)
    batch = config.train.global_batch
    begin = position // batch * batch
    environment = env.start(env.Launch(), config.train)
    # A micro-batch is an image; the global batch stays, for what depends on it (such as strata of times).
    task = build_task(config, BatchPlan(micro_batch=1, accumulation_steps=1, global_batch=batch), environment)
    state = TrainingState.from_dict(load_checkpoint(checkpoint, task.trained))
    images, samples, pictures = _figures(task, _batches(config, state, begin), begin, state.spikes)
    env.stop()
    judged = _judged(samples)
    order = sorted(range(images), key=lambda i: (_RANKING.index(judged[i]["verdict"]), -judged[i]["_distance"]))
    picture = arguments.out or run / f"replay-{begin:010d}.png"
    grid = image_grid(torch.stack([pictures[i] for i in order]))
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(picture)
    return {
        "run": str(run),
        "images": [begin, begin + batch],
        "checkpoint": str(checkpoint),
        "steps_after_checkpoint": (begin - state.cur_images) // batch,
        "precision": str(environment.dtype).removeprefix("torch."),
        "recorded": record and {name: record[name] for name in ("reason", "action", "values", "ranks")},
        "samples": [{name: value for name, value in judged[i].items() if name != "_distance"} for i in order],
        "picture": str(picture),
    }


def replay_text(document: dict[str, Any]) -> str:
    """The document for people."""
    begin, end = document["images"]
    recorded = document["recorded"]
    why = f"recorded: {recorded['reason']}, {recorded['values']}" if recorded else "nothing is recorded of this step"
    counts = {verdict: sum(s["verdict"] == verdict for s in document["samples"]) for verdict in _RANKING}
    rows = [
        f"{s['image']:>12}  {s['loss']!s:>12.12}  {s['gradient_norm']!s:>12.12}  {s['verdict']:<10}  {s['key']}"
        for s in document["samples"][:SHOWN]
    ]
    more = [f"  and {len(document['samples']) - SHOWN} more"] if len(document["samples"]) > SHOWN else []
    return "\n".join(
        [
            f"images {begin} to {end - 1}, with the weights of {document['checkpoint']} "
            f"({document['steps_after_checkpoint']} steps earlier), {document['precision']}; {why}",
            ", ".join(f"{count} {verdict}" for verdict, count in counts.items()),
            f"{'image':>12}  {'loss':>12}  {'grad. norm':>12}  {'':<10}  key",
            *rows,
            *more,
            f"picture, in this order: {document['picture']}",
        ]
    )


_RANKING = ("not finite", "far off", "ordinary")


def _record(run: Path, image: int | None) -> dict[str, Any] | None:
    """The recorded step with this image, or the last one; None for an image of a step of which nothing is recorded."""
    if not run.is_dir():
        raise ConfigError(f"{run}: there is no such folder; give the run_dir of a run")
    records = read_records(run)
    if image is not None:
        if not 0 <= image < 2**62:  # positions are 64-bit integers
            raise ConfigError(f"--image {image}: must be from 0 to {2**62 - 1}; give an image of the run")
        return next((r for r in reversed(records) if r["images"][0] <= image < r["images"][1]), None)
    if not records:
        raise ConfigError(f"{run / SKIPPED_STEPS} holds no step; choose any step of the run with --image N")
    return records[-1]


def _checkpoint_before(run: Path, position: int) -> Path:
    """The newest checkpoint of at most so many images."""
    folders = complete_folders(run / "checkpoints")
    before = [folder for folder in folders if images_of(folder) <= position]
    if not before:
        held = ", ".join(folder.name for folder in folders) or "none"
        raise CheckpointError(
            f"{run / 'checkpoints'} has no checkpoint of at most {position} images (there: {held}), so the step cannot "
            "be made again; keep more of them (train.keep_checkpoints) or save more often"
        )
    return before[-1]


def _for_one_process(config: Config, arguments: argparse.Namespace) -> Config:
    """The run's configuration, nothing divided, on the chosen device."""
    train = dataclasses.replace(
        config.train, device=arguments.device, precision=arguments.precision or config.train.precision
    )
    zero = dataclasses.replace(config.zero, stage=0, discriminator_stage=0)
    data = dataclasses.replace(config.data, num_workers=0)
    return dataclasses.replace(config, train=train, zero=zero, data=data, init="")  # a checkpoint gives the weights


def _batches(config: Config, state: TrainingState, begin: int) -> list[Batch]:
    """The images of the global batch that begins there, one by one."""
    loader = build_loader(
        config.data,
        seed=config.train.seed,
        global_batch=config.train.global_batch,
        micro_batch=1,
        rank=0,
        world_size=1,
        start_image=begin,
        accept_latents=config.stage != "autoencoder",
        annotations=config.conditioning.annotations if config.stage == "diffusion" else frozenset(),
        quarantined={int(number): start for number, start in state.losses.quarantined.items()},
    )
    return list(itertools.islice(loader, config.train.global_batch))


def _figures(
    task: Task, batches: Sequence[Batch], images: int, history: SpikeHistory
) -> tuple[int, list[dict[str, Any]], list[Tensor]]:
    """Number of images, figures of each, and each as a picture (3, H, W). The weights stay as they are."""
    samples, pictures = [], []
    for batch in batches:
        metrics = task.accumulate([batch], images)
        observed = task.observations()
        task.discard()
        name = next(name for name in LOSSES if name in metrics)
        loss, expected = float(metrics[name]), None
        if task.sample_losses:
            level = int(task.sample_losses[0][1])
            if history.counts[level] > 0.0:
                expected = history.sums[level] / history.counts[level]
        squares = [float(square) for key, square in observed.items() if key.startswith(GRADIENT)]
        samples.append(
            {
                "image": int(batch.image_numbers[0]),
                "key": batch.keys[0],
                "loss": loss,
                "usual_loss": expected,  # at its level of noise, where the run knows
                "gradient_norm": math.sqrt(sum(squares)) if all(map(math.isfinite, squares)) else math.nan,
                "metrics": {key: float(value) for key, value in metrics.items()},
            }
        )
        pictures.append(_picture(task, batch))
    return len(samples), samples, pictures


@torch.no_grad()
def _picture(task: Task, batch: Batch) -> Tensor:
    """The image as it was trained on; of cached latents, their reconstruction. Shapes: returns (3, H, W) on the CPU."""
    if len(batch.images):
        image = batch.images[0]
    else:
        assert isinstance(task, LatentTask)
        z = task.encode(batch, mode=True).to(task.environment.dtype)
        image = task.autoencoder.decode(z)[0]
    return image.float().cpu().nan_to_num(1.0, 1.0, -1.0)


def _judged(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples with a verdict, and how far they are from the others; what is not finite as text."""
    relative = [s["loss"] / s["usual_loss"] if s["usual_loss"] else s["loss"] for s in samples]
    distances = [
        max(pair) for pair in zip(_distances(relative), _distances([s["gradient_norm"] for s in samples]), strict=True)
    ]
    judged = []
    for sample, distance in zip(samples, distances, strict=True):
        values = (sample["loss"], sample["gradient_norm"], *sample["metrics"].values())
        finite = all(map(math.isfinite, values))
        verdict = "not finite" if not finite else "far off" if distance > FAR_DEVIATIONS else "ordinary"
        plain = {name: _plain(value) for name, value in sample.items()}
        judged.append(plain | {"verdict": verdict, "_distance": distance})
    return judged


def _distances(values: Sequence[float]) -> list[float]:
    """Robust standard deviations of each value's logarithm above the median; 0 of what has no logarithm."""
    logs = [math.log(value) if math.isfinite(value) and value > 0.0 else None for value in values]
    known = [log for log in logs if log is not None]
    if not known:
        return [0.0] * len(values)
    median = statistics.median(known)
    spread = max(NORMAL_MAD * statistics.median(abs(log - median) for log in known), LEAST_DEVIATION)
    return [0.0 if log is None else (log - median) / spread for log in logs]


def _plain(value: Any) -> Any:
    """The same with "nan" and "inf" where JSON has no number."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
