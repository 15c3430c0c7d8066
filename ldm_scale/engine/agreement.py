"""Mistakes and faults of one rank become the same error of all ranks, told once.

Without this a rank that cannot open a file ends alone while the others wait for it in a collective, and a mistake that
all of them see is told as often as there are ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
from safetensors import SafetensorError

from ldm_scale.engine import collectives
from ldm_scale.errors import ConfigError, LdmScaleError

T = TypeVar("T")
EXPECTED = (LdmScaleError, OSError, SafetensorError)


def agreed(work: Callable[[], T]) -> T:
    """What `work` gives on this rank. It must not begin a collective that an error of it leaves unanswered.

    Too little of a device's memory is a ConfigError.
    Raises: on all ranks the error of the first rank on which it failed. Collective: all ranks.
    """
    error: Exception | None = None
    try:
        value = work()
    except EXPECTED as found:
        error = found
    except torch.OutOfMemoryError as found:
        error = ConfigError(f"the device's memory does not suffice ({str(found).splitlines()[0].rstrip('.')})")
    told = None if error is None else (type(error), str(error))
    for rank, other in enumerate(collectives.gather_objects(told)):
        if other is None:
            continue
        if error is not None and rank == collectives.rank():
            raise error
        kind, message = other
        raise kind(message if rank == 0 else f"rank {rank}: {message}")
    return value


def wait_for_end_of_main() -> None:
    """Nothing; rank 0's process has ended, or has met this rank here.

    A launcher ends all ranks when the first has failed: that must be the one that says why.
    """
    with suppress(RuntimeError):
        collectives.barrier()
