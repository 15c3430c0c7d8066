"""What the demonstration leaves for others: pictures, curves, figures and weights, in files small enough to carry."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import curves
from benchmarks.gpu_demo import weights
from benchmarks.gpu_demo.stages import Plan, Stage
from benchmarks.kernels.device import environment
from ldm_scale.data import build_loader
from ldm_scale.evaluation.generation import captioned_grid
from ldm_scale.evaluation.noise_levels import NUM_BINS, log_snr_ranges
from ldm_scale.interchange.artifact import DiffusionArtifact, read_diffusion_artifact
from ldm_scale.interchange.load import LoadedDiffusion, read_source
from ldm_scale.operations.sample import sample_images
from ldm_scale.telemetry.tensorboard import read_metrics

NUM_SHOWN, COLUMNS = 32, 8
SCALARS = ("loss/reconstruction", "validation/psnr_db", "loss/discriminator")
DIFFUSION_SCALARS = ("loss", "validation/raw/mean", "validation/ema/mean")


def write(results: Path, stages: Sequence[Stage], plan: Plan, finished: bool) -> None:
    """Writes all files. `stages`: the autoencoder, then the diffusion model, which has a checkpoint at least."""
    results.mkdir(parents=True, exist_ok=True)
    first, second = stages
    device = torch.device(second.config.train.device)
    artifact = read_source(second.run_dir)
    assert isinstance(artifact, DiffusionArtifact), "the second stage is a diffusion model"
    weights.write(results / "model", weights.rounded(artifact))
    # What is shown is what others load.
    model = LoadedDiffusion(read_diffusion_artifact(results / "model")).to(device)
    captions = shown_captions(second)
    samples = sample_images(model, captions, range(len(captions)), batch=len(captions), description="samples")
    captioned_grid(samples, captions, COLUMNS, results / "grid.png", side_px=model.resolution)
    curves.plot([first.run_dir, second.run_dir], [*SCALARS, *DIFFUSION_SCALARS], results / "curves.png")
    report = {
        "benchmark": "gpu_demo",
        "finished": finished,
        "environment": environment(device),
        "plan": dataclasses.asdict(plan),
        "stages": {stage.name: _stage(stage, plan) for stage in stages},
        "psnr_db": _last(first, {"heldout": "validation/psnr_db", "bicubic": "validation/bicubic_psnr_db"}),
        "losses": _losses(second, model),
        "model": {
            "weights": artifact.provenance["weights"],
            "images": artifact.provenance["images"],
            "content_sha256": model.content_hash,
        },
        "sampling": dataclasses.asdict(model.sampling),
    }
    (results / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (results / "report.md").write_text(_markdown(report))


def shown_captions(stage: Stage) -> list[str]:
    """Captions of the grid: of the first training images, without repetitions."""
    loader = build_loader(
        dataclasses.replace(stage.config.data, num_workers=0),
        seed=stage.config.train.seed,
        global_batch=NUM_SHOWN,
        micro_batch=NUM_SHOWN,
        rank=0,
        world_size=1,
        augment=False,
    )
    return list(dict.fromkeys(next(iter(loader)).captions))


def _stage(stage: Stage, plan: Plan) -> dict[str, Any]:
    result, planned = stage.result or {}, plan.stages.get(stage.name)
    return {
        "experiment": stage.config.experiment,
        "images": result.get("images", stage.images),
        "planned_images": planned.total_images if planned else None,
        "measured_images_per_s": planned.images_per_s if planned else None,
        "steps_s": result.get("training_s"),  # in steps alone, without loading, validation and pictures
        "findings": result.get("findings"),
    }


def _losses(stage: Stage, model: LoadedDiffusion) -> dict[str, Any]:
    """Mean squared error of the network's output by part of the noise range, at the last validation."""
    kinds = {
        kind: list(_last(stage, {str(i): f"validation/{kind}/bin{i}" for i in range(NUM_BINS)}).values())
        for kind in ("raw", "ema", "zero", "linear")
    }
    ranges = [list(values) for values in log_snr_ranges(model.process)]
    return {"log_snr": ranges} | {kind: values for kind, values in kinds.items() if values[0] is not None}


def _last(stage: Stage, names: Mapping[str, str]) -> dict[str, float | None]:
    """The last value of each scalar of the run; None where it has none yet."""
    rows = read_metrics(stage.run_dir)
    return {key: next((row[name] for row in reversed(rows) if name in row), None) for key, name in names.items()}


def _markdown(report: dict[str, Any]) -> str:
    machine, losses, psnr = report["environment"], report["losses"], report["psnr_db"]
    lines = [f"# GPU demo: OpenMoji at 128 px{'' if report['finished'] else ' (stopped before its end)'}", ""]
    lines += [f"{machine['device']}, {machine['date']}, torch {machine['torch']}.", ""]
    for name, stage in report["stages"].items():
        lines.append(
            f"- {name}: {stage['images']} of {stage['planned_images']} images, "
            f"{_number(stage['measured_images_per_s'], 0)} images/s at its beginning"
        )
    lines.append(f"- held-out PSNR {_number(psnr['heldout'], 2)} dB (bicubic {_number(psnr['bicubic'], 2)} dB)")
    model = report["model"]
    lines += [f"- model/: {model['weights']} weights after {model['images']} images, in float16", ""]
    kinds = [kind for kind in losses if kind != "log_snr"]
    lines += ["Loss of the network's output by noise (log-SNR):", "", f"| log-SNR | {' | '.join(kinds)} |"]
    lines.append("|---" * (len(kinds) + 1) + "|")
    for i, (high, low) in enumerate(losses["log_snr"]):
        values = " | ".join(_number(losses[kind][i], 4) for kind in kinds)
        lines.append(f"| {high:.1f} to {low:.1f} | {values} |")
    lines += ["", "Pictures: OpenMoji (CC BY-SA 4.0), https://openmoji.org", ""]
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "not measured yet" if value is None else f"{value:.{digits}f}"
