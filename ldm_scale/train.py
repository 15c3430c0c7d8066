"""Trains a stage: `deepspeed ldm_scale/train.py experiment=NAME`, torchrun, plain python, or `ldm-scale train`.

The same command continues a run that was stopped. Everything that can be refused is refused before a process group
starts; DeepSpeed and the networks are imported after that.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Run as a script: Python put this folder first on the path, where our modules would shadow others' (data, config).
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ldm_scale.__main__ import run_command
from ldm_scale.command_line import example_lines
from ldm_scale.telemetry.streams import enduring

USAGE = """usage: ldm-scale train experiment=NAME [KEY=VALUE ...]

Trains the experiment's stage on the ranks that the launcher started (one without a launcher), continuing from the
newest checkpoint in run_dir. `ldm-scale plan experiment=NAME` prints what it costs."""


def main(argv: list[str] | None = None) -> int:
    """0 when the run has reached its end or has stopped on request with a checkpoint written.

    75 (errors.Restart) when it did so and is to be started again: Slurm's warnings ask for that.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher adds the rank as an argument beside the environment variables that we read.
    arguments = [a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))]
    if any(a in ("-h", "--help") for a in arguments):
        print(f"{USAGE}\n{example_lines('ldm-scale train')}")
        return 0
    sys.stdout = enduring(sys.stdout)  # only libraries' messages go there
    from ldm_scale.config.compose import load_config
    from ldm_scale.config.validate import validate
    from ldm_scale.engine.env import read_launch
    from ldm_scale.errors import Restart
    from ldm_scale.operations.train import train
    from ldm_scale.telemetry.log import get_logger

    launch = read_launch()
    get_logger(launch.rank)  # what is said of init's weights, it says once
    config = load_config(arguments)
    validate(config, world_size=launch.world_size)
    try:
        train(config, launch)
    except Restart as request:
        return request.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, None))
