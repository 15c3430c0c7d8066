"""What `benchmarks.pixel_vs_latent` does with its command line."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measured import environment, is_trial, set_threads, threads, write_results
from benchmarks.pixel_latent import costs, quality, tables
from benchmarks.pixel_latent.models import FAMILIES, SCALES, Model, Scale, models
from benchmarks.pixel_latent.plots import plot_cost, plot_quality
from benchmarks.pixel_latent.rounds import groups, peaks, take_turns
from ldm_scale.config.schema import TrainConfig
from ldm_scale.engine import env
from ldm_scale.errors import NumericsError

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = "pixel_vs_latent"
MARK = "result: "


def run(arguments: argparse.Namespace) -> int:
    """0; 1 if a model gave no figures.

    Raises: what `quality.points` does, before anything is measured.
    """
    scale, chosen = SCALES[arguments.scale], models(arguments.family)
    if arguments.peaks:
        print("\n" + MARK + json.dumps(_peaks(chosen, scale, arguments.device)), flush=True)
        return 0
    evaluated = quality.points(arguments.evaluations) if arguments.evaluations else []
    with ThreadPoolExecutor(1) as beside:
        memory = beside.submit(_peaks_of_a_process, arguments)
        # Where one thread computes, its own clock times it, and the process of memory is no matter.
        if arguments.device == "cuda" or threads() > 1:
            wait([memory])
        here = env.start(env.read_launch(), replace(TrainConfig(), device=arguments.device))
        set_threads(here.device)
        figures = measure(chosen, scale, here, arguments.rounds)
        for key, entry in figures.items():
            entry["peak_bytes"] = memory.result().get(key, {})
    described = environment(here.device, datetime.now(UTC).date().isoformat())
    env.stop()
    print(tables.markdown(figures, scale, arguments.rounds, described))
    if not is_trial(arguments.rounds, "rounds"):
        write_all(arguments.out, figures, scale, arguments.rounds, here.device, described, evaluated)
    return int(any(entry["failed"] for entry in figures.values()))


def measure(chosen: Sequence[Model], scale: Scale, here: env.Environment, rounds: int) -> dict[str, dict[str, Any]]:
    """Figures of the models by their keys, without peaks of memory."""
    name = torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else "cpu"
    found = []
    for group in groups(chosen, scale.pairs):
        seconds, failed = take_turns(group, scale, here, rounds)
        found.append(costs.figures_of(group, seconds, failed, scale, (name, here.dtype)))
    return costs.joined(found)


def write_all(
    out: Path,
    figures: Mapping[str, dict[str, Any]],
    scale: Scale,
    rounds: int,
    device: torch.device,
    described: Mapping[str, Any],
    evaluated: Sequence[dict[str, Any]],
) -> None:
    """JSON, CSV, Markdown and the pictures, that of quality where evaluations were given."""
    results = {"scale": asdict(scale), "rounds": rounds, "models": dict(figures), "evaluations": list(evaluated)}
    stem = write_results(out, name_of(figures, scale), device, results).stem
    (out / f"{stem}.csv").write_text(tables.csv_text(figures))
    (out / f"{stem}.md").write_text(tables.markdown(figures, scale, rounds, described))
    where = f"{described['device']}, {scale.resolution} px, batch {scale.batch}, {rounds} rounds"
    narrowed = (
        "" if scale.narrowing == 1 else f"; measured networks are {scale.narrowing} times narrower than published"
    )
    if any(entry["family"] != "inpainting" for entry in figures.values()):
        plot_cost(figures, where + narrowed, out / f"{stem}-cost.png")
    else:
        print("no plot over f: the inpainting models have one f beside pixels; the table has their ratios")
    if evaluated:
        plot_quality(evaluated, "quality against counted cost", out / f"{stem}-quality.png")


def name_of(figures: Mapping[str, dict[str, Any]], scale: Scale) -> str:
    """What the files are called: a run of some families, or of another scale, does not replace one of all."""
    families = list(dict.fromkeys(entry["family"] for entry in figures.values()))
    scales = [name for name, known in SCALES.items() if known == scale and name != "small"]
    return "-".join([BENCHMARK, *scales, *(families if set(families) < set(FAMILIES) else [])])


def _peaks(chosen: Sequence[Model], scale: Scale, device: str) -> dict[str, dict[str, int]]:
    here = env.start(env.read_launch(), replace(TrainConfig(), device=device))
    set_threads(here.device)
    # What only the first model would load is none of its memory.
    peaks(chosen[-1], scale, here)
    found: dict[str, dict[str, int]] = {}
    for model in tqdm(chosen, desc="memory", unit="model", mininterval=1.0):
        try:
            found[model.key] = peaks(model, scale, here)
        except (NumericsError, torch.OutOfMemoryError) as error:  # said again, with its place, by the rounds
            tqdm.write(f"{model.key}: {error}")
    env.stop()
    return found


def _peaks_of_a_process(arguments: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Peak memory of each model, from a process of its own: what glibc is told there would slow timed steps down."""
    command = [sys.executable, "-m", f"benchmarks.{BENCHMARK}", "--peaks", "--scale", arguments.scale]
    command += ["--device", arguments.device, *(word for name in arguments.family for word in ("--family", name))]
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=variables)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:  # killed for memory, perhaps: the times are worth having without
        print(f"peak memory is not known: its process ended with {done.returncode}", file=sys.stderr)
        return {}
    found: dict[str, dict[str, int]] = json.loads(lines[-1].removeprefix(MARK))
    return found
