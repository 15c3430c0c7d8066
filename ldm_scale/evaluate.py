"""`ldm-scale evaluate autoencoder | diffusion | images | sweep | compare | rate-distortion`: figures and protocol."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Run as a script by a launcher: see train.py.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ldm_scale.__main__ import run_command
from ldm_scale.command_line import Parser, output_path
from ldm_scale.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the figures were printed, as a table or as one JSON object."""
    given = sys.argv[1:] if argv is None else argv
    # The deepspeed launcher adds the rank as an argument beside the environment variables that we read.
    given = [argument for argument in given if not argument.startswith(("--local_rank", "--local-rank"))]
    arguments = _parser().parse_args(given)
    arguments.command = shlex.join(["ldm-scale", "evaluate", *given])
    run: Callable[[argparse.Namespace], tuple[dict[str, Any], str]] = arguments.run
    # The libraries behind some formats print notices when they are imported; stdout belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        outcome = _on_ranks(arguments, run) if arguments.action in _MEASURING else run(arguments)
    if outcome is None:
        return 0  # another rank prints
    document, text = outcome
    print(json.dumps(document, allow_nan=False) if arguments.json else text)
    return 0


_MEASURING = ("autoencoder", "diffusion", "images", "sweep")


def _on_ranks(
    arguments: argparse.Namespace, run: Callable[[argparse.Namespace], tuple[dict[str, Any], str]]
) -> tuple[dict[str, Any], str] | None:
    from ldm_scale.operations.evaluation_ranks import on_ranks

    return on_ranks(arguments, run)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ldm-scale evaluate",
        description="Measures trained models. Beside every figure stands the protocol that it was measured under; "
        "figures of different protocols are not compared. Under torchrun, deepspeed or srun the ranks share the "
        "images; with --out, what was measured before an interruption is not measured again.",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    output = Parser(add_help=False)
    output.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    _add_autoencoder(actions.add_parser("autoencoder", parents=[output], help="reconstructions of held-out images"))
    _add_diffusion(
        actions.add_parser(
            "diffusion",
            parents=[output],
            help="samples for what held-out images are conditioned on",
            description="Samples one image for the captions, classes, boxes, maps, small or masked images of each of a "
            "split's first images, made as in training, and measures: distance from the real images, and for each kind "
            "of conditioning whether the samples are what was asked for.",
        )
    )
    _add_images(
        actions.add_parser(
            "images",
            parents=[output],
            help="image files of any origin beside a reference set",
            description="Measures the image files of a folder, or the array of an NPZ file, beside a reference set: "
            "Frechet and kernel distance, precision, recall, density and coverage in features of EfficientNet-Lite0; "
            "with FID's own weights FID, KID and Inception score; with OpenCLIP's weights the CLIP score.",
        )
    )
    _add_sweep(
        actions.add_parser(
            "sweep",
            parents=[output],
            help="a diffusion model over guidance scales, steps and averages",
            description="Measures a model as `evaluate diffusion` does for every guidance scale, number of steps and "
            "average of its weights that are given, and writes quality against sampling throughput as a CSV and, as "
            "the paper's Figure 7, a plot. Called again, it goes on where it was; more values add cells.",
        )
    )
    compare = actions.add_parser("compare", parents=[output], help="several results side by side")
    compare.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="a result.json or its folder")
    compare.set_defaults(run=_compare)
    plot = actions.add_parser(
        "rate-distortion",
        parents=[output],
        help="distortion over the rate of the latents, of several results",
        description="Draws PSNR and the perceptual distance of several results over the bits per pixel of their "
        "latents: how much of a picture's bits is detail that nobody sees, and how much is content.",
    )
    plot.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="a result.json or its folder")
    plot.add_argument("--out", type=output_path, required=True, metavar="PNG", help="the plot")
    plot.set_defaults(run=_rate_distortion)
    return parser


def _add_autoencoder(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, "a manifest.json, or a folder of images", "folder for result.json and reconstructions.png")
    parser.add_argument("--resolution", type=int, help="pixels along each side; default: the model's in training")
    parser.add_argument("--perceptual", choices=("efficientnet_lite0", "lpips_vgg"), default="efficientnet_lite0")
    parser.add_argument("--perceptual-weights", type=Path, metavar="FILE", help="torchvision's VGG16, for lpips_vgg")
    parser.set_defaults(run=_autoencoder)


def _add_diffusion(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, "a manifest.json", "folder for result.json and samples.png")
    _add_sampling(parser)
    parser.set_defaults(run=_diffusion)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, "a manifest.json", "folder for sweep.csv, sweep.png and the cells", many=True)
    _add_sampling(parser, many=True)
    parser.set_defaults(run=_sweep)


def _add_sampling(parser: argparse.ArgumentParser, many: bool = False) -> None:
    """How samples are made and what they are set beside; with `many`, steps and guidance are lists."""
    several = {"nargs": "+"} if many else {}
    parser.add_argument("--seed", type=int, default=0, help="of the first sample, and of masks and small images")
    parser.add_argument(
        "--sampler",
        choices=("ddim", "ddpm", "plms", "dpmpp_2m", "dpmpp_2m_sde", "euler", "heun"),
        help="default, here and below: the model's",
    )
    parser.add_argument("--steps", type=int, **several)  # type: ignore[arg-type]
    parser.add_argument("--eta", type=float, help="stochasticity of DDIM, 0 to 1")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale, 1 = none", **several)  # type: ignore[arg-type]
    parser.add_argument("--guidance-rescale", type=float, help="0 to 1")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LO", "HI"), help="noise levels")
    parser.add_argument(
        "--reference", type=Path, help="set the samples beside these images, as of `evaluate images`; default: --data's"
    )
    parser.add_argument("--reference-split", help="of its manifest; default: heldout")
    parser.add_argument("--num-reference", type=int, help="images of it; default: all")
    _add_set_figures(parser)


def _add_common(parser: argparse.ArgumentParser, data: str, out: str, many: bool = False) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="PATH",
        help="a run, a checkpoint, an artifact, an export, or a folder of diffusers",
    )
    parser.add_argument("--data", type=Path, required=True, help=data)
    parser.add_argument("--split", help="of the manifest; default: heldout")
    parser.add_argument("--num-images", type=int, help="images to measure, the same for every model; default: all")
    parser.add_argument(
        "--weights",
        metavar="raw|ema|ema=STD",
        nargs="+" if many else None,
        help="of a checkpoint; ema=0.07 is the power-function average of that width, reconstructed if it was not kept; "
        "default: its first average, or raw",
    )
    _add_measuring(parser, out, required=many)


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IMAGES", help="a folder, or an .npz of uint8 (N, H, W, 3)")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="the reference: a manifest.json, a folder of images, an .npz, or a feature file from the cache",
    )
    parser.add_argument("--split", help="of the reference's manifest; default: heldout")
    parser.add_argument("--num-images", type=int, help="samples to measure; default: all")
    parser.add_argument("--num-reference", type=int, help="images of the reference; default: all")
    parser.add_argument(
        "--resolution",
        type=int,
        help="pixels that samples are cropped and resized to; default: as they are",
    )
    _add_measuring(parser, "folder for result.json")
    _add_set_figures(parser)
    parser.set_defaults(run=_images)


def _add_set_figures(parser: argparse.ArgumentParser) -> None:
    """Options of figures beside a reference set."""
    parser.add_argument("--clip-model", metavar="NAME", help="OpenCLIP's name; default: ViT-B-32")
    parser.add_argument(
        "--clip-weights", metavar="FILE|NAME", help="for the CLIP score: a file, or OpenCLIP's name of cached weights"
    )
    parser.add_argument(
        "--resamples", type=int, default=20, help="halves of the samples for confidence intervals; 0: none"
    )
    parser.add_argument(
        "--cache",
        type=output_path,
        metavar="DIR",
        help="of reference features; default: ~/.cache/ldm-scale/features",
    )
    parser.add_argument("--no-cache", action="store_true", help="neither look for features nor keep them")


def _add_measuring(parser: argparse.ArgumentParser, out: str, required: bool = False) -> None:
    """Options that all evaluations have."""
    parser.add_argument("--batch", type=int, default=16, help="images at once; changes no figure")
    parser.add_argument("--features", choices=("efficientnet_lite0", "inception_v3"), default="efficientnet_lite0")
    parser.add_argument(
        "--features-weights",
        type=Path,
        metavar="FILE",
        help="FID's Inception, for inception_v3; default: as torch-fidelity caches it",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=output_path, metavar="DIR", required=required, help=out)
    parser.add_argument("--overwrite", action="store_true", help="replace a result in --out")


# Imported in each: torch and the networks take seconds, which --help and a wrong command line need not wait for.
def _autoencoder(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ldm_scale.evaluation.results import result_text
    from ldm_scale.operations.evaluate import evaluate_autoencoder

    document = evaluate_autoencoder(arguments)
    return document, result_text(document) if document else ""


def _diffusion(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ldm_scale.evaluation.results import result_text
    from ldm_scale.operations.evaluate_diffusion import evaluate_diffusion

    document = evaluate_diffusion(arguments)
    return document, result_text(document) if document else ""


def _images(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ldm_scale.evaluation.results import result_text
    from ldm_scale.operations.evaluate_images import evaluate_images

    document = evaluate_images(arguments)
    return document, result_text(document) if document else ""


def _sweep(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ldm_scale.operations.evaluate_sweep import evaluate_sweep

    return evaluate_sweep(arguments)


def _compare(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ldm_scale.evaluation.results import comparison_table, protocol_lines, read_result, require_one_protocol

    if len(arguments.results) < 2:
        raise ConfigError(f"{arguments.results[0]}: one result alone cannot be compared; give two or more")
    results = [read_result(path) for path in arguments.results]
    require_one_protocol(results)
    protocol = results[0].protocol
    document = {
        "protocol": protocol,
        "results": [{"source": r.source, "model": r.model, "figures": r.figures} for r in results],
    }
    return document, f"{comparison_table(results)}\n\nprotocol of all of them\n{protocol_lines(protocol)}"


def _rate_distortion(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ldm_scale.evaluation.rate_distortion import plot_rate_distortion, rate_distortion_table
    from ldm_scale.evaluation.results import FORMAT, read_result

    results = [read_result(path, (FORMAT,)) for path in arguments.results]
    rows = plot_rate_distortion(results, arguments.out)
    document = {"plot": str(arguments.out), "protocol": results[0].protocol, "models": rows}
    return document, f"{rate_distortion_table(rows)}\nwrote {arguments.out}"


if __name__ == "__main__":
    sys.exit(run_command(main, None))
