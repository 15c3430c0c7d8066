"""Memory and open files of loading for half an hour: flat, or not.

Two trainings at once, each a process with two loader processes: one reads local shards, one the same shards from a web
server on loopback that resets connections in the middle of an answer. Some pictures are cut short, so that samples are
replaced all the time. Every minute each training opens a second loader beside the first, as validation does, and leaves
it midway. Memory and open descriptors of each process and its children are sampled between validations; a straight line
is fitted over the second half of the time. Flat: it rises by less than MAX_MIB_PER_MINUTE and MAX_FILES_PER_MINUTE.

Memory is what belongs to the processes and nothing else could hold: anonymous pages and shared ones. Pages of files
(libraries, sidecars) come and go with what else the machine does, and are written down beside.

    make data-soak [MINUTES=30]
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import psutil
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.data_shards import make_pictures
from benchmarks.measured import RESULTS, write_results
from ldm_scale.__main__ import run_command
from ldm_scale.config.schema import DataConfig
from ldm_scale.data import build_loader
from ldm_scale.data.sources.tars import index_tars
from tests.helpers.fault_server import FaultServer, fault

MAX_MIB_PER_MINUTE = 1.0  # of a process and its two loader processes
MAX_FILES_PER_MINUTE = 0.5
SOURCES = ("local", "http")
NUM_SAMPLES, NUM_SHARDS, SIDE, BROKEN_SHARE = 3200, 64, 256, 0.005
RESOLUTION, BATCH, WORKERS = 64, 32, 2
VALIDATE_S, VALIDATION_BATCHES = 60.0, 20
SETTLED_S = 5.0  # after a validation
EVERY_S = 10.0  # between two samples
RESETS_PER_S = 1.0
COLUMNS = ("seconds", "memory_mib", "file_mib", "open_files", "processes", "images", "since_validation_s")
SECONDS, MEMORY, FILE, FILES, PROCESSES, IMAGES, SINCE = range(len(COLUMNS))


def main(argv: Sequence[str]) -> int:
    """0 if memory and open files are flat, 1 if not."""
    parser = argparse.ArgumentParser(description="Memory and open files of loading over time.")
    parser.add_argument("--minutes", type=float, default=30.0, help="below 10: a trial, not written (30)")
    parser.add_argument("--source", choices=SOURCES, action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file and the picture")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="data_soak") as folder:
        samples = soak(Path(folder), arguments.source or SOURCES, arguments.minutes * 60)
    results = {source: evaluate(rows) for source, rows in samples.items()}
    flat = all(result["is_flat"] for result in results.values())
    print(table(results))
    if arguments.minutes >= 10:
        name = "-".join(["data_soak", *(arguments.source or ())])
        write_results(arguments.out, name, torch.device("cpu"), {"settings": settings(), "sources": results})
        picture = arguments.out / f"{name}-cpu-{datetime.now(UTC).date().isoformat()}.png"
        draw(samples, picture)
        print(f"drawn to {picture}")
    return 0 if flat else 1


def settings() -> dict[str, Any]:
    """What was loaded, and the bounds."""
    return {
        "samples": NUM_SAMPLES,
        "shards": NUM_SHARDS,
        "jpeg_px": SIDE,
        "broken_share": BROKEN_SHARE,
        "resolution": RESOLUTION,
        "batch": BATCH,
        "workers": WORKERS,
        "validate_s": VALIDATE_S,
        "validation_batches": VALIDATION_BATCHES,
        "settled_s": SETTLED_S,
        "resets_per_s": RESETS_PER_S,
        "max_mib_per_minute": MAX_MIB_PER_MINUTE,
        "max_files_per_minute": MAX_FILES_PER_MINUTE,
    }


def soak(folder: Path, sources: Sequence[str], seconds: float) -> dict[str, list[list[float]]]:
    """For each source its samples, a row of COLUMNS each."""
    tars = make_pictures(folder / "tars", NUM_SAMPLES, NUM_SHARDS, SIDE, BROKEN_SHARE)
    served = {f"/{tar.name}": tar.read_bytes() for tar in tars} if "http" in sources else {}
    with FaultServer(served) as server:
        names = {"local": [str(tar) for tar in tars], "http": [server.url(path) for path in served]}
        processes: dict[str, SpawnProcess] = {}
        counts: dict[str, tuple[Any, Any]] = {}  # images, and when a validation ended
        context = multiprocessing.get_context("spawn")
        for source in sources:
            manifest = folder / source / "manifest.json"
            index_tars(names[source], manifest, "train")
            counts[source] = context.Value("q", 0), context.Value("d", time.monotonic())
            processes[source] = context.Process(target=load, args=(manifest, seconds, *counts[source]), name=source)
            processes[source].start()
        try:
            return _watch(processes, counts, seconds, server)
        finally:
            for process in processes.values():
                process.terminate()
                process.join()


def load(manifest: Path, seconds: float, images: Any, validated: Any) -> None:
    """Nothing; loads for so long, with the number of images and the end of the last validation in shared memory."""
    torch.set_num_threads(1)
    data = DataConfig(
        manifest=str(manifest),
        resolution=RESOLUTION,
        crop_scale_min=0.5,
        horizontal_flip=True,
        num_workers=WORKERS,
        max_bad_share=1.0,
    )
    part = {"seed": 0, "global_batch": BATCH, "micro_batch": BATCH, "rank": 0, "world_size": 1}
    end = time.monotonic() + seconds
    for number, batch in enumerate(build_loader(data, **part)):
        assert len(batch.images) == BATCH
        assert int(batch.image_numbers[0]) == number * BATCH
        images.value = (number + 1) * BATCH
        if time.monotonic() >= end:
            return
        if time.monotonic() >= validated.value + VALIDATE_S:
            validated.value = np.inf
            for _ in islice(build_loader(data, **part, augment=False, num_epochs=1), VALIDATION_BATCHES):
                pass
            validated.value = time.monotonic()


def _watch(
    processes: dict[str, SpawnProcess], counts: dict[str, tuple[Any, Any]], seconds: float, server: FaultServer
) -> dict[str, list[list[float]]]:
    """The samples, taken while connections are reset."""
    samples: dict[str, list[list[float]]] = {source: [] for source in processes}
    began, chance = time.monotonic(), random.Random(0)
    next_sample = EVERY_S
    while (now := time.monotonic() - began) < seconds:
        if server.files:
            path = chance.choice(list(server.files))
            server.plan(path, fault("reset", after=chance.randrange(20_000)))
        if now >= next_sample:
            next_sample += EVERY_S
            server.counts.clear()
            for source, process in processes.items():
                if process.exitcode:
                    raise RuntimeError(f"loading from {source} has ended with exit status {process.exitcode}")
                with suppress(psutil.NoSuchProcess):  # a validation has just ended
                    images, since = counts[source][0].value, time.monotonic() - counts[source][1].value
                    measured = _measured(process)
                    if since >= SETTLED_S and counts[source][1].value < np.inf:
                        samples[source].append([round(now, 1), *measured, images, round(since, 1)])
        time.sleep(1.0 / RESETS_PER_S)
    return samples


def _measured(process: SpawnProcess) -> tuple[float, float, int, int]:
    """MiB of memory and of mapped files, open descriptors and number of a process and its children."""
    parent = psutil.Process(process.pid)
    family = [parent, *parent.children(recursive=True)]
    memory = file = 0
    for member in family:
        try:
            lines = Path(f"/proc/{member.pid}/status").read_text().splitlines()
        except OSError:
            raise psutil.NoSuchProcess(member.pid) from None
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "Rss" in name}
        memory += kib.get("RssAnon", 0) + kib.get("RssShmem", 0)
        file += kib.get("RssFile", 0)
    return round(memory / 1024, 2), round(file / 1024, 2), sum(member.num_fds() for member in family), len(family)


def evaluate(rows: list[list[float]]) -> dict[str, Any]:
    """Slopes over the second half, and whether they are flat; and the samples."""
    whole = np.array(rows)
    half = whole[whole[:, SECONDS] >= whole[-1, SECONDS] / 2]
    minutes = half[:, SECONDS] / 60
    slopes = {column: float(np.polyfit(minutes, half[:, column], 1)[0]) for column in (MEMORY, FILE, FILES)}
    first, last = whole[0], whole[-1]
    images_per_s = float((last[IMAGES] - first[IMAGES]) / (last[SECONDS] - first[SECONDS]))
    return {
        "minutes": float(last[SECONDS] / 60),
        "fitted_samples": len(half),
        "processes": int(half[:, PROCESSES].max()),
        "images": int(last[IMAGES]),
        "images_per_s": images_per_s,
        "memory_mib": float(np.median(half[:, MEMORY])),
        "file_mib": float(np.median(half[:, FILE])),
        "open_files": float(np.median(half[:, FILES])),
        "mib_per_minute": slopes[MEMORY],
        "file_mib_per_minute": slopes[FILE],
        "files_per_minute": slopes[FILES],
        "bytes_per_image": slopes[MEMORY] * 2**20 / (60 * images_per_s),
        "is_flat": slopes[MEMORY] < MAX_MIB_PER_MINUTE and slopes[FILES] < MAX_FILES_PER_MINUTE,
        "columns": COLUMNS,
        "samples": rows,
    }


def table(results: dict[str, Any]) -> str:
    """A line per source."""
    heads = ("minutes", "images", "images/s", "MiB", "MiB/min", "files", "files/min")
    lines = [" " * 8 + "".join(f"{head:>{width}}" for head, width in zip(heads, (9, 10, 10, 8, 9, 7, 11), strict=True))]
    for source, result in results.items():
        lines.append(
            f"{source:<8}{result['minutes']:>9.1f}{result['images']:>10}{result['images_per_s']:>10.0f}"
            f"{result['memory_mib']:>8.0f}{result['mib_per_minute']:>9.2f}"
            f"{result['open_files']:>7.0f}{result['files_per_minute']:>11.2f}"
            f"  {'flat' if result['is_flat'] else 'NOT FLAT'}"
        )
    return "\n".join(lines)


def draw(samples: dict[str, list[list[float]]], path: Path) -> None:
    """Nothing; memory and open descriptors over time as a picture."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5))
    for source, rows in samples.items():
        values = np.array(rows)
        for panel, column in zip(panels, (MEMORY, FILES), strict=True):
            panel.plot(values[:, SECONDS] / 60, values[:, column], label=source, linewidth=1.0)
    for panel, title in zip(panels, ("memory, MiB", "open descriptors"), strict=True):
        panel.set_title(f"{title}, of a process and its {WORKERS} loader processes")
        panel.set_xlabel("minutes")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
