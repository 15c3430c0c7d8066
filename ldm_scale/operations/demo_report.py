"""What the demonstration's models can do, measured and written down: report.json, report.md, samples.png.

Held-out emoji serve the autoencoder. The captions' subset has none: the diffusion model is asked to give back, for each
caption, the distribution of its augmented picture, so real images are augmented renders of the subset.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.convert import config_from_dict
from ldm_scale.config.schema import Config, DataConfig
from ldm_scale.data import Batch, build_loader
from ldm_scale.engine.checkpoint import latest_checkpoint
from ldm_scale.engine.rank_files import read_manifest
from ldm_scale.errors import CheckpointError
from ldm_scale.evaluation.features import EfficientNetFeatures, FeatureSpace, frechet_from_features
from ldm_scale.evaluation.generation import captioned_grid, frechet_closure
from ldm_scale.evaluation.noise_levels import NUM_BINS
from ldm_scale.evaluation.reconstruction import evaluate_reconstruction
from ldm_scale.interchange.artifact import DiffusionArtifact
from ldm_scale.interchange.load import LoadedDiffusion, load_autoencoder, read_source
from ldm_scale.models.build import build_seeded
from ldm_scale.operations.sample import sample_images
from ldm_scale.telemetry.log import get_logger
from ldm_scale.telemetry.side_files import read_record
from ldm_scale.telemetry.tensorboard import read_metrics

NUM_SAMPLES = 256
NUM_SHOWN = 64
SAMPLING_STEPS = 20
SAMPLING_BATCH = 64


def write_report(out: Path, diffusion_run: Path, autoencoder_run: Path, manifests: dict[str, Path]) -> dict[str, Any]:
    """The report, made now, or read where it belongs to these runs' checkpoints.

    `manifests`: "all" emoji (the feature space is fitted on them), the "autoencoder"'s data, those with "captions".
    """
    checkpoint = latest_checkpoint(diffusion_run / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{diffusion_run} has no checkpoint to report on; run the demo again")
    artifact = read_source(checkpoint)
    assert isinstance(artifact, DiffusionArtifact), "a stage-2 run holds a diffusion model"
    model = LoadedDiffusion(artifact)
    path = out / "report.json"
    written = read_record(path, lambda r: r if r["model_hash"] == model.content_hash and r["summary"] else None)
    if written is not None and (out / "samples.png").is_file():
        get_logger(0).info(f"{path} belongs to these runs: reused")
        return written
    get_logger(0).info("measuring: reconstructions, losses per noise level, Frechet distances of samples")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    config = config_from_dict(read_manifest(checkpoint)["config"])
    samples, captions, report = _generation(model, _untrained(artifact).to(model.device), config, manifests)
    report |= {
        "model_hash": model.content_hash,
        "images": {"autoencoder": _images(autoencoder_run), "diffusion": _images(diffusion_run)},
        "reconstruction": _reconstruction(autoencoder_run, config, manifests["autoencoder"]),
        "losses": _losses(diffusion_run),
    }
    report["summary"] = _summary(report)
    out.mkdir(parents=True, exist_ok=True)
    _write_picture(out / "samples.png", samples, captions, config, manifests["captions"])
    (out / "report.md").write_text(_markdown(report))
    path.write_text(json.dumps(report, indent=2) + "\n")
    return report


def _write_picture(path: Path, samples: Tensor, captions: list[str], config: Config, manifest: Path) -> None:
    """The first sample of each of the first captions beside its real image."""
    data = dataclasses.replace(config.data, manifest=str(manifest), num_workers=0)
    shown = captions[:NUM_SHOWN]
    real = torch.cat([batch.images for batch in itertools.islice(_one_pass(data, "train"), NUM_SHOWN // 64)])
    panels = {"real image": real[: len(shown)], "sample": samples[: len(shown)]}
    captioned_grid(panels, shown, columns=8, path=path, side_px=64)


def _generation(
    model: LoadedDiffusion, untrained: LoadedDiffusion, config: Config, manifests: dict[str, Path]
) -> tuple[Tensor, list[str], dict[str, Any]]:
    """Samples of the trained model, the distinct captions (in the samples' order), and distances."""
    subset = dataclasses.replace(config.data, manifest=str(manifests["captions"]), num_workers=0)
    captions = [caption for batch in _one_pass(subset, "train") for caption in batch.captions]
    prompts = list(itertools.islice(itertools.cycle(captions), NUM_SAMPLES))
    options = {"batch": SAMPLING_BATCH, "num_steps": SAMPLING_STEPS, "eta": 0.0, "sampler": "ddim"}
    samples = sample_images(model, prompts, range(NUM_SAMPLES), description="samples", **options)  # type: ignore[arg-type]
    noise = sample_images(untrained, prompts, range(NUM_SAMPLES), description="untrained samples", **options)  # type: ignore[arg-type]
    real_a, real_b = (_augmented(subset, seed) for seed in (1, 2))

    features = EfficientNetFeatures(model.device)
    everything = dataclasses.replace(subset, manifest=str(manifests["all"]))
    all_images = torch.cat([b.images for split in ("train", "heldout") for b in _one_pass(everything, split)])
    space = FeatureSpace.fit(features(all_images))
    reference = features(real_a)
    distances = {
        name: frechet_from_features(features(images), reference, space)
        for name, images in (
            ("real_against_real", real_b),
            ("reconstructions", _reconstructed(model, real_b)),
            ("trained", samples),
            ("untrained", noise),
        )
    }
    report = {
        "frechet": {
            "name": space.name,
            "protocol": features.protocol
            | {
                "fitted_on": f"{space.num_fitted} emoji",
                "explained_variance": round(space.explained_variance, 4),
                "samples": f"{NUM_SAMPLES}, DDIM, {SAMPLING_STEPS} steps, guidance {model.sampling.guidance_scale:g}",
                "real": f"{NUM_SAMPLES} augmented renders of the subset, augmentation seeds 1 and 2",
            },
            "distances": distances,
            "closed": frechet_closure(distances["untrained"], distances["trained"], distances["real_against_real"]),
        }
    }
    return samples, captions, report


def _untrained(artifact: DiffusionArtifact) -> LoadedDiffusion:
    """The same model with random weights, on the same autoencoder."""
    fresh = build_seeded(
        lambda: LatentDiffusion(artifact.unet, artifact.conditioning, artifact.autoencoder.config.latent_channels),
        seed=0,
    )
    return LoadedDiffusion(dataclasses.replace(artifact, state=fresh.state_dict()))


def _reconstructed(model: LoadedDiffusion, images: Tensor) -> Tensor:
    """What the autoencoder leaves of the images: the best that samples in its latent space can be."""
    parts = [
        model.autoencoder.decode(model.autoencoder.encode(part.to(model.device))).clamp(-1, 1).cpu()
        for part in torch.split(images, SAMPLING_BATCH)
    ]
    return torch.cat(parts)


def _augmented(subset: DataConfig, seed: int) -> Tensor:
    """The first augmented renders of an endless pass over the subset."""
    loader = build_loader(
        subset, seed=seed, global_batch=64, micro_batch=64, rank=0, world_size=1, augment=True, split="train"
    )
    images: list[Tensor] = []
    for batch in itertools.islice(loader, NUM_SAMPLES // 64):
        images.append(batch.images)
    return torch.cat(images)


def _one_pass(data: DataConfig, split: str) -> Iterator[Batch]:
    yield from build_loader(
        data,
        split=split,
        seed=0,
        global_batch=64,
        micro_batch=64,
        rank=0,
        world_size=1,
        augment=False,
        num_epochs=1,
    )


def _reconstruction(run_dir: Path, config: Config, manifest: Path) -> dict[str, Any]:
    """Held-out PSNR of the artifact, and bicubic's."""
    autoencoder = load_autoencoder(run_dir / "artifact")
    data = dataclasses.replace(config.data, manifest=str(manifest), num_workers=0)
    result = evaluate_reconstruction(
        lambda x: autoencoder.decode(autoencoder.encode(x)),
        (batch.images for batch in _one_pass(data, "heldout")),
        autoencoder.config.downsampling_factor,
    )
    return dataclasses.asdict(result) | {"gain_db": result.gain_db}


def _losses(run_dir: Path) -> dict[str, list[float]]:
    """Loss in each range of timesteps at the end of training: raw, ema and predicting zero."""
    rows = [row for row in read_metrics(run_dir) if "validation/raw/mean" in row]
    if not rows:
        raise CheckpointError(f"{run_dir}/metrics.jsonl has no validation row; run the demo again")
    last = rows[-1]
    return {
        name: [last[f"validation/{name}/bin{i}"] for i in range(NUM_BINS)]
        for name in ("raw", "ema", "zero", "linear")
        if f"validation/{name}/bin0" in last
    }


def _images(run_dir: Path) -> int:
    path = run_dir / "result.json"
    images = read_record(path, lambda result: int(result["images"]))
    if images is None:
        raise CheckpointError(f"{path} is missing or damaged; run the demo again, which writes it anew")
    return images


def _summary(report: dict[str, Any]) -> dict[str, str]:
    """The figures that people look at first."""
    reconstruction, frechet = report["reconstruction"], report["frechet"]
    distances = frechet["distances"]
    losses = report["losses"]
    learned, zero = (sum(bins) / NUM_BINS for bins in (losses.get("ema", losses["raw"]), losses["zero"]))
    images = report["images"]
    return {
        "images seen by autoencoder, diffusion model": f"{images['autoencoder']}, {images['diffusion']}",
        "held-out PSNR": f"{reconstruction['psnr_db']:.2f} dB (bicubic {reconstruction['bicubic_psnr_db']:.2f} dB)",
        "eps-loss, mean over noise levels": f"{learned:.3f} (predicting zero {zero:.3f})",
        frechet["name"]: f"untrained {distances['untrained']:.1f}, trained {distances['trained']:.1f}, "
        f"real against real {distances['real_against_real']:.1f}: {frechet['closed']:.0%} of the way closed",
    }


def _markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["# Demo report", ""]
    lines += [f"- {name}: {value}" for name, value in report["summary"].items()]
    lines += ["", "## Loss of predicted noise by range of timesteps (least noisy first)", ""]
    losses = report["losses"]
    lines += ["| range | " + " | ".join(losses) + " |", "|---" * (len(losses) + 1) + "|"]
    lines += [
        f"| {i + 1} of {NUM_BINS} | " + " | ".join(f"{values[i]:.4f}" for values in losses.values()) + " |"
        for i in range(NUM_BINS)
    ]
    frechet = report["frechet"]
    lines += ["", f"## {frechet['name']}", "", "| images | distance to real images |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {value:.2f} |" for name, value in frechet["distances"].items()]
    lines += ["", f"Closed from untrained to real against real: {frechet['closed']:.1%}", ""]
    lines += [f"- {key}: {value}" for key, value in frechet["protocol"].items()]
    lines += ["", "Pictures: OpenMoji (CC BY-SA 4.0), https://openmoji.org", ""]
    return "\n".join(lines)
