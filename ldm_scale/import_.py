"""`ldm-scale import PATH --out DIR`: other people's trained models as artifacts of ours."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_scale.command_line import Parser, output_path
from ldm_scale.errors import ConfigError

if TYPE_CHECKING:
    from ldm_scale.interchange.compvis import Imported


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the artifact was written, read back and found to compute the same."""
    arguments = _parse(argv)
    # Libraries print notices when they are imported; stdout belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        # Imported here: torch and the networks take seconds, which --help need not wait for.
        from ldm_scale.interchange.output_folder import require_apart, require_replaceable
        from ldm_scale.interchange.publish import is_export, publish

        # Before a large source is read.
        require_replaceable(arguments.out, is_export)
        require_apart(arguments.out, arguments.path)
        imported = _read(arguments)
        published = publish(imported.artifact, "safetensors", arguments.out, compute=True)
    if arguments.json:
        fields = {"path": str(published.path), "kind": published.kind, "left_out": imported.left_out}
        weights = imported.artifact.provenance["weights"]
        fields |= {"content_sha256": published.content_hash, "weights": weights}
        print(json.dumps(fields | {"differences": published.differences}))
        return 0
    print(f"{published.kind} model written to {published.path}, content {published.content_hash}")
    for what, number in imported.left_out.items():
        print(f"  left out: {number} tensors, {what}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="ldm-scale import",
        description="Turns a folder of diffusers, or a checkpoint of CompVis' or Stability's layout (Stable Diffusion "
        "1 and 2, the latent diffusion zoo, KL and VQ autoencoders), into an artifact. Nothing that the files contain "
        "is run. The YAML of a checkpoint is looked for beside it, under its name or as config.yaml; the options that "
        "say more of the model are for checkpoints alone.",
    )
    parser.add_argument(
        "path", type=Path, help="a folder of diffusers; a .ckpt, .pt or .safetensors file, or the folder that holds it"
    )
    parser.add_argument("--out", type=output_path, required=True, help="new folder, or an earlier import to replace")
    parser.add_argument("--config", type=Path, metavar="YAML", help="the model's configuration, if it lies elsewhere")
    parser.add_argument("--weights", choices=("raw", "ema"), help="default: ema where the checkpoint has it, else raw")
    parser.add_argument(
        "--prediction", choices=("eps", "v", "x0"), help="what the UNet predicts, against or without a YAML"
    )
    parser.add_argument(
        "--resolution", type=_positive, metavar="PIXELS", help="per side in training, if not the YAML's"
    )
    parser.add_argument("--scale-factor", type=_scale, help="of the latents, if not the checkpoint's or the YAML's")
    parser.add_argument("--num-classes", type=_positive, help="classes of the data, where no tensor shows it")
    parser.add_argument("--vocabulary", type=Path, metavar="VOCAB.TXT", help="words of bert-base-uncased, where needed")
    parser.add_argument("--json", action="store_true", help="print one JSON object about the result")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def _scale(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and finite")
    return number


def _read(arguments: argparse.Namespace) -> Imported:
    from ldm_scale.interchange.compvis import Imported, ImportOptions, read_compvis
    from ldm_scale.interchange.sources import FOREIGN_FILES, read_source

    said = {option.name: getattr(arguments, option.name) for option in dataclasses.fields(ImportOptions)}
    if not any((arguments.path / name).is_file() for name in FOREIGN_FILES):
        return read_compvis(arguments.path, ImportOptions(**said))
    useless = [f"--{name.replace('_', '-')} {value}" for name, value in said.items() if value is not None]
    if useless:
        raise ConfigError(
            f"{useless[0]}: {arguments.path} is a folder of diffusers, whose configuration says all of the model; "
            "leave it out"
        )
    return Imported(read_source(arguments.path))
