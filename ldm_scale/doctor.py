"""`ldm-scale doctor data|machine|latents|order`: looks before money is spent; exit status 1 if something must be
mended.

`torchrun --nproc-per-node 2 -m ldm_scale doctor machine` or `deepspeed ldm_scale/doctor.py machine` also measures what
lies between ranks; rank 0 reports.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

if __package__ in (None, ""):
    # As in train.py: run as a script, where our modules would shadow others'.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ldm_scale.__main__ import run_command
from ldm_scale.command_line import Parser, example_lines
from ldm_scale.redaction import public_urls

# Sub-command -> what it says of itself; its module is operations/doctor_NAME.py, imported when it is asked for.
SUBJECTS = {
    "data": "shards, pictures, captions, classes and leakage of a prepared data set",
    "machine": "versions, devices, disks, limits and the clock of a small training step",
    "latents": "a latent cache against the images that it was encoded from",
    "order": "which samples stand in which batch of a training, before it runs",
}
DEFAULT_EXPERIMENT = "experiment=demo_autoencoder"


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 if an error is among the findings, after printing them or, with --json, one JSON object."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher adds the rank as an argument beside the environment variables that we read.
    arguments = [a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))]
    parser = Parser(prog="ldm-scale doctor", description="Looks before money is spent.", add_help=True)
    parser.add_argument("subject", choices=tuple(SUBJECTS), metavar="SUBJECT", help=", ".join(SUBJECTS))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0
    subject = parser.parse_args(arguments[:1]).subject
    module = import_module(f"ldm_scale.operations.doctor_{subject}")
    about = getattr(module, "ABOUT", f"Examines {SUBJECTS[subject]}.")
    own = Parser(prog=f"ldm-scale doctor {subject}", description=about)
    module.add_arguments(own)
    own.add_argument("--json", action="store_true", help="print one JSON object instead of the findings")
    parsed = own.parse_intermixed_args(arguments[1:])
    if subject == "machine":
        _add_config(parsed)
    report = module.run(parsed)
    if subject != "machine" or _is_main():
        print(public_urls(json.dumps(report.as_dict(), ensure_ascii=False) if parsed.json else report.text()))
    return int(report.exit_code)


def _add_config(parsed: argparse.Namespace) -> None:
    """Nothing; the configuration that the overrides make stands in `config`."""
    from ldm_scale.config.compose import load_config
    from ldm_scale.config.validate import validate_architecture

    overrides = list(parsed.overrides)
    if not any(override.startswith("experiment=") for override in overrides):
        overrides.insert(0, DEFAULT_EXPERIMENT)
    parsed.config = load_config(overrides)
    validate_architecture(parsed.config)


def _is_main() -> bool:
    """Whether this is the rank that reports."""
    from ldm_scale.engine.env import read_launch

    return read_launch().rank == 0


def help_text() -> str:
    """The list of sub-commands."""
    width = max(map(len, SUBJECTS))
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in SUBJECTS.items())
    more = "ldm-scale doctor <subject> --help tells more about one of them."
    return f"ldm-scale doctor <subject> [arguments]\n\n{lines}\n\n{more}\n{example_lines('ldm-scale doctor')}"


if __name__ == "__main__":
    sys.exit(run_command(main, None))
