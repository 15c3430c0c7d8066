"""`ldm-scale <command> [arguments]`, the same as `python -m ldm_scale <command>`.

A command is a module directly in ldm_scale/ with `main(argv) -> int | None`. The table below repeats their one-line
descriptions on purpose: help must not import torch six times, and a test holds the table against the folder.
"""

from __future__ import annotations

import difflib
import io
import keyword
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TypeVar

from safetensors import SafetensorError

from ldm_scale import __version__
from ldm_scale.command_line import example_lines
from ldm_scale.errors import LdmScaleError
from ldm_scale.processes import end_with_launcher
from ldm_scale.redaction import public_urls
from ldm_scale.telemetry.streams import enduring

COMMANDS = {
    "prepare": "turn images into webdataset shards and a manifest",
    "plan": "print parameters and FLOPs of a configuration, before anything runs",
    "encode": "turn image shards into latent shards for stage 2, with provenance",
    "train": "train an autoencoder or a diffusion model: ldm-scale train experiment=NAME [key=value ...]",
    "sample": "draw images from a trained model",
    "evaluate": "measure autoencoders, diffusion models and image files; compare results; draw distortion over rate",
    "export": "turn a run or a checkpoint into a diffusers folder, a CompVis checkpoint or plain safetensors",
    "import": "turn a checkpoint of CompVis or Stability into an artifact to train on, sample from and evaluate",
    "report": "write a run as one HTML page: pictures, curves, figures, cost, configuration",
    "replay": "make a step again that was skipped, image by image, to see which images are to blame",
    "doctor": "look at data, machine or latent caches before money is spent",
    "demo": "both stages on OpenMoji, from shards to samples and an export",
}
ArgvT = TypeVar("ArgvT")

EXIT_USAGE = 2
EXIT_FILES = 1
EXIT_INTERRUPTED = 130  # the shell's 128 + SIGINT
EXIT_CLOSED_PIPE = 141  # the shell's 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of the command that `argv` names."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"ldm-scale {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"choose {', '.join(COMMANDS)}"
        print(f"error: ldm-scale has no command {public_urls(name)!r}; {fix}", file=sys.stderr)
        return EXIT_USAGE
    # A module cannot bear the name of a keyword of Python's.
    module = f"{name}_" if keyword.iskeyword(name) else name
    return run_command(import_module(f"ldm_scale.{module}").main, rest)


def run_command(command: Callable[[ArgvT], int | None], argv: ArgvT) -> int:
    """The exit status of `command(argv)`, with a user's mistake told in one line on stderr and no traceback."""
    end_with_launcher()
    sys.stderr = enduring(sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        status = command(argv)
        sys.stdout.flush()
    except LdmScaleError as error:
        print(f"error: {_in_one_line(error)}", file=sys.stderr)
        return error.exit_code
    except (OSError, SafetensorError) as error:
        if isinstance(error, BrokenPipeError):
            # `ldm-scale plan ... | head`: the reader has gone; else the interpreter fails again at its own flush.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_CLOSED_PIPE
        print(
            f"error: {_in_one_line(error)}; check that the path exists, is writable and has space",
            file=sys.stderr,
        )
        return EXIT_FILES
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0 if status is None else int(status)


def _in_one_line(error: Exception) -> str:
    return public_urls(" ".join(str(error).split()))


def help_text() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    more = "ldm-scale <command> --help tells more about one of them."
    return f"ldm-scale <command> [arguments]\n\n{lines}\n\n{more}\n{example_lines('ldm-scale')}"


if __name__ == "__main__":
    sys.exit(main())
