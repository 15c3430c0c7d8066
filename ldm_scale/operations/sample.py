"""Sampling from the command line: prompts and seeds to pictures."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm_scale.errors import ConfigError
from ldm_scale.evaluation.generation import captioned_grid
from ldm_scale.interchange.load import LoadedDiffusion, load_diffusion
from ldm_scale.telemetry.log import get_logger


def sample_to_files(arguments: argparse.Namespace) -> None:
    """Nothing; writes the grid and, with --images-dir, each image.

    Raises: ConfigError for prompts or numbers that cannot be used; CheckpointError for the source.
    """
    prompts = _prompts(arguments)
    if arguments.batch < 1:
        raise ConfigError(f"--batch {arguments.batch}: must be at least 1")
    _check_numbers(arguments)
    if arguments.out.is_dir():
        raise ConfigError(
            f"--out {arguments.out} is a folder; give the name of a picture, such as {arguments.out}/grid.png"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    model = load_diffusion(arguments.source, arguments.weights)
    wanted = arguments.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda but torch sees no CUDA device; use --device auto or cpu")
    model.to("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    images = sample_images(
        model,
        prompts,
        range(arguments.seed, arguments.seed + len(prompts)),
        batch=arguments.batch,
        num_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        eta=arguments.eta,
        sampler=arguments.sampler,
    )
    captioned_grid(images, prompts, columns=min(8, len(prompts)), path=arguments.out)
    log = get_logger(0)
    log.info(f"wrote {arguments.out} ({len(prompts)} images)")
    if arguments.images_dir is not None:
        _write_each(arguments.images_dir, images, prompts, arguments.seed)
        log.info(f"wrote {len(prompts)} images into {arguments.images_dir}")


def sample_images(
    model: LoadedDiffusion,
    captions: Sequence[str],
    seeds: Sequence[int],
    *,
    batch: int,
    description: str = "sample",
    **options: object,
) -> Tensor:
    """Images for captions in batches, with a progress bar; options as of `LoadedDiffusion.sample`.

    Shapes: returns (len(captions), 3, H, W) in [-1, 1] on the CPU.
    """
    steps = options.get("num_steps") or model.sampling.num_steps
    images = []
    with tqdm(total=len(captions) * int(str(steps)), desc=description, unit="step", mininterval=1.0) as bar:
        for start in range(0, len(captions), batch):
            part = slice(start, start + batch)
            count = len(captions[part])
            samples = model.sample(
                list(captions[part]),
                list(seeds[part]),
                progress=lambda _, count=count: bar.update(count),  # type: ignore[misc]
                **options,  # type: ignore[arg-type]
            )
            images.append(samples.float().cpu())
    return torch.cat(images)


def _check_numbers(arguments: argparse.Namespace) -> None:
    if arguments.guidance is not None and not 0.0 <= arguments.guidance < math.inf:
        raise ConfigError(
            f"--guidance {arguments.guidance}: must be a number from 0 (no caption) upwards; 1 is no guidance"
        )
    if arguments.steps is not None and arguments.steps < 1:
        raise ConfigError(f"--steps {arguments.steps}: must be at least 1")
    if arguments.eta is not None and not 0.0 <= arguments.eta <= 1.0:
        raise ConfigError(f"--eta {arguments.eta}: must be between 0 (deterministic) and 1")


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompts_file is not None:
        try:
            text = arguments.prompts_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--prompts-file {arguments.prompts_file} cannot be read as UTF-8 text: {error}"
            ) from error
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("no prompt given; use --prompt TEXT (as often as you like) or --prompts-file FILE")
    count = len(prompts) if arguments.num_images is None else arguments.num_images
    if count < 1:
        raise ConfigError(f"--num-images {count}: must be at least 1")
    return [prompts[i % len(prompts)] for i in range(count)]


def _write_each(directory: Path, images: Tensor, prompts: Sequence[str], seed: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i, prompt in enumerate(prompts):
        words = re.sub(r"[^A-Za-z0-9]+", "-", prompt).strip("-")[:40] or "empty"
        Image.fromarray(pixels[i]).save(directory / f"{seed + i:06d}-{words}.png")
