"""`ldm-scale export SOURCE --to diffusers|compvis|safetensors --out DIR`: a trained model for others' software."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_scale.command_line import Parser, output_path
from ldm_scale.errors import ConfigError

if TYPE_CHECKING:
    from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the folder was written, read back and found to compute the same."""
    arguments = _parse(argv)
    # The libraries behind the two formats print notices when they are imported; stdout belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        # Imported here: torch and the networks take seconds, which --help and a refused command line need not wait for.
        from ldm_scale.interchange.output_folder import require_apart, require_replaceable
        from ldm_scale.interchange.publish import is_export, out_of_memory, publish, target_of

        # Before a large source is read.
        require_replaceable(arguments.out, is_export)
        # Written anew in its own layout it stays what it is.
        if not arguments.random_init and target_of(arguments.out) != arguments.to:
            require_apart(arguments.out, Path(arguments.source[0]))
        published = publish(out_of_memory(_read(arguments), arguments.out.parent), arguments.to, arguments.out)
    if arguments.json:
        fields = {"path": str(published.path), "to": published.target, "kind": published.kind}
        print(json.dumps(fields | {"content_sha256": published.content_hash, "differences": published.differences}))
        return 0
    print(f"{published.kind} model written to {published.path} ({published.target}), content {published.content_hash}")
    for part, difference in published.differences.items():
        print(f"  {part:<24} differs from ours by {difference:.1e} of its norm")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="ldm-scale export",
        description="Writes a model as a diffusers folder, as a checkpoint of CompVis' layout with its YAML, or as a "
        "self-contained folder of safetensors. The folder is read back and compared with the model; if it computes "
        "anything else, nothing is written.",
    )
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="a run, a checkpoint, an artifact or an export; or experiment=NAME [key=value ...] with --random-init",
    )
    parser.add_argument("--to", choices=("diffusers", "compvis", "safetensors"), required=True)
    parser.add_argument("--out", type=output_path, required=True, help="new folder, or an earlier export to replace")
    parser.add_argument(
        "--weights",
        metavar="raw|ema|ema=STD",
        help="of a checkpoint; ema=0.07 is the power-function average of that width, reconstructed if it was not kept; "
        "default: its first average, or raw",
    )
    parser.add_argument("--random-init", action="store_true", help="export the untrained model of an experiment")
    parser.add_argument("--seed", type=int, help="of --random-init; default: the experiment's train.seed")
    parser.add_argument("--json", action="store_true", help="print one JSON object about the result")
    return parser.parse_intermixed_args(argv)


def _read(arguments: argparse.Namespace) -> Artifact | DiffusionArtifact:
    """The model that the command line names.

    Raises: ConfigError if its parts contradict each other.
    """
    source: list[str] = arguments.source
    if not arguments.random_init:
        if source[0].startswith("experiment=") and not Path(source[0]).exists():
            raise ConfigError(
                f"{source[0]} names a configuration, not weights: add --random-init, or give its run folder"
            )
        if len(source) > 1:
            raise ConfigError(f"{len(source)} sources given ({', '.join(source)}): export one folder at a time")
        if arguments.seed is not None:
            raise ConfigError(f"--seed {arguments.seed} only chooses the weights of --random-init: leave it out")
        from ldm_scale.interchange.sources import read_source

        return read_source(Path(source[0]), arguments.weights)

    if arguments.weights is not None:
        raise ConfigError(f"--weights {arguments.weights}: an untrained model has one set of weights; leave it out")
    from ldm_scale.config.compose import load_config
    from ldm_scale.config.validate import validate_architecture
    from ldm_scale.interchange.publish import untrained_artifact

    config = load_config(source)
    if config.init:
        raise ConfigError(f"init={config.init} beside --random-init, which gives random weights; leave one of them out")
    validate_architecture(config)
    return untrained_artifact(config, config.train.seed if arguments.seed is None else arguments.seed)
