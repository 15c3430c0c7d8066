"""Starts: from the process to the end of the first step, and from a killed rank to training again.

The command is `ldm-scale train` of a demo experiment, on shards that are made for it; its ranks are processes of this
host. A round starts it in an empty folder, lets it train until there is a checkpoint and some steps more, kills its
last rank (SIGKILL), waits for the others to end by themselves and starts the same command again, as a scheduler does
that loses no time. The split of a start is rank 0's (benchmarks/start_rank.py); each part is given without what it
imports, which is a part of its own.

    python -m benchmarks.start [--case stage1] [--ranks 2] [--rounds 10]
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measured import command_line, is_trial, parse, spread, write_results
from ldm_scale.__main__ import run_command

INTERPRETER, CONFIGURED, MET, ENGINES = "interpreter", "configuration, inputs", "rendezvous, comparison", "engines"
RESUMED, BATCH, FIRST_STEP, STEP = "checkpoint", "first batch", "first step", "step"
PARTS = (INTERPRETER, CONFIGURED, MET, ENGINES, RESUMED, BATCH, FIRST_STEP)
IMPORTS, TOTAL = "imports", "total"
EXPERIMENTS = {"stage1": "demo_autoencoder", "stage2": "demo_text"}
STEPS_AFTER_SAVE = 3
PATIENCE_S = 600.0
NUM_IMAGES, NUM_SHARDS, SIDE = 256, 8, 64
Line = tuple[str, float, float]


def main(argv: Sequence[str]) -> int:
    """0."""
    parser = command_line("Starts of a training, and starts after a kill.", EXPERIMENTS, "rounds", 10)
    parser.add_argument("--ranks", type=int, action="append", help="default: 1 and 2")
    arguments = parse(parser, argv)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="start") as folder:
        make_inputs(Path(folder))
        for case in arguments.case or EXPERIMENTS:
            for ranks in arguments.ranks or (1, 2):
                run = Run(Path(folder), case, ranks, arguments.device)
                rounds = range(arguments.rounds + 1)  # the first one warms the system's cache
                measured = [run.round() for _ in tqdm(rounds, desc=f"{case}, {ranks} rank(s)", unit="round")][1:]
                results[f"{case}-{ranks}"] = {"ranks": ranks} | summary(measured)
    print(table(results))
    if not is_trial(arguments.rounds, "rounds"):
        write_results(arguments.out, "start", torch.device(arguments.device), results)
    return 0


def make_inputs(folder: Path) -> None:
    """Nothing; the folder has a manifest of pictures and an autoencoder's artifact with random weights."""
    from benchmarks.data_shards import make_pictures
    from ldm_scale.config.compose import load_config
    from ldm_scale.data.sources.tars import index_tars
    from ldm_scale.interchange.artifact import write_artifact
    from ldm_scale.models.autoencoder import LatentStatistics
    from ldm_scale.models.build import build_autoencoder, build_seeded

    config = load_config([f"experiment={EXPERIMENTS['stage1']}"])
    index_tars(make_pictures(folder / "data", NUM_IMAGES, NUM_SHARDS, SIDE), folder / "data" / "manifest.json", "train")
    network = build_seeded(lambda: build_autoencoder(config.autoencoder), seed=0)
    statistics = LatentStatistics(num_images=NUM_IMAGES)
    provenance = {"images": 0, "resolution": config.data.resolution, "weights": "raw"}
    write_artifact(folder / "artifact", network.state_dict(), config.autoencoder, statistics, provenance)


class Run:
    """One command on so many ranks, started again and again; `overrides` come last."""

    def __init__(self, folder: Path, case: str, ranks: int, device: str, overrides: Sequence[str] = ()) -> None:
        self._folder, self._ranks = folder, ranks
        self.run_dir = folder / "run"
        self._arguments = [
            f"experiment={EXPERIMENTS[case]}",
            f"run_dir={self.run_dir}",
            f"data.manifest={folder / 'data' / 'manifest.json'}",
            "data.validation_split=",
            f"artifact={folder / 'artifact' if case == 'stage2' else ''}",
            f"train.device={device}",
            "train.total_images=1000000",
            "train.validate_every_images=0",
            "train.sample_every_images=0",
            "train.checkpoint_every_images=64",
            *overrides,
        ]

    def round(self) -> dict[str, dict[str, float]]:
        """Seconds of the parts of a start, of one that continues, and from the kill to training."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        with self._started("first") as (processes, lines):
            first = split(self._wait(processes, lines, _has_begun))
            self._wait(processes, lines, lambda _: any(self.run_dir.glob("checkpoints/images-*")))
            steps = len(lines())
            self._wait(processes, lines, lambda found: len(found) >= steps + STEPS_AFTER_SAVE)
            killed_s = time.monotonic()
            processes[-1].send_signal(signal.SIGKILL)
            for process in processes:
                process.wait(PATIENCE_S)
            ended_s = time.monotonic()
        with self._started("second") as (processes, lines):
            begun_s = time.monotonic()
            again = split(self._wait(processes, lines, _has_begun))
        after = {"until all ranks have ended": ended_s - killed_s, "until training again": begun_s - killed_s}
        after["until training again"] += again[TOTAL]
        return {"start": first, "start that continues": again, "after a kill": after}

    def until_saved(self) -> None:
        """Nothing; the run has a checkpoint, and was killed."""
        with self._started("first") as (processes, lines):
            self._wait(processes, lines, lambda _: any(self.run_dir.glob("checkpoints/images-*")))

    def again(self, module: str) -> dict[str, float]:
        """Seconds of the parts of a start that continues, its ranks being of this module; it is killed then."""
        with self._started("again", module) as (processes, lines):
            return split(self._wait(processes, lines, _has_begun))

    @contextmanager
    def _started(self, name: str, module: str = "benchmarks.start_rank") -> Any:
        """The ranks' processes, and what returns rank 0's lines; the processes end with the block."""
        port, processes = _free_port(), []
        log, notes = self._folder / "log", [self._folder / f"{name}-{rank}.jsonl" for rank in range(self._ranks)]
        self._log = log
        with log.open("w") as output:
            for rank, path in enumerate(notes):
                path.unlink(missing_ok=True)
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self._ranks, "LOCAL_WORLD_SIZE": self._ranks}
                environ = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                environ |= {key: str(value) for key, value in place.items()}
                command = [sys.executable, "-m", module, str(time.monotonic()), str(path)]
                processes.append(
                    subprocess.Popen([*command, *self._arguments], env=environ, stdout=output, stderr=output)
                )
            try:
                yield processes, lambda: read_lines(notes[0])
            finally:
                for process in processes:
                    process.kill()
                    process.wait()

    def _wait(
        self,
        processes: Sequence[subprocess.Popen[bytes]],
        lines: Callable[[], list[Line]],
        holds: Callable[[list[Line]], bool],
    ) -> list[Line]:
        """Rank 0's lines, as soon as the condition holds for them."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds(found := lines()):
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                raise RuntimeError(f"the training did not come that far:\n{self._log.read_text()}")
            time.sleep(0.02)
        return found


def read_lines(path: Path) -> list[Line]:
    """What a rank has noted so far."""
    text = path.read_text() if path.exists() else ""
    return [tuple(json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _has_begun(lines: list[Line]) -> bool:
    return any(part == FIRST_STEP for part, *_ in lines)


def split(lines: Sequence[Line]) -> dict[str, float]:
    """Seconds of each part without its imports, of all imports, and of the whole start."""
    seconds, before_s, imported_s = {}, 0.0, 0.0
    for part, at_s, importing_s in lines[: len(PARTS)]:
        seconds[part] = at_s - before_s - (importing_s - imported_s)
        before_s, imported_s = at_s, importing_s
    assert tuple(seconds) == PARTS, f"{list(seconds)} are not the parts of a start"
    return {IMPORTS: imported_s} | seconds | {TOTAL: before_s}


def summary(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The spread of every figure over the rounds."""
    return {
        kind: {name: spread([found[kind][name] for found in rounds]) for name in figures}
        for kind, figures in rounds[0].items()
    }


def table(results: dict[str, Any]) -> str:
    """A line per figure: median and quartiles in seconds."""
    lines = []
    for case, kinds in results.items():
        for kind, figures in kinds.items():
            if kind == "ranks":
                continue
            lines.append(f"{f'{case} rank(s): {kind}':<44}{'median s':>9}{'quartiles':>18}")
            for name, values in figures.items():
                quartiles = f"{values['lower_quartile']:.2f} .. {values['upper_quartile']:.2f}"
                lines.append(f"  {name:<42}{values['median']:>9.2f}{quartiles:>18}")
    return "\n".join(lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
