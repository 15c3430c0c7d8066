"""How long a step takes: with a cold cache and with a warm one, all candidates of a shape in turn.

On a GPU a step is captured once as a CUDA graph and replayed, so that neither Python nor launch gaps are timed; where
capture fails, or its memory would not fit, the step itself runs and the result says so. Cold: a buffer larger than any
L2 cache is overwritten before each replay, and each replay has its own pair of events. Warm: replays follow each other
between two events. Candidates alternate round by round, each round starting with another one: whatever slows the
machine down for a while hits all of them.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Step = Callable[[], object]

ROUNDS = 5
WARMUP_STEPS = 3
FLUSH_BYTES = 256 * 2**20  # twice the largest L2 cache of the GPUs that the kernels serve


@dataclass(frozen=True)
class Prepared:
    """A step that has run a few times. `captured`: `run` replays a CUDA graph of it."""

    run: Step
    captured: bool
    step: Step | None = None  # what a graph was made of: it reads and writes the step's own tensors at every replay


@dataclass
class Times:
    """Microseconds of one step. Cold: one value a replay; warm: the mean of a round's replays."""

    captured: bool
    cold_us: list[float] = field(default_factory=list)
    warm_us: list[float] = field(default_factory=list)


class Clock(Protocol):
    """What times steps on one kind of device."""

    def place(self) -> contextlib.AbstractContextManager[Any]:
        """Where everything that a step needs from before (a forward pass, say) must be computed."""

    def prepare(self, step: Step, capture: bool) -> Prepared: ...

    def cold(self, prepared: Prepared, count: int) -> list[float]: ...

    def warm(self, prepared: Prepared, count: int) -> float: ...


class CudaClock:
    """Times with CUDA events, on a stream of its own, since capture does not work on the default stream."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def place(self) -> contextlib.AbstractContextManager[Any]:
        """The clock's stream: autograd runs a backward pass on the stream of its forward pass."""
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def prepare(self, step: Step, capture: bool) -> Prepared:
        """The step, compiled and warmed up on the clock's stream, and captured if that is asked for and works."""
        with self.place():
            for _ in range(WARMUP_STEPS):
                step()
        torch.cuda.synchronize()
        if not capture:
            return Prepared(step, captured=False)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # A fault of the device shows here again, and is not taken for a step that cannot be captured.
            torch.cuda.synchronize()
            return Prepared(step, captured=False)
        torch.cuda.synchronize()
        return Prepared(graph.replay, captured=True, step=step)

    def cold(self, prepared: Prepared, count: int) -> list[float]:
        """Microseconds of each of `count` runs, the cache overwritten before each."""
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        with self.place():
            for begin, end in pairs:
                self._flush.zero_()
                begin.record()
                prepared.run()
                end.record()
        torch.cuda.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in pairs]

    def warm(self, prepared: Prepared, count: int) -> float:
        """Mean microseconds of `count` runs back to back."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with self.place():
            prepared.run()
            begin.record()
            for _ in range(count):
                prepared.run()
            end.record()
        torch.cuda.synchronize()
        return 1e3 * begin.elapsed_time(end) / count


class HostClock:
    """Wall time on the CPU, for dry runs: it exercises the code and says nothing about a GPU."""

    def place(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def prepare(self, step: Step, capture: bool) -> Prepared:
        step()
        return Prepared(step, captured=False)

    def cold(self, prepared: Prepared, count: int) -> list[float]:
        return [self.warm(prepared, 1) for _ in range(count)]

    def warm(self, prepared: Prepared, count: int) -> float:
        begin_s = time.perf_counter()
        for _ in range(count):
            prepared.run()
        return 1e6 * (time.perf_counter() - begin_s) / count


def make_clock(device: torch.device) -> Clock:
    """The clock of a device: CUDA events, or the host's for a dry run on the CPU."""
    return CudaClock() if device.type == "cuda" else HostClock()


def time_in_turn(clock: Clock, candidates: Mapping[str, Prepared], seconds: float) -> dict[str, Times]:
    """Times of every candidate over ROUNDS rounds, each taking about `seconds` of the device in all."""
    times = {name: Times(prepared.captured) for name, prepared in candidates.items()}
    counts = {name: _runs_a_round(clock, prepared, seconds) for name, prepared in candidates.items()}
    names = list(candidates)
    for index in range(ROUNDS if names else 0):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            times[name].cold_us += clock.cold(candidates[name], counts[name])
            times[name].warm_us.append(clock.warm(candidates[name], counts[name]))
    return times


def _runs_a_round(clock: Clock, prepared: Prepared, seconds: float) -> int:
    """How many cold and as many warm runs fill a round's share of the time, the flush taken for one more run."""
    estimate_us = max(statistics.median(clock.cold(prepared, 3)), 50.0)
    return min(20, max(2, round(1e6 * seconds / ROUNDS / (3 * estimate_us))))


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}
