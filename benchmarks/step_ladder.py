"""What each switch of the training step brings: one more at a time, from the plainest step to all of them.

A step is forward, eps loss, backward and AdamW on one UNet and one batch, as in `unet_step`. The ladder begins with
activations in planes (NCHW), attention written out, norms and gates of single torch operations and AdamW's loop over
lists of tensors; every rung adds one switch, compiled blocks last, and keeps those before (in the manner of published
ladders: a figure for each rung, with what came before still on). All rungs take turns in one process on the same
weights. Before anything is timed, every rung's output and gradients, and the two AdamWs' updates of one gradient, are
compared with the plainest step in fp32: each of them may be 1e-4 off, or in bf16 twice as far as the plainest step in
bf16 is. A rung that is further off in one of them is listed without a speed-up. Rungs that this device does not have,
or that do not fit into its memory, are listed with the reason; the first that fits is then the baseline.

Beside the ladder, sweeps with everything on but compilation: by batch, by resolution of the latents, by what is
recomputed in backward, and by ZeRO stage (which on one rank shows what sharding costs, on several what it costs and
sends).

    python -m benchmarks.step_ladder [--device cuda] [--case demo] [--rounds 20] [--only ladder --only batch]
    torchrun --nproc-per-node 2 -m benchmarks.step_ladder --only zero

CUDA computes in bf16, the CPU in fp32. On CUDA a rung's peak memory is of its own weights, gradients and moments, and
what its step takes beside them: what other rungs keep on the device is not in it. Output: JSON, the same rows as CSV,
and a picture of bars.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.harness import Way, speed_up, take_turns
from benchmarks.measured import command_line, is_trial, own_peak, parse, set_threads, step_clock, write_cases
from benchmarks.step_sweeps import SWEEPS, WARMUP_ROUNDS
from benchmarks.step_ways import (
    LEARNING_RATE,
    PLAIN,
    TOO_LARGE,
    Rung,
    adamw,
    cast,
    differences,
    fitting,
    furthest_off,
    network,
    rungs,
    timed,
    train,
    using,
    variants,
)
from benchmarks.unet_step import Case, cases, random_batch
from ldm_scale.__main__ import run_command
from ldm_scale.config.schema import TrainConfig
from ldm_scale.engine import env

DEFAULT_CASE = "demo"
LADDER = "ladder"


def measure(case: Case, device: torch.device, rounds: int, name: str) -> list[dict[str, Any]]:
    """A row for each rung."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    module, batch = network(case, device), random_batch(case, device)
    ladder = rungs(device)
    here = [rung for rung in ladder if not rung.missing]
    off = differences(module, batch, here, dtype)
    module.to(dtype)
    batch = cast(batch, dtype)
    networks = variants(module, here)
    optimizers = {
        (compiled, fused): adamw(list(network.parameters()), fused, LEARNING_RATE)
        for compiled, network in networks.items()
        for fused in (False, True)
    }
    peaks: dict[str, float] = {}

    def way(rung: Rung) -> Way:
        trained, optimizer = (
            networks[rung.setting.compiled],
            optimizers[rung.setting.compiled, rung.setting.fused_adamw],
        )

        @contextmanager
        def around() -> Iterator[None]:
            with using(trained, rung.setting), own_peak(device, trained, optimizer, peaks, rung.name):
                yield

        return Way(partial(train, trained, optimizer, batch), around)

    ways = {rung.name: way(rung) for rung in here}
    ways, clock = fitting(ways), step_clock(device, ranks=1)
    turns = take_turns(ways, rounds, warmup=WARMUP_ROUNDS, clock=clock, name=f"{name}: ladder")
    base = next(iter(ways), PLAIN)
    rows = []
    for rung in ladder:
        row = {"part": LADDER, "name": rung.name, "setting": asdict(rung.setting), "batch": case.batch}
        if rung.name not in ways:
            rows.append(row | {"missing": rung.missing or TOO_LARGE})
            continue
        worst, difference, allowed = furthest_off(off[rung.name], off[PLAIN])
        rows.append(row | timed(turns, rung.name, case.batch, peaks) | {"off": off[rung.name], "furthest_off": worst})
        rows[-1] |= speed_up(turns, rung.name, base, difference, allowed)
    return rows


def main(argv: Sequence[str]) -> int:
    """0; a rung that computes something else is in the table without a speed-up."""
    description = "The training step, one switch at a time, and by what it trains."
    parser = command_line(description, cases(), "rounds", 20, DEFAULT_CASE)
    parts = (LADDER, *SWEEPS)
    parser.add_argument("--only", choices=parts, action="append", help="a part; may be repeated (default: all)")
    arguments = parse(parser, argv)
    launch = env.read_launch()
    wanted = arguments.only or list(parts)
    if launch.world_size > 1 and wanted != ["zero"]:
        parser.error(f"{launch.world_size} ranks: they compare ZeRO stages alone; give --only zero, or start one rank")
    here = env.start(launch, TrainConfig(device=arguments.device))
    set_threads(here.device, here.launch.local_world_size)
    results: dict[str, Any] = {}
    for name in arguments.case or [DEFAULT_CASE]:
        case = cases()[name]
        rows = measure(case, here.device, arguments.rounds, name) if LADDER in wanted else []
        for part in SWEEPS:
            rows += SWEEPS[part](case, here, arguments.rounds, name) if part in wanted else []
        results[name] = {"case": asdict(case), "ranks": here.world_size, "rounds": arguments.rounds, "rows": rows}
    if here.is_main:
        print(table(results))
        if not is_trial(arguments.rounds, "rounds"):
            path = write_cases(arguments.out, "step_ladder", here.device, results)
            results = json.loads(path.read_text())["results"]  # those of the day's other cases too
            write_csv(results, path.with_suffix(".csv"))
            draw(results, path.with_suffix(".png"))
    env.stop()
    return 0


def table(results: dict[str, Any]) -> str:
    """A line per case, part and row."""
    head = f"{'':<52}{'ms':>9}{'quartiles':>20}{'images/s':>10}{'times as fast, 95%':>24}{'off by':>9}{'peak GiB':>10}"
    lines = [head]
    for name, result in results.items():
        for row in result["rows"]:
            label = f"{name} {row['part']}: {row['name']}"
            if "missing" in row:
                lines.append(f"{label:<52}  not here: {row['missing']}")
                continue
            ms = {key: 1e3 * value for key, value in row["step_s"].items()}
            quartiles = f"{ms['lower_quartile']:.1f} .. {ms['upper_quartile']:.1f}"
            peak = f"{row['peak_mem_gib']:.2f}" if "peak_mem_gib" in row else ""
            off = f"{row['difference']:.0e}" if "difference" in row else ""
            line = f"{label:<52}{ms['median']:>9.1f}{quartiles:>20}{row['images_per_s']:>10.1f}"
            lines.append(f"{line}{_faster(row):>24}{off:>9}{peak:>10}".rstrip())
    return "\n".join(lines)


def _faster(row: Mapping[str, Any]) -> str:
    if "refused" in row:
        return "another result"
    if "speed_up" not in row:
        return ""
    low, high = row["speed_up_median_range"]
    return f"{row['speed_up']['median']:.3f} ({low:.3f} .. {high:.3f})"


def write_csv(results: dict[str, Any], path: Path) -> None:
    """Nothing; the rows lie there as a table."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["case", "part", "name", "step_ms", "images_per_s", "speed_up", "from", "to", "off_by", "peak_gib", "note"]
        )
        for name, result in results.items():
            for row in result["rows"]:
                step_ms = 1e3 * row["step_s"]["median"] if "step_s" in row else ""
                low, high = row.get("speed_up_median_range", ("", ""))
                ratio = row["speed_up"]["median"] if "speed_up" in row else ""
                figures = [step_ms, row.get("images_per_s", ""), ratio, low, high, row.get("difference", "")]
                rounded = [f"{value:.5g}" if isinstance(value, float) else value for value in figures]
                note = row.get("missing") or row.get("refused", "")
                writer.writerow([name, row["part"], row["name"], *rounded, row.get("peak_mem_gib", ""), note])


def draw(results: dict[str, Any], path: Path) -> None:
    """Nothing; a panel of bars per case and part: times as fast as the plainest where that is said, else images/s."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        for row in result["rows"]:
            if "step_s" in row and "refused" not in row:
                panels.setdefault(f"{name}: {row['part']}", []).append(row)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, sum(1 + 0.4 * len(rows) for rows in panels.values())), squeeze=False
    )
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=True):
        rows = rows[::-1]  # the first one on top
        if all("speed_up" in row for row in rows):
            values = [row["speed_up"]["median"] for row in rows]
            ranges = [row["speed_up_median_range"] for row in rows]
            reach = [[v - r[0] for v, r in zip(values, ranges, strict=True)],
                     [r[1] - v for v, r in zip(values, ranges, strict=True)]]  # fmt: skip
            axis.barh([row["name"] for row in rows], values, xerr=reach, capsize=3)
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.set_xlabel("times as fast as the first (lines: 95% range of the median)")
        else:
            axis.barh([row["name"] for row in rows], [row["images_per_s"] for row in rows])
            axis.set_xlabel("images/s")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
