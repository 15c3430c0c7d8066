"""`ldm-scale replay RUN`: a step of a run again, image by image, to see which images are to blame."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm_scale.command_line import Parser, output_path


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ldm-scale replay",
        description="Makes one global batch of a run again, on one process: the same images with the same noise and "
        "times, one by one, with the weights of the newest checkpoint before it. Prints the loss and the norm "
        "of the gradient of each image, the suspicious ones first, and writes a picture of them in that order.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--image",
        type=int,
        metavar="N",
        help="the step that has this image of the training stream; default: the last of RUN/skipped_steps.jsonl",
    )
    parser.add_argument("--out", type=output_path, metavar="PNG", help="the picture; default: RUN/replay-IMAGE.png")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: the run's")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0, after the images of the step were printed, as a table or as one JSON object.

    Raises: ConfigError if there is no such step, CheckpointError or DataError if it cannot be made again.
    """
    arguments = _parser().parse_args(argv)
    # Imported here: torch and the networks take seconds, which --help and a wrong command line need not wait for.
    with contextlib.redirect_stdout(sys.stderr):
        from ldm_scale.operations.replay import replay, replay_text

        document = replay(arguments)
    print(json.dumps(document, allow_nan=False) if arguments.json else replay_text(document))
    return 0
