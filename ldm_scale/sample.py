"""Draws images from a trained latent diffusion model: `ldm-scale sample SOURCE --prompt ... --out grid.png`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """0 after the grid (and, if asked for, each image) was written."""
    parser = argparse.ArgumentParser(
        prog="ldm-scale sample",
        description="Draws images for prompts. Image i depends on seed + i, its prompt and the model alone: not on the "
        "batch, the device or the other images.",
    )
    parser.add_argument("source", type=Path, help="a run, a checkpoint or a diffusion artifact")
    parser.add_argument("--prompt", action="append", default=[], help="a caption; may be given several times")
    parser.add_argument("--prompts-file", type=Path, help="a text file with one caption per line")
    parser.add_argument("--num-images", type=int, default=None, help="images in all (default: one per prompt)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image")
    parser.add_argument("--batch", type=int, default=16, help="images sampled at once")
    parser.add_argument("--sampler", choices=("ddim", "ddpm"), help="default: the model's")
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale, 1 = none; default: the model's")
    parser.add_argument("--eta", type=float, help="stochasticity of DDIM, 0 to 1; default: the model's")
    parser.add_argument("--weights", choices=("raw", "ema"), help="default: ema where the source has it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="picture with all images and their prompts")
    parser.add_argument("--images-dir", type=Path, help="also write every image as a PNG of its own here")
    arguments = parser.parse_args(argv)
    from ldm_scale.operations.sample import sample_to_files

    sample_to_files(arguments)
    return 0
