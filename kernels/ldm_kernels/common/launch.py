"""How a kernel is launched, and how the same launch is recorded instead of run.

Every operation describes its launches with `Launch` and hands them to `run`. On a device they run; inside `recording`
they are only collected, with tensors of the meta device in place of real ones. So what is compiled ahead of time for a
GPU that is not here is, by construction, what that GPU would be asked to run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

# Triton reads the variable when a kernel is defined: a process interprets all of its kernels or none.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # asks, and imports nothing

# The interpreter has no architecture of its own; it takes the tables of the oldest one that the kernels serve.
_INTERPRETED_ARCHITECTURE = 80


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: runtime arguments and compile-time constants by the names of its parameters."""

    kernel: Any  # a function under @triton.jit
    grid: tuple[int, ...]  # programs along up to three axes; only the first may pass 65,535
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, int | bool | float | str | None]
    num_warps: int = 4
    num_stages: int = 2
    num_ctas: int = 1  # thread blocks in a cluster; more than one needs compute capability 9.0


@dataclass
class Recording:
    """What was launched while nothing ran."""

    architecture: int
    launches: list[Launch] = field(default_factory=list)


_recording: Recording | None = None
_outcomes: Counter[tuple[str, str]] = Counter()


@contextlib.contextmanager
def recording(architecture: int) -> Iterator[Recording]:
    """Collects launches instead of running them, as for a GPU of that architecture (90 is compute capability 9.0)."""
    global _recording
    assert _recording is None, "recordings do not nest"
    _recording = Recording(architecture)
    try:
        yield _recording
    finally:
        _recording = None


def run(launch: Launch) -> None:
    """Runs the launch on the device of its tensors, or records it."""
    if _recording is not None:
        _recording.launches.append(launch)
        return
    if 0 in launch.grid:
        return
    first = next(a for a in launch.arguments.values() if isinstance(a, Tensor))
    options: dict[str, int] = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.num_ctas > 1:
        options["num_ctas"] = launch.num_ctas
    # Triton launches on the current device, whatever device its arguments live on.
    guard = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
    with guard:
        launch.kernel[launch.grid](**launch.arguments, **launch.constants, **options)


def architecture(tensor: Tensor) -> int:
    """Compute capability times ten of the GPU that a launch with this tensor is for: 80, 90, 100, ..."""
    if _recording is not None:
        return _recording.architecture
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 10 * major + minor
    return _INTERPRETED_ARCHITECTURE


def runs_kernels(tensor: Tensor) -> bool:
    """Whether Triton can run on this tensor: on a CUDA device of capability 8.0 or more, or in the interpreter."""
    if not _HAS_TRITON:
        return False
    if tensor.is_cuda:
        return torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    return INTERPRETED and tensor.device.type == "cpu"


def note_outcome(operation: str, path: str) -> None:
    """Counts a call of the operation by the path that it took, for `outcomes`; costs nothing under compilation."""
    if not torch.compiler.is_compiling():
        _outcomes[operation, path] += 1


def outcomes() -> dict[tuple[str, str], int]:
    """Calls so far by (operation, path taken), of this process."""
    return dict(_outcomes)


def constant_when_compiled(function: FunctionT) -> FunctionT:
    """The function, which torch.compile then calls while it traces, taking the result for a constant.

    What `torch.compiler.assume_constant_result` does, without importing the compiler (two seconds) to do it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()
