"""`ldm-scale plan`'s step time and memory against published figures of MLPerf, MosaicML and EDM2, and our own H100.

    python -m benchmarks.plan_against_published                  # tables, the JSON, the plot and the table for the docs
    python -m benchmarks.plan_against_published --fit            # the constants anew, from the rows marked as fitted

Constants are fitted on the rows that say so in `published/*.json`, 8 of 29, chosen before any error was looked at: one
node of 8 GPUs (of MLPerf in each round; of EDM2 the smallest network), and where a campaign needs a second number, the
next row of another size. Every other row is predicted, MLPerf's two of 4 GPUs among them. Nothing is tuned row by row.
Beside the prediction stands what needs no plan: the speed of the first fitted row of the same kind, per GPU (of EDM2,
per multiply-add).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.published_networks import edm2_trace
from benchmarks.published_plot import plot
from ldm_scale.__main__ import run_command
from ldm_scale.config.compose import load_config
from ldm_scale.config.schema import BatchPlan
from ldm_scale.planning.cluster import GPUS, Cluster
from ldm_scale.planning.efficiency import Software
from ldm_scale.planning.jobs import Workload, transformer_trace
from ldm_scale.planning.step_time import Job, simulate
from ldm_scale.planning.trace import Trace

FOLDER = Path(__file__).parent / "published"
CONSTANTS = FOLDER / "constants.json"
DOCS = Path(__file__).parents[1] / "docs" / "results" / "planning"
# OpenCLIP ViT-H/14's text tower up to its penultimate layer, 77 tokens; before v4.0 it ran in every step.
OPENCLIP_H = (23, 1024, 77)
LARGE = 128  # GPUs
CAMPAIGNS = ("mlperf", "mosaic", "edm2")


@dataclass(frozen=True)
class Row:
    """A published speed, and the step that is played through for it."""

    campaign: str
    label: str
    software: str  # key of the constants
    job: Job
    cluster: Cluster
    images_per_s: float
    fitted: bool
    held: bool  # among the rows of the goal; else another GPU with the constants of the H100

    def predicted(self, software: Software) -> float:
        """Images/s of the whole cluster."""
        return self.job.images * self.cluster.num_gpus / simulate(self.job, self.cluster, software).total


@cache
def sd2(side: int, fused: bool) -> Workload:
    """SD-2's UNet alone, whose context is given."""
    config = load_config(
        ["experiment=sd2", "conditioning=frozen_openclip_h", f"data.resolution={8 * side}", "ema.half_life_images=0"]
    )
    return Workload(config, (4, side, side), "bf16", cached=True, fused=fused)


def read(name: str) -> dict[str, Any]:
    """A file of published figures."""
    document: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return document


def rows() -> list[Row]:
    """All published speeds."""
    made = {"mlperf": _mlperf_row, "mosaic": _mosaic_row, "edm2": _edm2_row}
    return [made[name](row) for name in CAMPAIGNS for row in read(name)["rows"]]


def _cluster(row: dict[str, Any]) -> Cluster:
    per_node = min(row["num_gpus"], 8)
    return Cluster(GPUS[row["gpu"]], per_node, row["num_gpus"] // per_node)


def _mlperf_row(row: dict[str, Any]) -> Row:
    first = row["round"] == "3.1"  # no sharded optimizer yet, captions encoded in the step
    batches = BatchPlan(row["micro_batch"], 1, row["micro_batch"] * row["num_gpus"])
    job = dataclasses.replace(
        sd2(64, True).job(batches, 0 if first else 1, "none"), overlaps=True, loading_s=0, read_bytes=0
    )
    if first:
        tower: Trace = transformer_trace(*OPENCLIP_H, 2)
        job = dataclasses.replace(job, frozen=(("text encoder", tower),), bucket_elements=50_000_000)
    label = f"MLPerf {row['round']} {row['system']}"
    key = f"mlperf-{row['round']}" if row["round"] != "5.0" else "mlperf-4.1"
    return Row("mlperf", label, key, job, _cluster(row), row["images_per_s"], row["fitted"], row["of_the_median"])


def _mosaic_row(row: dict[str, Any]) -> Row:
    steps = row["global_batch"] // row["num_gpus"] // row["micro_batch"]
    batches = BatchPlan(row["micro_batch"], steps, row["global_batch"])
    job = sd2(row["resolution"] // 8, False).job(batches, 2, "none")
    job = dataclasses.replace(job, loading_s=0, read_bytes=0)
    label = f"Mosaic {row['resolution']} px"
    return Row("mosaic", label, "mosaic", job, _cluster(row), row["images_per_s"], row["fitted"], row["of_the_median"])


def _edm2_row(row: dict[str, Any]) -> Row:
    trace = edm2_trace(row["base_channels"], 1e6 * row["mparams"], 1e9 * row["gmac"])
    job = Job(
        trace=trace,
        precision="bf16",
        parameters=round(1e6 * row["mparams"]),
        stage=0,
        micro_batch=row["micro_batch"],
        averages=2,
        bucket_elements=25 * 2**20 // 4,  # DDP's buckets of 25 MiB
        gradient_bytes=4,
    )
    label = f"EDM2-{row['network']}"
    return Row("edm2", label, "edm2", job, _cluster(row), row["images_per_s"], row["fitted"], row["of_the_median"])


def constants() -> dict[str, Software]:
    """The committed constants of each campaign's software."""
    document = json.loads(CONSTANTS.read_text("utf-8"))
    return {key: Software(**value) for key, value in document["software"].items()}


def fit(all_rows: Sequence[Row]) -> dict[str, Software]:
    """Constants from the fitted rows alone."""
    by_key: dict[str, list[Row]] = {}
    for row in all_rows:
        if row.fitted:
            by_key.setdefault(row.software, []).append(row)
    found: dict[str, Software] = {}
    for key in sorted(by_key, key=lambda key: -len(by_key[key])):  # rounds with one row take the other's operation_s
        labels = "; ".join(f"{row.label} on {row.cluster.num_gpus}" for row in by_key[key])
        known = found["mlperf-4.0"].operation_s if len(by_key[key]) == 1 else None
        share, operation_s = _solve(by_key[key], known)
        borrowed = "" if known is None else ", operation_s of mlperf-4.0"
        found[key] = Software(share, operation_s, f"fitted: {labels}{borrowed}")
    # Ours, for `plan --gpu`: the one step that was measured, without CUDA graphs, as Mosaic's.
    share, operation_s = _solve([own_speed()], found["mosaic"].operation_s)
    found["own"] = Software(share, operation_s, "fitted: SD-2's bare step on our H100, operation_s of mosaic")
    return found


def _solve(fitted: list[Row], operation_s: float | None) -> tuple[float, float]:
    """matrix_share and, unless it is known, operation_s, with the least squared log ratio to the fitted rows."""
    import numpy as np
    from scipy.optimize import least_squares

    def misses(x: Any) -> list[float]:
        seconds = operation_s if operation_s is not None else float(x[1]) * 1e-6
        software = Software(float(x[0]), seconds, "")
        return [float(np.log(row.predicted(software) / row.images_per_s)) for row in fitted]

    start, bounds = ([0.6, 5.0], ([0.05, 0.0], [1.0, 100.0]))
    if operation_s is not None:
        start, bounds = start[:1], (bounds[0][:1], bounds[1][:1])
    solution = least_squares(misses, start, bounds=bounds, diff_step=1e-3)
    return round(float(solution.x[0]), 4), operation_s if operation_s is not None else round(
        float(solution.x[1]), 3
    ) / 1e6


def unplanned(name: str) -> list[float]:
    """Images/s of a campaign's rows by the first fitted one of the same kind: per GPU; of EDM2, per multiply-add."""
    found, known = [], read(name)["rows"]
    for row in known:
        kind = "round" if name == "mlperf" else "resolution"
        alike = [other for other in known if other["fitted"] and other.get(kind) == row.get(kind)]
        # MLPerf's 5.0 has no fitted row: it is predicted with the constants of 4.1.
        first = (alike or [other for other in known if other["fitted"]][-1:])[0]
        work = first["gmac"] / row["gmac"] if name == "edm2" else row["num_gpus"] / first["num_gpus"]
        found.append(first["images_per_s"] * work)
    return found


def compared(all_rows: Sequence[Row], software: dict[str, Software]) -> list[dict[str, Any]]:
    """Every row with its prediction and error."""
    result = []
    scaled = [speed for name in CAMPAIGNS for speed in unplanned(name)]
    for row, linear in zip(all_rows, scaled, strict=True):
        predicted = row.predicted(software[row.software])
        step = simulate(row.job, row.cluster, software[row.software])
        result.append(
            {
                "campaign": row.campaign,
                "row": row.label,
                "gpu": row.cluster.gpu.name,
                "num_gpus": row.cluster.num_gpus,
                "micro_batch": row.job.micro_batch,
                "accumulation_steps": row.job.accumulation_steps,
                "published": row.images_per_s,
                "predicted": round(predicted, 1),
                "error": round(predicted / row.images_per_s - 1, 4),
                "error_unplanned": round(linear / row.images_per_s - 1, 4),
                "fitted": row.fitted,
                "of_the_median": row.held,
                "step_s": {k: v for k, v in dataclasses.asdict(step).items() if k != "frozen"} | {"total": step.total},
            }
        )
    return result


def median_error(
    compared_rows: Sequence[dict[str, Any]], choose: Callable[[dict[str, Any]], bool], key: str = "error"
) -> float:
    """Median of the absolute errors of the rows that are chosen."""
    return statistics.median(abs(row[key]) for row in compared_rows if choose(row))


def is_predicted(row: dict[str, Any]) -> bool:
    """A row of the goal that no constant was fitted on."""
    return bool(row["of_the_median"]) and not row["fitted"]


def memory_rows() -> list[dict[str, Any]]:
    """MLPerf's peaks against the plan's parts: fp16 weights, sharded fp32 masters and moments, no average."""
    result = []
    for row in read("mlperf")["memory"]["rows"]:
        batches = BatchPlan(row["micro_batch"], 1, row["micro_batch"] * row["num_gpus"])
        plan = sd2(64, True).memory(batches, row["num_gpus"], 1, "none")
        held = {k: v for k, v in plan.device.held.items() if k in ("weights", "masters", "moments")}
        # NeMo's sharded optimizer keeps all fp16 gradients in a buffer of their own from the start.
        trace, parameters = sd2(64, True).trace("none"), sd2(64, True).parameters
        activations = trace.peak(row["micro_batch"], 0, 10**12)
        predicted = (sum(held.values()) + 2 * parameters + activations) / 1e9
        result.append(row | {"predicted_gb": round(predicted, 2), "error": round(predicted / row["gb"] - 1, 4)})
    return result


def own_speed() -> Row:
    """The project's own measured step on an H100, kernels on; no part of the median."""
    job = sd2(64, True).job(BatchPlan(32, 1, 32), 0, "none")
    job = dataclasses.replace(job, loading_s=0, read_bytes=0)
    return Row("own", "SD-2's bare step", "own", job, Cluster(GPUS["h100"], 1, 1), 32 / 0.234, True, False)


def own_rows() -> list[dict[str, Any]]:
    """The project's own H100: SD-2's bare step at batch 32 in bf16, kernels off and on (benchmarks/README.md)."""
    result = []
    for fused, gib, seconds in ((False, 34.3, 0.278), (True, 28.7, 0.234)):
        work = sd2(64, fused)
        # torch's AdamW in bf16: weights and both moments, no masters; gradients come one by one, and stay.
        predicted = (6 * work.parameters + work.trace("none").peak(32, 2, 10**12)) / 2**30
        result.append(
            {"kernels": "on" if fused else "off", "gib": gib, "predicted_gib": round(predicted, 2), "step_s": seconds}
            | {"error": round(predicted / gib - 1, 4)}
        )
    return result


def table(compared_rows: Sequence[dict[str, Any]]) -> str:
    """Published and predicted speeds in Markdown."""
    lines = [
        "| row | GPUs | images per GPU and pass | published images/s | predicted | error | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in compared_rows:
        micro = f"{row['micro_batch']}" + (f" x {row['accumulation_steps']}" if row["accumulation_steps"] > 1 else "")
        note = "fitted" if row["fitted"] else "" if row["of_the_median"] else "another GPU or round"
        lines.append(
            f"| {row['row']} | {row['num_gpus']} {row['gpu']} | {micro} | {row['published']:,.0f} | "
            f"{row['predicted']:,.0f} | {100 * row['error']:+.1f}% | {note} |"
        )
    return "\n".join(lines)


def memory_table(mlperf: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]) -> str:
    """Published and measured peaks beside the planned ones, in Markdown."""
    lines = ["| peak of a GPU | published or measured | planned | error |", "|---|---|---|---|"]
    for row in mlperf:
        lines.append(
            f"| MLPerf 5.0, {row['micro_batch']} images, {row['num_gpus']} GPUs | {row['gb']:.1f} GB | "
            f"{row['predicted_gb']:.1f} GB | {100 * row['error']:+.1f}% |"
        )
    for row in own:
        lines.append(
            f"| our H100, SD-2's bare step, 32 images, kernels {row['kernels']} | {row['gib']:.1f} GiB | "
            f"{row['predicted_gib']:.1f} GiB | {100 * row['error']:+.1f}% |"
        )
    return "\n".join(lines)


def summary(compared_rows: Sequence[dict[str, Any]]) -> str:
    """Medians, overall and by campaign."""
    lines = []
    groups: list[tuple[str, Callable[[dict[str, Any]], bool]]] = [("all predicted rows", is_predicted)]
    groups += [(name, lambda row, name=name: is_predicted(row) and row["campaign"] == name) for name in CAMPAIGNS]
    groups.append((f"{LARGE} GPUs and more", lambda row: is_predicted(row) and row["num_gpus"] >= LARGE))
    groups.append(("other GPUs and rounds, constants of the H100", lambda row: not row["of_the_median"]))
    for name, choose in groups:
        chosen = [row for row in compared_rows if choose(row)]
        worst = max(chosen, key=lambda row: abs(row["error"]))
        lines.append(
            f"| {name} | {len(chosen)} | {100 * median_error(compared_rows, choose):.1f}% | "
            f"{100 * median_error(compared_rows, choose, 'error_unplanned'):.1f}% | "
            f"{100 * worst['error']:+.1f}% ({worst['row']}, {worst['num_gpus']} GPUs) |"
        )
    head = "| rows | number | median error | without a plan | largest of the plan |"
    return "\n".join([head, "|---|---|---|---|---|", *lines])


def main(argv: Sequence[str]) -> int:
    """0, after printing the tables and writing the files."""
    parser = argparse.ArgumentParser(description="The planner against published figures.")
    parser.add_argument("--fit", action="store_true", help="write the constants anew")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the JSON file and the plot")
    arguments = parser.parse_args(argv)
    all_rows = rows()
    if arguments.fit:
        software = {key: dataclasses.asdict(value) for key, value in fit(all_rows).items()}
        document = {"what": "fitted by python -m benchmarks.plan_against_published --fit", "software": software}
        CONSTANTS.write_text(json.dumps(document, indent=1) + "\n")
    speeds = compared(all_rows, constants())
    memory, own = memory_rows(), own_rows()
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = {"torch": torch.__version__, "speeds": speeds, "memory": memory, "own": own}
    (arguments.out / "published.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(speeds, arguments.out / "published.png")
    print("\n\n".join([summary(speeds), table(speeds), memory_table(memory, own)]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
