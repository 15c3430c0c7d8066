"""One rank of `benchmarks.start`: `ldm-scale train` that notes in a file when each part of its start has ended.

    python -m benchmarks.start_rank BEGUN FILE KEY=VALUE ...

BEGUN is the clock's reading when this process was asked for; a line of FILE is [part, seconds since then, seconds of
them spent importing]. Every step after the first adds a line.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.start import BATCH, CONFIGURED, ENGINES, FIRST_STEP, INTERPRETER, MET, RESUMED, STEP

importing_s = 0.0


def time_imports() -> None:
    """Nothing; from now on what the main thread imports for the first time is timed, nested imports once."""
    bootstrap: Any = importlib._bootstrap  # type: ignore[attr-defined]  # not in typeshed
    find_and_load, depth = bootstrap._find_and_load, 0

    def timed(*args: Any) -> Any:
        global importing_s
        nonlocal depth
        if threading.current_thread() is not threading.main_thread():
            return find_and_load(*args)
        depth += 1
        began = time.monotonic()
        try:
            return find_and_load(*args)
        finally:
            depth -= 1
            if depth == 0:
                importing_s += time.monotonic() - began

    bootstrap._find_and_load = timed


def main(begun_s: float, path: str, arguments: list[str]) -> int:
    """The training's exit status."""
    with open(path, "a", buffering=1) as file:

        def note(part: str) -> None:
            file.write(json.dumps([part, time.monotonic() - begun_s, importing_s]) + "\n")

        note(INTERPRETER)
        time_imports()
        from ldm_scale.engine import env, phases
        from ldm_scale.operations import train as operations
        from ldm_scale.train import main as train

        start, build_task, enter = env.start, operations.build_task, phases.enter
        seen: set[str] = set()

        def noting_start(*args: Any, **kwargs: Any) -> Any:
            note(CONFIGURED)
            started = start(*args, **kwargs)
            note(MET)
            return started

        def noting_build(*args: Any) -> Any:
            task = build_task(*args)
            note(ENGINES)
            return task

        def noting_enter(phase: str, step: int | None = None) -> None:
            if phase in ("data", "forward") and phase not in seen:
                note({"data": RESUMED, "forward": BATCH}[phase])
            if phases.current.phase == "update" and phase != "update":
                note(STEP if FIRST_STEP in seen else FIRST_STEP)
                seen.add(FIRST_STEP)
            seen.add(phase)
            enter(phase, step)

        replaced: dict[str, tuple[Any, Callable[..., Any]]] = {
            "start": (env, noting_start),
            "build_task": (operations, noting_build),
            "enter": (phases, noting_enter),
        }
        for name, (module, function) in replaced.items():
            setattr(module, name, function)
        return train(arguments)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2], sys.argv[3:]))
