"""The paper's central experiment (arXiv:2112.10752, section 4.1, Figures 6 and 7) at the scale of two CPU cores.

Diffusion models of the same size in the latent spaces of f = 1 (pixels), 2, 4, 8 and 16 train on OpenMoji at 64 px for
the same time. Their samples' distance from the data is measured after each of equal parts of that time (Figure 6), and
at the end for several numbers of DDIM steps over the throughput of sampling (Figure 7). All of it is what a user has:
the steps are `ldm-scale` commands, and each begins only if its result is not there, so that the same call goes on after
an interruption.

    ldm-scale prepare openmoji --resolution 128 --subset no-skin-tones --out data/openmoji_no_skin_tones_128
    OMP_NUM_THREADS=1 python -m benchmarks.compression [--minutes 12] [--jobs 2] [--runs runs/compression] [--out DIR]

A run saves by the clock and is ended, as by Ctrl-C, when it has trained long enough. The figures carry the seconds of
training steps, as the run itself counts them: first stage and evaluation are not in them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.compression_plots import Point, plot_over_sampling, plot_over_training
from benchmarks.measured import RESULTS, make_folder, write_results
from ldm_scale.__main__ import run_command
from ldm_scale.config.compose import load_config
from ldm_scale.engine.rank_files import complete_folders, images_of, read_manifest
from ldm_scale.evaluation.sweep import write_csv
from ldm_scale.planning.flops import measure_run

FACTORS = (1, 2, 4, 8, 16)
DATA = "data/openmoji_no_skin_tones_128/manifest.json"
STAGE_1_IMAGES = 10_000  # before the discriminator is felt: its share in so short a training is small
CROPS = ("--resolution", "64", "--crops", "4", "--crop-scale-min", "0.85")
SWEPT_STEPS = (5, 10, 20, 50)  # of DDIM
POINT_STEPS = 20
SAMPLES = 256
TIME_TOLERANCE = 0.05  # of a model's training, and between models: the wall's clock saves, with loading and saving


@dataclass(frozen=True)
class Study:
    """What all five have in common."""

    runs: Path
    minutes: float
    points: int  # evaluations over the training
    samples: int
    data: str
    stage_1_images: int
    steps: tuple[int, ...]  # of DDIM, for the sampling throughputs

    def folder(self, factor: int, what: str) -> Path:
        """Where one of the models' results lie."""
        return self.runs / f"f{factor}" / what

    def checkpoints(self, factor: int) -> list[Path]:
        """Those of a model that are evaluated: nearest to equal parts of the time. None before it is trained.

        An interruption leaves checkpoints at any time, which are passed over.
        """
        seconds = {
            path: read_manifest(path)["state"]["training_s"]
            for path in complete_folders(self.folder(factor, "run") / "checkpoints")
        }
        if max(seconds.values(), default=0.0) < (1 - TIME_TOLERANCE) * 60 * self.minutes:
            return []
        wanted = [60 * self.minutes * (part + 1) / self.points for part in range(self.points)]
        chosen = {min(seconds, key=lambda path: abs(seconds[path] - target)) for target in wanted}
        return sorted(chosen, key=images_of)


def main(argv: Sequence[str]) -> int:
    """0 when table, plots and JSON are written; 1 if a command failed, whose log is named."""
    arguments = _arguments(argv)
    study = Study(
        arguments.runs,
        arguments.minutes,
        arguments.points,
        arguments.samples,
        arguments.data,
        arguments.stage_1_images,
        tuple(arguments.steps),
    )
    factors = tuple(arguments.factor or FACTORS)
    try:
        cores: SimpleQueue[int] = SimpleQueue()
        for core in sorted(os.sched_getaffinity(0)):
            cores.put(core)
        with (
            ThreadPoolExecutor(arguments.jobs, initializer=_keep_to_a_core, initargs=(cores,)) as pool,
            tqdm(total=len(factors), unit="model") as bar,
        ):
            for _ in pool.map(lambda factor: (make(study, factor), bar.update()), factors):
                pass
    except subprocess.CalledProcessError as error:
        print(
            f"error: {shlex.join(map(str, error.cmd))} ended with {error.returncode}: {error.output}", file=sys.stderr
        )
        return 1
    models = {f"f{factor}": about(study, factor) for factor in factors}
    if unequal := unequal_times(models, study):
        print(f"error: {unequal}", file=sys.stderr)
        return 1
    training = [point for factor in factors for point in training_points(study, factor)]
    sampling = [point for factor in factors for point in sampling_points(study, factor)]
    print(table(models, training))
    write_csv([*map(vars, training), *map(vars, sampling)], arguments.out / "compression.csv")
    plot_over_training(training, arguments.out / "compression_training.png")
    plot_over_sampling(sampling, arguments.out / "compression_sampling.png")
    samples_sheet(study, factors, arguments.out / "compression_samples.png")
    rows = {"models": models, "training": [*map(vars, training)], "sampling": [*map(vars, sampling)]}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(study).items()}
    settings |= {"jobs": arguments.jobs, "crops": CROPS, "steps_of_points": POINT_STEPS}
    write_results(arguments.out, "compression", torch.device("cpu"), {"settings": settings} | rows)
    return 0


def _keep_to_a_core(cores: SimpleQueue[int]) -> None:
    """Nothing; what this thread starts has one core, and so one thread."""
    os.sched_setaffinity(0, {cores.get()})


def make(study: Study, factor: int) -> None:
    """Nothing; first stage, latents, training and evaluations of a model are there. What is there already stays."""
    experiment = f"openmoji_ldm{factor}_small"
    artifact = _first_stage(study, factor)
    latents = study.folder(factor, "latents")
    if not (latents / "manifest.json").is_file():
        _run(study, factor, "encode", artifact, study.data, "--out", latents, *CROPS)
    common = (f"experiment={experiment}", f"artifact={artifact}", f"data.manifest={latents / 'manifest.json'}")
    common = (*common, "data.num_workers=0", "train.device=cpu")
    _train(study, factor, *common)
    measured = ("--data", study.data, "--split", "train", "--num-images", study.samples, "--batch", "64")
    measured = (*measured, "--reference", study.data, "--reference-split", "train", "--device", "cpu")
    for checkpoint in study.checkpoints(factor):
        out = study.folder(factor, "over_training") / checkpoint.name
        if not (out / "result.json").is_file():
            _run(study, factor, "evaluate", "diffusion", checkpoint, *measured, "--steps", POINT_STEPS, "--out", out)
    sweep = study.folder(factor, "sweep")
    last = study.checkpoints(factor)[-1]
    _run(study, factor, "evaluate", "sweep", last, *measured, "--steps", *study.steps, "--out", sweep)
    reconstructed = study.folder(factor, "reconstructions")
    if factor > 1 and not (reconstructed / "result.json").is_file():
        _run(study, factor, "evaluate", "autoencoder", artifact, "--data", study.data, "--out", reconstructed)


def training_points(study: Study, factor: int) -> list[Point]:
    """Figures of each checkpoint, over the time that its run had spent in steps."""
    points = []
    for checkpoint in study.checkpoints(factor):
        document = json.loads((study.folder(factor, "over_training") / checkpoint.name / "result.json").read_text())
        seconds = read_manifest(checkpoint)["state"]["training_s"]
        points.append(_point(factor, document, images_of(checkpoint), seconds))
    return sorted(points, key=lambda point: point.images)


def sampling_points(study: Study, factor: int) -> list[Point]:
    """Figures of the trained model for each number of steps."""
    last = study.checkpoints(factor)[-1]
    seconds = read_manifest(last)["state"]["training_s"]
    cells = sorted(study.folder(factor, "sweep").glob("cells/*/result.json"))
    documents = [json.loads(cell.read_text()) for cell in cells]
    points = [_point(factor, document, images_of(last), seconds) for document in documents]
    return sorted(points, key=lambda point: point.steps)


def about(study: Study, factor: int) -> dict[str, Any]:
    """A model's size, its first stage, and what both took."""
    size = measure_run(load_config([f"experiment=openmoji_ldm{factor}_small"]))
    last = study.checkpoints(factor)[-1]
    found = {
        "factor": factor,
        "latent_shape": list(size.latent_shape),
        "unet_parameters": size.trained.parameters,
        "unet_forward_flops": size.trained.forward_flops,
        "autoencoder_parameters": size.autoencoder.parameters,
        "decode_flops": size.decoder.forward_flops,
        "images": images_of(last),
        "training_s": read_manifest(last)["state"]["training_s"],
    }
    if factor == 1:
        return found
    first = json.loads((study.folder(factor, "stage1") / "result.json").read_text())
    judged = json.loads((study.folder(factor, "reconstructions") / "result.json").read_text())["figures"]
    own = {"images": first["images"], "training_s": first["training_s"], "psnr_db": judged["psnr_db"]["mean"]}
    return found | {"first_stage": own | {"frechet_paired": judged["frechet"]["distance"]}}


def unequal_times(models: dict[str, dict[str, Any]], study: Study) -> str | None:
    """Why the models' trainings cannot be compared, and what to do; None if they took equally long."""
    seconds = {name: model["training_s"] for name, model in models.items()}
    short, long = min(seconds, key=seconds.__getitem__), max(seconds, key=seconds.__getitem__)
    if seconds[long] <= (1 + TIME_TOLERANCE) * seconds[short]:
        return None
    off = max((short, long), key=lambda name: abs(seconds[name] - 60 * study.minutes))
    return (
        f"{long} trained for {seconds[long]:.0f} s and {short} for {seconds[short]:.0f} s: equal time is within "
        f"{TIME_TOLERANCE:.0%}; remove run, over_training and sweep in {study.runs / off}; call again"
    )


def table(models: dict[str, dict[str, Any]], training: Sequence[Point]) -> str:
    """A line for each model, with the distance at the end of its training."""
    lines = [f"{'f':>4}{'latents':>12}{'UNet':>8}{'GFLOP':>8}{'images':>10}{'seconds':>9}{'distance':>10}{'95%':>16}"]
    for model in models.values():
        last = [point for point in training if point.factor == model["factor"]][-1]
        shape = "x".join(map(str, model["latent_shape"]))
        interval = "-" if last.low is None or last.high is None else f"{last.low:.1f} to {last.high:.1f}"
        lines.append(
            f"{model['factor']:>4}{shape:>12}{model['unet_parameters'] / 1e6:>7.2f}M"
            f"{model['unet_forward_flops'] / 1e9:>8.3f}{model['images']:>10,}{model['training_s']:>9.0f}"
            f"{last.distance:>10.1f}{interval:>16}"
        )
    return "\n".join(lines)


def samples_sheet(study: Study, factors: Sequence[int], path: Path) -> None:
    """Nothing; the same seeds' samples of all models, one below the other, coarsest first stage last."""
    sheets = []
    for factor in factors:
        last = max(study.folder(factor, "over_training").iterdir(), key=lambda folder: images_of(folder))
        with Image.open(last / "samples.png") as sheet:
            sheets.append(sheet.convert("RGB").crop((0, 0, sheet.width, min(sheet.height, 140))))
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    whole.save(path)


def _first_stage(study: Study, factor: int) -> Path:
    """The artifact; its latents are the pixels themselves at f = 1."""
    if factor == 1:
        artifact = study.folder(1, "artifact")
        if not artifact.is_dir():
            network = ("experiment=identity_f1", "--random-init", "--to", "safetensors")
            _run(study, factor, "export", *network, "--out", artifact, "data.resolution=64")
        return artifact
    run = study.folder(factor, "stage1")
    if not (run / "result.json").is_file():
        length = (f"train.total_images={study.stage_1_images}", "train.sample_every_images=0")
        what = (f"experiment=openmoji_kl_f{factor}_small", f"data.manifest={study.data}", f"run_dir={run}")
        _run(study, factor, "train", *what, *length, "train.validate_every_images=0", "train.device=cpu")
    return run / "artifact"


def _train(study: Study, factor: int, *words: str) -> None:
    """Nothing; the run has trained as long as asked, and is ended. One that was interrupted goes on."""
    if study.checkpoints(factor):
        return
    keys = ("train.total_images=1_000_000_000", f"train.checkpoint_every_s={60 * study.minutes / study.points}")
    keys = (*keys, "train.keep_checkpoints=1_000", f"run_dir={study.folder(factor, 'run')}")
    command, log = _command(study, factor, "train", *words, *keys)
    with log.open("a") as stream, subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT) as process:
        try:
            while process.poll() is None and not study.checkpoints(factor):
                time.sleep(0.5)
        finally:
            process.terminate()
    if not study.checkpoints(factor):
        raise subprocess.CalledProcessError(process.returncode, command[2:], output=f"see {log}")


def _command(study: Study, factor: int, *words: object) -> tuple[list[str], Path]:
    """An `ldm-scale` command, and the log that it is noted in."""
    log = study.folder(factor, "log.txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ldm_scale", *map(str, words)]
    with log.open("a") as stream:
        stream.write(f"\n$ {shlex.join(command[2:])}\n")
    return command, log


def _run(study: Study, factor: int, *command: object) -> None:
    """Nothing; an `ldm-scale` command, whose words go to a log.

    Raises: CalledProcessError, whose output is where the log lies.
    """
    words, log = _command(study, factor, *command)
    with log.open("a") as stream:
        code = subprocess.run(words, stdout=stream, stderr=subprocess.STDOUT).returncode
    if code:
        raise subprocess.CalledProcessError(code, words[2:], output=f"see {log}")


def _point(factor: int, document: dict[str, Any], images: int, training_s: float) -> Point:
    samples, model = document["figures"]["samples"], document["model"]
    interval = samples["frechet"].get("interval") or {}
    return Point(
        factor=factor,
        images=images,
        training_s=training_s,
        steps=model["sampling"]["num_steps"],
        samples_per_s=document["machine"]["sampling_images_per_s"],
        name=samples["frechet"]["name"],
        distance=samples["frechet"]["value"],
        low=interval.get("low"),
        high=interval.get("high"),
        precision=samples["precision"]["value"],
        recall=samples["recall"]["value"],
    )


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Downsampling factors at equal UNet size and equal training time.")
    parser.add_argument("--minutes", type=float, default=12.0, help="of training steps for each model (12)")
    parser.add_argument("--points", type=int, default=6, help="evaluations over each training (6)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"of an evaluation ({SAMPLES})")
    parser.add_argument("--factor", type=int, choices=FACTORS, action="append", help="default: all")
    parser.add_argument("--steps", type=int, nargs="+", default=SWEPT_STEPS, help="of DDIM, at the end (5 10 20 50)")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, one core each (1)")
    parser.add_argument("--data", default=DATA, help=f"manifest of OpenMoji ({DATA})")
    parser.add_argument(
        "--stage-1-images", type=int, default=STAGE_1_IMAGES, help=f"of each autoencoder ({STAGE_1_IMAGES})"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/compression"), help="folder of all that is made")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON, CSV and pictures")
    arguments = parser.parse_args(argv)
    if not Path(arguments.data).is_file():
        parser.error(
            f"--data {arguments.data} is not there; make it: ldm-scale prepare openmoji --resolution 128 "
            "--subset no-skin-tones --out data/openmoji_no_skin_tones_128"
        )
    make_folder(arguments.out)
    if arguments.jobs > len(os.sched_getaffinity(0)):
        parser.error(f"--jobs {arguments.jobs}: each takes a core, and there are {len(os.sched_getaffinity(0))}")
    for name in ("minutes", "points", "samples", "jobs", "stage_1_images"):
        if not 0 < getattr(arguments, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be above 0 and finite")
    if min(arguments.steps) < 1:
        parser.error(f"--steps {min(arguments.steps)}: must be at least 1")
    return arguments


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
