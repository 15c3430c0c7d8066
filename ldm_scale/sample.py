"""Draws images from a trained latent diffusion model: `ldm-scale sample SOURCE --prompt ... --out grid.png`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm_scale.command_line import Parser, output_path


def main(argv: Sequence[str] | None = None) -> int:
    """0 after the grid (and, if asked for, each image) was written."""
    arguments = _parser().parse_args(argv)
    # The libraries behind some models print notices when they are imported; stdout belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        from ldm_scale.operations.sample import sample_to_files

        document = sample_to_files(arguments)
    if arguments.json:
        print(json.dumps(document, allow_nan=False))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ldm-scale sample",
        description="Draws images for what the model is conditioned on; it says what it needs. Image i depends on seed "
        "+ i, on the i-th of every list below (shorter lists are repeated) and on the model alone: not on the batch, "
        "the device or the other images. docs/sampling.md has examples.",
    )
    parser.add_argument(
        "source",
        type=Path,
        help="a run, a checkpoint, a diffusion artifact, or a folder of diffusers, whoever wrote it",
    )
    parser.add_argument("--num-images", type=int, help="images in all (default: the longest list)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image")
    parser.add_argument("--batch", type=int, default=16, help="images sampled at once")
    parser.add_argument(
        "--weights", metavar="raw|ema|ema=STD", help="of a checkpoint; default: its first average, or raw"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--out", type=output_path, default=Path("grid.png"), help="picture with all images and their prompts"
    )
    parser.add_argument("--images-dir", type=output_path, help="also write every image as a PNG of its own here")
    parser.add_argument(
        "--strip",
        type=output_path,
        metavar="FILE",
        help="also write what the first images were taken for over the steps",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object about what was made")
    _add_conditions(parser.add_argument_group("what the images show (each may be given several times)"))
    _add_picture(parser.add_argument_group("size and start"))
    _add_sampler(parser.add_argument_group("sampler"))
    _add_guides(parser.add_argument_group("guidance by another model (any model, an unconditional one too)"))
    return parser


def _add_conditions(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", action="append", default=[], help='a caption; "" = none')
    group.add_argument("--prompts-file", type=Path, help="a text file with one caption per line")
    group.add_argument("--class", dest="classes", action="append", default=[], metavar="NAME|NUMBER|none")
    group.add_argument("--layout", type=Path, action="append", default=[], metavar="JSON", help="objects with boxes")
    group.add_argument("--map", type=Path, action="append", default=[], metavar="PNG", help="labels, 255 = unknown")
    group.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="inpainting: the image to fill; super-resolution: the small one",
    )
    group.add_argument("--mask", type=Path, action="append", default=[], metavar="FILE", help="white = fill")


def _add_picture(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--size", metavar="HxW", help="pixels; default: of the image or map, or as in training")
    group.add_argument("--tile", type=int, metavar="PIXELS", help="side of the windows in which the networks work")
    group.add_argument("--tile-overlap", type=int, metavar="PIXELS", help="default: a quarter of the tile")
    group.add_argument("--tile-batch", type=int, metavar="N", help="windows given to the UNet at once; default: 8")
    group.add_argument("--init-image", type=Path, action="append", default=[], metavar="FILE", help="to start from")
    group.add_argument("--strength", type=float, help="with --init-image: above 0 (keep it) to 1 (ignore it)")


def _add_sampler(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--sampler",
        choices=("ddim", "ddpm", "plms", "dpmpp_2m", "dpmpp_2m_sde", "euler", "heun"),
        help="default, here and below: the model's",
    )
    group.add_argument("--steps", type=int)
    group.add_argument("--eta", type=float, help="stochasticity of DDIM, 0 to 1")
    group.add_argument("--guidance", type=float, help="classifier-free guidance scale, 1 = none")
    group.add_argument(
        "--guidance-rescale", type=float, help="share of the output's deviation that is set back, 0 to 1"
    )
    group.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LO", "HI"), help="noise levels sigma / alpha to guide at"
    )
    group.add_argument("--negative-prompt", help="a caption to lead away from, in place of the empty one")


def _add_guides(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--clip-guidance", metavar="TEXT", help="by CLIP's agreement with a text")
    group.add_argument("--clip-model", metavar="NAME", help="OpenCLIP's name; default: ViT-B-32")
    group.add_argument(
        "--clip-weights", metavar="FILE|NAME", help="a file, or OpenCLIP's name; default: laion2b_s34b_b79k"
    )
    group.add_argument("--imagenet-guidance", metavar="NAME|NUMBER", help="by the class of EfficientNet-Lite0")
    group.add_argument("--classifier", type=Path, metavar="RUN", help="by a run of stage=classifier; takes --class")
    group.add_argument(
        "--classifier-weights", metavar="raw|ema|ema=STD", help="of its checkpoint; default: its first average, or raw"
    )
    group.add_argument("--guide-scale", type=float, help="factor of the gradient; default: 1")
