"""One case measured: every implementation checked against float64, then the correct ones timed in turn.

An implementation whose output or gradients differ gets no time. The limit is the type's bound on the relative error,
or twice the error of plain torch in the same type where that is larger, but never four times the bound. Each pass has
a copy of the fewest bytes that it must move as its ceiling, timed among the others.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.kernels import work
from benchmarks.kernels.cases import Case, Problem, Results, backward, errors, forward_error, make_problem
from benchmarks.kernels.implementations import Function, Implementation, Unavailable, implementations
from benchmarks.kernels.lookup import winner_key
from benchmarks.kernels.timing import Clock, Prepared, Step, quartiles, time_in_turn

COPY = "copy"
PASSES = ("forward", "backward", "both")
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
FORWARD_ONLY_BOUNDS = {"vector_quantize": 1e-5, "ema_update": 1e-6}
PLAIN = {"group_norm_silu": "eager channels_last", "attention": "sdpa", "geglu": "eager"}
CHECKED_AT_ONCE_BYTES = 2**33  # of all candidates' results; beyond it they are checked one at a time
CAPTURED_BYTES = 2**31  # moved by a step; beyond it launches cost nothing, and a graph's own memory might not fit

Notify = Callable[[str, str], None]  # (stage, implementation): said before anything that might not come back


class DeviceFault(Exception):
    """The device is unusable for this process from here on."""


@dataclass
class Row:
    """What is known of one implementation in one pass of one case. Times in microseconds."""

    operation: str
    model: str
    batch: int
    shape: str
    dtype: str
    implementation: str
    direction: str
    status: str  # ok, wrong, unavailable, out of memory, failed; anything but ok has no times
    note: str = ""
    ours: bool = False
    backend: str | None = None  # the name under which `auto` could take it
    captured: bool = False
    cold_us: dict[str, float] = field(default_factory=dict)
    warm_us: dict[str, float] = field(default_factory=dict)
    min_bytes: int = 0
    moved_bytes: int = 0
    flops: int = 0
    output_error: float | None = None
    gradient_error: float | None = None
    count: int = 1  # how often one forward pass of the model meets the shape
    chosen_by: tuple[str, dict[str, int]] | None = None  # operation and shape by which `auto` looks for a winner


@dataclass
class Candidate:
    """An implementation ready to run on a case."""

    implementation: Implementation
    function: Function
    leaves: dict[str, Tensor]
    grad_output: Tensor | None
    note: str
    output_error: float = float("nan")
    gradient_error: float | None = None


@dataclass(frozen=True)
class Options:
    """How a case is measured. `seconds`: of the device, per implementation and pass; 0 checks and times nothing."""

    device: torch.device
    clock: Clock
    seconds: float = 0.03
    max_autotune: bool = False
    excluded: frozenset[str] = frozenset()  # implementations that took the device down in this case before


def measure(case: Case, options: Options, notify: Notify) -> list[Row]:
    """A row per implementation and pass. Raises: DeviceFault."""
    rows: list[Row] = []
    # Compiled backward passes may otherwise consume what a second backward pass needs.
    functorch_config.donated_buffer = False
    with _faults():
        problem = make_problem(case, options.device)
        chosen_by = winner_key(problem)
        candidates = _build(problem, options, notify, rows)
        correct = _check(problem, candidates, notify, rows)
        if options.seconds:
            notify("time", "")
            for direction in PASSES if problem.grad_output is not None else PASSES[:1]:
                rows += _time(problem, correct, direction, options)
        else:
            rows += [_row(problem, c, PASSES[0], "ok") for c in correct]
    for row in rows:
        row.chosen_by = chosen_by
    return rows


def _build(problem: Problem, options: Options, notify: Notify, rows: list[Row]) -> list[Candidate]:
    candidates = []
    plain_layout: tuple[dict[str, Tensor], Tensor | None] | None = None
    for implementation in implementations(problem.case.operation, options.max_autotune):
        leaves, grad_output = problem.leaves, problem.grad_output
        if implementation.name in options.excluded:
            rows.append(_refused(problem, implementation, "failed", "it took the device down in this case"))
            continue
        try:
            notify("build", implementation.name)
            function, note = implementation.build(problem), implementation.describe(problem)
        except Unavailable as reason:
            rows.append(_refused(problem, implementation, "unavailable", str(reason)))
            continue
        except Exception as error:
            # A broken optional package, say, must not cost the others.
            _raise_faults(error)
            rows.append(_refused(problem, implementation, *_failure(error, implementation)))
            continue
        if implementation.nchw:
            plain_layout = plain_layout or _in_plain_layout(problem)
            leaves, grad_output = plain_layout
        candidates.append(Candidate(implementation, function, leaves, grad_output, note))
    return candidates


def _in_plain_layout(problem: Problem) -> tuple[dict[str, Tensor], Tensor | None]:
    leaves = {name: leaf.detach().contiguous().requires_grad_() for name, leaf in problem.leaves.items()}
    return leaves, problem.grad_output.contiguous() if problem.grad_output is not None else None


def _check(problem: Problem, candidates: list[Candidate], notify: Notify, rows: list[Row]) -> list[Candidate]:
    """The candidates whose results are right; the others' rows are added."""
    pending: list[tuple[Candidate, Results]] = []
    held = 0
    checked = []
    for candidate in candidates:
        notify("check", candidate.implementation.name)
        try:
            results = _results(problem, candidate)
        except Exception as error:
            _raise_faults(error)
            rows.append(_refused(problem, candidate.implementation, *_failure(error, candidate.implementation)))
            continue
        if problem.grad_output is None:
            candidate.output_error = forward_error(problem, results[0])
            checked.append(candidate)
            continue
        pending.append((candidate, results))
        held += sum(t.numel() * t.element_size() for t in (results[0], *results[1].values()))
        if held > CHECKED_AT_ONCE_BYTES:
            checked += _compare(problem, pending, rows)
            pending, held = [], 0
    checked += _compare(problem, pending, rows) if pending else []
    limit = _limit(problem, checked)
    correct = []
    for candidate in checked:
        found = max(candidate.output_error, candidate.gradient_error or 0.0)
        # Written so that a NaN is refused too; `max` may drop one.
        if candidate.output_error <= limit and (candidate.gradient_error is None or candidate.gradient_error <= limit):
            correct.append(candidate)
        else:
            rows.append(
                _row(problem, candidate, PASSES[0], "wrong", f"relative error {found:.2g}, allowed {limit:.2g}")
            )
    return correct


def _results(problem: Problem, candidate: Candidate) -> Results:
    output = candidate.function(**candidate.leaves)
    if problem.case.operation == "ema_update":
        output = output.clone()
    gradients = {}
    if candidate.grad_output is not None:
        gradients = backward(problem, output, candidate.leaves, candidate.grad_output)
    _synchronize(output)
    return output.detach(), gradients


def _compare(problem: Problem, pending: list[tuple[Candidate, Results]], rows: list[Row]) -> list[Candidate]:
    try:
        found = errors(problem, [results for _, results in pending])
    except torch.OutOfMemoryError as error:
        rows += [_refused(problem, c.implementation, *_failure(error, c.implementation)) for c, _ in pending]
        return []
    for (candidate, _), distances in zip(pending, found, strict=True):
        candidate.output_error = distances.pop("output")
        worst = list(distances.values())
        candidate.gradient_error = float("nan") if any(map(math.isnan, worst)) else max(worst)
    return [candidate for candidate, _ in pending]


def _limit(problem: Problem, checked: list[Candidate]) -> float:
    operation = problem.case.operation
    if operation in FORWARD_ONLY_BOUNDS:
        return FORWARD_ONLY_BOUNDS[operation]
    bound = BOUNDS[problem.case.dtype]
    plain = [c for c in checked if c.implementation.name == PLAIN[operation]]
    error = max((max(c.output_error, c.gradient_error or 0.0) for c in plain), default=0.0)
    return max(bound, min(2 * error, 4 * bound))


def _time(problem: Problem, candidates: list[Candidate], direction: str, options: Options) -> list[Row]:
    rows: list[Row] = []
    cost = work.work(problem.case, direction)
    prepared: dict[str, Prepared] = {}
    by_name = {candidate.implementation.name: candidate for candidate in candidates}
    steps: dict[str, Callable[[], Step]] = {COPY: lambda: _copy_step(cost.min_bytes, options.device)}
    steps |= {name: lambda c=c: _step(problem, c, direction) for name, c in by_name.items()}
    for name, make in steps.items():
        try:
            with options.clock.place():
                step = make()
            prepared[name] = options.clock.prepare(step, capture=cost.min_bytes <= CAPTURED_BYTES)
        except Exception as error:
            _raise_faults(error)
            if name in by_name:
                implementation = by_name[name].implementation
                rows.append(_refused(problem, implementation, *_failure(error, implementation), direction))
    for name, times in time_in_turn(options.clock, prepared, options.seconds).items():
        row = _row(problem, by_name.get(name), direction, "ok")
        row.captured, row.cold_us, row.warm_us = times.captured, quartiles(times.cold_us), quartiles(times.warm_us)
        row.min_bytes, row.flops = cost.min_bytes, cost.flops
        row.moved_bytes = work.work(problem.case, direction, f"{name} {row.note}").moved_bytes if row.ours else 0
        rows.append(row)
    return rows


def _step(problem: Problem, candidate: Candidate, direction: str) -> Step:
    function, leaves, grad_output = candidate.function, candidate.leaves, candidate.grad_output
    if grad_output is None or direction == "forward":
        return lambda: function(**leaves)
    if direction == "backward":
        output = function(**leaves)
        return lambda: backward(problem, output, leaves, grad_output)
    return lambda: backward(problem, function(**leaves), leaves, grad_output)


def _copy_step(num_bytes: int, device: torch.device) -> Step:
    """Reads half of the bytes and writes the other half, in a kernel like any elementwise one (no copy engine)."""
    source = torch.randn(max(1, num_bytes // 8), device=device)
    target = torch.empty_like(source)
    return lambda: torch.mul(source, 1.5, out=target)


def _row(problem: Problem, candidate: Candidate | None, direction: str, status: str, note: str = "") -> Row:
    case = problem.case
    row = Row(
        case.shape.operation,
        case.shape.model,
        case.batch,
        case.shape.name,
        str(case.dtype).removeprefix("torch."),
        candidate.implementation.name if candidate else COPY,
        direction,
        status,
        note,
        count=case.shape.count,
    )
    if candidate:
        row.ours, row.backend = candidate.implementation.ours, candidate.implementation.backend
        row.note = note or candidate.note
        row.output_error, row.gradient_error = candidate.output_error, candidate.gradient_error
    return row


def _refused(
    problem: Problem, implementation: Implementation, status: str, note: str, direction: str = PASSES[0]
) -> Row:
    row = _row(problem, None, direction, status, note)
    row.implementation, row.ours, row.backend = implementation.name, implementation.ours, implementation.backend
    return row


def _failure(error: Exception, implementation: Implementation) -> tuple[str, str]:
    """Status and note of an implementation's exception."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory", text
    # What a candidate cannot do it refuses with these, before anything runs. The kernel that calls get may not: it
    # would break them.
    refuses = isinstance(error, (NotImplementedError, ValueError, TypeError))
    required = implementation.ours and implementation.backend is not None
    return "unavailable" if refuses and not required else "failed", f"{type(error).__name__}: {text}"


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _raise_faults(error)
        raise


def _raise_faults(error: Exception) -> None:
    """Raises: DeviceFault if the error is one after which the process's CUDA context is lost."""
    if isinstance(error, (torch.OutOfMemoryError, DeviceFault)):
        return
    accelerator_error = getattr(torch, "AcceleratorError", ())
    if isinstance(error, accelerator_error) or "CUDA error" in str(error):
        raise DeviceFault(" ".join(str(error).split())[:300]) from error
    if torch.cuda.is_available():
        # Triton words a fault in its own way, and any error may hide one that has not come up yet.
        try:
            torch.cuda.synchronize()
        except Exception as fault:
            raise DeviceFault(" ".join(f"{error}; {fault}".split())[:300]) from error
