"""Runs cases one after the other in one process, and notes every step in a journal that outlives it.

A journal has one JSON object a line: what is about to be done, the rows of a finished case. A process that starts with
a journal goes on where the last one ended, so that a kernel that takes the CUDA context or the whole process down
costs one restart: the implementation that had begun and not ended is listed as failed there, and left out of all cases
of its operation from then on. A case that takes too long ends its process too, since a kernel that hangs cannot be
interrupted. A process that is asked to end (SIGTERM) notes that, so that what had begun is not taken for the culprit;
one that a kernel holds never comes to it, and is killed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.cases import Case
from benchmarks.kernels.harness import DeviceFault, Options, Row, measure
from benchmarks.kernels.work import work
from ldm_kernels.common.shapes import Shape, all_shapes

ALL = "all"  # stands for every implementation of a case that was given up
CASE_LIMIT_S = 90
EXIT_DEVICE_FAULT = 75  # start the same command again: it goes on after the case that did it

# What a case's cost is weighed with to order the cases; round figures of one GPU's rates.
_BYTES_PER_S, _FLOPS_PER_S = 3e12, 6e14

# Shapes of a dry run: everything happens, and nothing takes long.
TINY = (
    Shape(
        "group_norm_silu",
        "tiny",
        (("channels", 8), ("height", 4), ("width", 4), ("groups", 4), ("silu", 1), ("shifted", 0)),
    ),
    Shape(
        "group_norm_silu",
        "tiny",
        (("channels", 8), ("height", 3), ("width", 2), ("groups", 4), ("silu", 0), ("shifted", 1)),
    ),
    Shape("attention", "tiny", (("heads", 2), ("queries", 16), ("keys", 16), ("head_dim", 32))),
    Shape("cross_attention", "tiny", (("heads", 2), ("queries", 16), ("keys", 5), ("head_dim", 32))),
    Shape("geglu", "tiny", (("tokens", 6), ("width", 16))),
    Shape("vector_quantize", "tiny", (("vectors", 12), ("codes", 20), ("dim", 4))),
    Shape("ema_update", "tiny", (("parameters", 1000), ("decays", 1))),
    Shape("ema_update", "tiny", (("parameters", 1000), ("decays", 2))),
)


class Journal:
    """A sweep's memory on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[Row] = []
        self.done: set[str] = set()
        self.unreached: list[str] = []
        self._crashed: dict[str, set[str]] = {}
        begun: dict[str, str] | None = None
        for line in path.read_text().splitlines() if path.exists() else ():
            event = json.loads(line)
            if "begin" in event:
                begun = event
            elif "start" in event and begun:
                self._crashed.setdefault(begun["begin"], set()).add(begun["implementation"])
                begun = None
            elif "done" in event or "stopped" in event:
                begun = None
            self._take(event)
        if begun:
            self._crashed.setdefault(begun["begin"], set()).add(begun["implementation"])

    def crashed(self, case: Case) -> frozenset[str]:
        """Implementations that took a process down in a case of this operation; "" is the timing of this very case."""
        operation = case.shape.operation
        names = {n for other, found in self._crashed.items() if other.startswith(f"{operation} ") for n in found if n}
        return frozenset(names | (self._crashed.get(case.name, set()) & {""}))

    def avoid(self, other: Journal) -> None:
        """Takes over what took the processes of another sweep down."""
        for case, names in other._crashed.items():
            self._crashed.setdefault(case, set()).update(names - {""})

    def crashes(self) -> list[str]:
        """The same for all cases, in words."""
        return [f"{case}: {name or 'while timing'}" for case, names in self._crashed.items() for name in sorted(names)]

    def start(self) -> None:
        """Noted once a process."""
        self._write({"start": time.time()})

    def begin(self, case: Case, stage: str, implementation: str) -> None:
        """Noted before anything that may not come back."""
        self._write({"begin": case.name, "stage": stage, "implementation": implementation})

    def finish(self, case: Case, rows: Sequence[Row]) -> None:
        """Noted with all that came of a case."""
        self._write({"done": case.name, "rows": [asdict(row) for row in rows]})

    def stop(self) -> None:
        """Noted by a process that ends because it was asked to."""
        self._write({"stopped": True})

    def leave(self, names: Sequence[str]) -> None:
        """Cases that the time did not suffice for."""
        self._write({"unreached": list(names)})

    def _write(self, event: dict[str, Any]) -> None:
        # Unbuffered, so that a signal cannot leave half a line.
        with self._path.open("ab", buffering=0) as file:
            file.write((json.dumps(event) + "\n").encode())
        self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        if "done" in event:
            self.done.add(event["done"])
            self.rows += [Row(**row) for row in event["rows"]]
        elif "unreached" in event:
            self.unreached = event["unreached"]


def cases(
    models: Sequence[str],
    batches: Sequence[int],
    dtype: torch.dtype,
    operations: Sequence[str] = (),
    tiny: bool = False,
) -> list[Case]:
    """The cases of the models (prefixes, such as sd2-64; none means all), those that weigh most first.

    Operations take turns, so that whatever time there is goes to all of them. An operation whose shape has no batch
    comes once, in the type that it serves.
    """
    found = []
    for shape in TINY if tiny else all_shapes():
        if not tiny and models and not any(shape.model.startswith(model) for model in models):
            continue
        if operations and shape.operation not in operations:
            continue
        fp32_only = shape.operation in ("ema_update", "vector_quantize")
        for batch in batches[:1] if shape.operation == "ema_update" else batches:
            found.append(Case(shape, batch, torch.float32 if fp32_only else dtype))
    by_operation: dict[str, list[Case]] = {}
    for case in sorted(found, key=_cost_s, reverse=True):
        by_operation.setdefault(case.shape.operation, []).append(case)
    ranked = [(i / len(group), case) for group in by_operation.values() for i, case in enumerate(group)]
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


def run(chosen: Sequence[Case], options: Options, journal: Journal, deadline_s: float) -> bool:
    """Measures the cases that the journal does not have yet, until time.time() passes `deadline_s`.

    False after a device fault: this process can do no more, a new one can.
    """
    journal.start()
    with _noting_a_stop(journal):
        return _run(chosen, options, journal, deadline_s)


@contextlib.contextmanager
def _noting_a_stop(journal: Journal) -> Iterator[None]:
    process = os.getpid()

    def stop(*_: object) -> None:
        # Compilers' processes inherit the handler, and end at any time.
        if os.getpid() == process:
            journal.stop()
        os._exit(0)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(chosen: Sequence[Case], options: Options, journal: Journal, deadline_s: float) -> bool:
    # The signal's own effect, the end of the process: a handler would wait for the call that hangs.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    left = [case for case in chosen if case.name not in journal.done]
    while left and time.time() < deadline_s:
        case = left.pop(0)
        crashed = journal.crashed(case)
        if "" in crashed:
            journal.finish(case, [_given_up(case)])
            continue
        begin_s = time.perf_counter()
        signal.alarm(CASE_LIMIT_S)
        try:
            rows = measure(case, replace(options, excluded=crashed), functools.partial(journal.begin, case))
        except DeviceFault as fault:
            print(f"{case.name}: the device failed: {fault}", flush=True)
            return False
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            rows = [_given_up(case, "out of memory", " ".join(str(error).split())[:200])]
        except Exception as error:
            # One case must not cost the others; it is listed first in what was not timed.
            traceback.print_exc()
            rows = [_given_up(case, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")]
        signal.alarm(0)
        journal.finish(case, rows)
        ok = sorted({row.implementation for row in rows if row.status == "ok"})
        print(f"{case.name}: {time.perf_counter() - begin_s:.1f} s, {', '.join(ok) or rows[0].status}", flush=True)
    journal.leave([case.name for case in left])
    return True


def _given_up(case: Case, status: str = "failed", note: str = "a process did not survive timing it") -> Row:
    dtype = str(case.dtype).removeprefix("torch.")
    shape = case.shape
    return Row(shape.operation, shape.model, case.batch, shape.name, dtype, ALL, "forward", status, note)


def _cost_s(case: Case) -> float:
    """What one forward and backward pass of the model spends at least on this shape, roughly."""
    cost = work(case, "both")
    return case.shape.count * max(cost.min_bytes / _BYTES_PER_S, cost.flops / _FLOPS_PER_S)
