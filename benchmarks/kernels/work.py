"""What a case must move and compute in a pass: roofline.py's counts, forward and backward added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.kernels.cases import Case
from ldm_kernels.common import roofline

FORWARD_ONLY = ("vector_quantize", "ema_update")
VARIANTS = ("two_pass", "registers", "cluster")


@dataclass(frozen=True)
class Work:
    """The fewest bytes that a pass can move, those that an implementation moves, and FLOPs (fewest) of the pass."""

    min_bytes: int
    moved_bytes: int
    flops: int


def work(case: Case, direction: str, path: str = "") -> Work:
    """The pass's work; `path` names the variants: "triton two_pass", or "forward registers, backward two_pass"."""
    dtype = str(case.dtype).removeprefix("torch.")
    directions: tuple[Literal["fwd", "bwd"], ...] = ("fwd",) if direction == "forward" else ("bwd",)
    if direction == "both":
        directions = ("fwd",) if case.operation in FORWARD_ONLY else ("fwd", "bwd")
    counts = [
        roofline.work(case.shape.operation, d, case.shape, dtype, _variant(path, d), case.batch) for d in directions
    ]
    return Work(
        sum(count.bytes_minimum for count in counts),
        sum(count.bytes_moved for count in counts),
        sum(count.flops for count in counts),
    )


def _variant(path: str, direction: str) -> str | None:
    of_pass = path.partition("forward " if direction == "fwd" else "backward ")[2] or path
    found = {of_pass.find(name): name for name in VARIANTS if name in of_pass}
    return found[min(found)] if found else None
