"""`ldm-scale encode ARTIFACT MANIFEST --out DIR`: image shards to latent shards, on any number of ranks, resumable."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    # Run as a script by a launcher: see train.py.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ldm_scale.__main__ import run_command
from ldm_scale.command_line import Parser, output_path
from ldm_scale.errors import Restart


def _whole(text: str) -> int:
    """An argument that is a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _share(text: str) -> float:
    """An argument above 0 and at most 1."""
    number = float(text)
    if not 0.0 < number <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return number


def _count(text: str) -> int:
    """An argument that is a whole number, 0 included."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ldm-scale encode",
        description="Writes a latent cache: moments of the latents of every image of a manifest, with captions and "
        "provenance, to train stage 2 on. Shards that are not encoded yet stand in the new manifest as image shards. "
        "Started again it keeps what is done; under torchrun, deepspeed or srun the ranks share the shards.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an autoencoder artifact, or a finished run")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="manifest.json of the image shards")
    parser.add_argument("--out", type=output_path, required=True, help="folder of the cache, new or to be continued")
    parser.add_argument("--split", action="append", default=[], help="a split to encode; may be repeated (all)")
    parser.add_argument("--resolution", type=_whole, help="pixels along each side (that of the artifact)")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the moments (float16)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="that the encoder computes in (fp32)"
    )
    parser.add_argument("--flips", action="store_true", help="mirrored variants, for data.horizontal_flip=true")
    parser.add_argument("--crops", type=_count, default=0, help="random crops per image (0)")
    parser.add_argument(
        "--crop-scale-min", type=_share, default=1.0, help="their smallest side, as data.crop_scale_min (1 = none)"
    )
    parser.add_argument(
        "--text-encoder", metavar="MODEL", help="also store captions' contexts by the text tower of this OpenCLIP model"
    )
    parser.add_argument("--text-weights", metavar="W", help="its weights: OpenCLIP's name of them, or a file")
    parser.add_argument(
        "--text-layer",
        choices=("last", "penultimate"),
        default="penultimate",
        help="whose output they are, as conditioning.frozen_text.layer (penultimate)",
    )
    parser.add_argument("--max-shards", type=_whole, help="encode the first so many shards only")
    parser.add_argument("--batch", type=_whole, default=16, help="images encoded at once (16)")
    parser.add_argument("--workers", type=_count, default=1, help="processes that decode pictures, 0 = none (1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of words")
    return parser


def _after(note: str) -> str:
    """The note as the end of a line."""
    return f" {note}" if note else ""


def main(argv: Sequence[str] | None = None) -> int:
    """0 when this rank's shards are encoded, or it was stopped on request; rank 0 alone prints.

    75 (errors.Restart) when it was stopped and is to be started again: Slurm's warnings ask for that.

    Raises: ConfigError, CheckpointError or DataError if something cannot be encoded.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher adds the rank as an argument beside the environment variables that we read.
    arguments = [a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))]
    options = _parser().parse_args(arguments)
    from ldm_scale.engine.env import read_launch
    from ldm_scale.operations.encode import encode

    launch = read_launch()
    report = encode(options, launch)
    status = Restart.exit_code if report["restart"] else 0
    if launch.rank > 0:
        return status
    if options.json:
        print(json.dumps(report))
        return status
    whose = f"rank {report['rank']} of {report['world_size']} alone: " if report["world_size"] > 1 else ""
    print(
        f"{whose}{report['images']} images in {report['encoded_shards']} shards encoded "
        f"({report['images_per_s']} images/s), {report['kept_shards']} shards kept, "
        f"{report['unusable']} images unusable"
    )
    for split, counts in report["splits"].items():
        print(f"  {split}: {counts['latent_shards']} of {counts['shards']} shards hold latents{_after(report['note'])}")
    print(f"manifest: {report['manifest']}")
    return status


if __name__ == "__main__":
    sys.exit(run_command(main, None))
