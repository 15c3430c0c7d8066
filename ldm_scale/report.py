"""A run as one page: `ldm-scale report RUN [--out FILE]`, pictures, curves, figures, cost, configuration."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm_scale.command_line import Parser, output_path


def main(argv: Sequence[str] | None = None) -> int:
    """0 after the page was written."""
    arguments = _parser().parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the result
        from ldm_scale.operations.report import write_report

        document = write_report(arguments)
    if arguments.json:
        print(json.dumps(document, allow_nan=False))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ldm-scale report",
        description="Writes a run as one HTML page that needs nothing else: pictures, curves, evaluations with their "
        "protocols, cost, environment, configuration. Of a run that goes on, of a finished one, and of one with "
        "damaged or missing pieces, which it names.",
    )
    parser.add_argument("run", type=Path, help="run_dir of a run")
    parser.add_argument("--out", type=output_path, metavar="FILE", help="the page; default: RUN/report.html")
    parser.add_argument(
        "--results",
        type=Path,
        action="append",
        default=[],
        metavar="RESULT",
        help="an evaluation (a folder or a result.json) that lies outside of RUN; those within are found",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object about the page")
    return parser
