"""Evaluation on the ranks that a launcher has started: they share the images, and rank 0 has the result."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ldm_scale.config.schema import TrainConfig
from ldm_scale.engine import collectives, env
from ldm_scale.engine.agreement import EXPECTED, agreed, wait_for_end_of_main
from ldm_scale.telemetry.log import get_logger

Outcome = tuple[dict[str, Any], str]  # the document, and what people are shown


def on_ranks(arguments: argparse.Namespace, run: Callable[[argparse.Namespace], Outcome]) -> Outcome | None:
    """What `run` gives on rank 0, None on the others. Errors end all ranks, and rank 0 says why.

    The process group is gloo's on any device: it passes figures on, and no network runs across ranks.
    Raises: SystemExit with the error's status on ranks other than 0; on rank 0 the error.
    """
    launch = env.read_launch()
    if launch.world_size == 1:
        return run(arguments)
    get_logger(launch.rank)
    env.start(launch, TrainConfig(device="cpu"), facts={"command line": arguments.command})
    try:
        outcome = run(arguments)
    except EXPECTED as error:
        if launch.rank == 0:
            raise
        wait_for_end_of_main()
        raise SystemExit(getattr(error, "exit_code", 1)) from None
    collectives.barrier()  # a launcher may take the first that leaves for the end of all
    env.stop()
    return outcome if launch.rank == 0 else None


def on_main(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives on rank 0; nothing ({}) on the others, which wait for it.

    Raises: its error, on all ranks. Collective: all ranks.
    """
    return agreed(lambda: work() if collectives.rank() == 0 else {})
