"""Memory and open files of loading for half an hour: flat, or not.

Two trainings at once, each a process with two loader processes: one reads local shards, one the same shards from a web
server on loopback that resets connections in the middle of an answer. Some pictures are cut short, so that samples are
replaced all the time, and every few minutes each loader is closed and another goes on where it was. Resident memory and
open descriptors of each process and its children are sampled; over the second half of the time a straight line is
fitted. Flat: it rises by less than MAX_MIB_PER_MINUTE and MAX_FILES_PER_MINUTE.

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
from ldm_scale.config.schema import DataConfig
from ldm_scale.data import build_loader
from ldm_scale.data.sources.tars import index_tars
from tests.helpers.fault_server import FaultServer, fault

MAX_MIB_PER_MINUTE = 1.0  # of a process and its two loader processes
MAX_FILES_PER_MINUTE = 0.5
SOURCES = ("local", "http")
NUM_SAMPLES, NUM_SHARDS, SIDE, BROKEN_SHARE = 3200, 64, 256, 0.005
RESOLUTION, BATCH, WORKERS = 64, 32, 2
REOPEN_S = 180.0  # a loader's life
EVERY_S = 5.0  # between two samples
RESETS_PER_S = 1.0
MIB = 2.0**20


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
        "reopen_s": REOPEN_S,
        "resets_per_s": RESETS_PER_S,
        "max_mib_per_minute": MAX_MIB_PER_MINUTE,
        "max_files_per_minute": MAX_FILES_PER_MINUTE,
    }


def soak(folder: Path, sources: Sequence[str], seconds: float) -> dict[str, list[list[float]]]:
    """For each source its samples: [seconds, resident bytes, open descriptors, processes, images so far]."""
    tars = make_pictures(folder / "tars", NUM_SAMPLES, NUM_SHARDS, SIDE, BROKEN_SHARE)
    served = {f"/{tar.name}": tar.read_bytes() for tar in tars} if "http" in sources else {}
    with FaultServer(served) as server:
        names = {"local": [str(tar) for tar in tars], "http": [server.url(path) for path in served]}
        processes: dict[str, SpawnProcess] = {}
        counts: dict[str, Any] = {}
        context = multiprocessing.get_context("spawn")
        for source in sources:
            manifest = folder / source / "manifest.json"
            index_tars(names[source], manifest, "train")
            counts[source] = context.Value("q", 0)
            processes[source] = context.Process(target=load, args=(manifest, seconds, counts[source]), name=source)
            processes[source].start()
        try:
            return _watch(processes, counts, seconds, server)
        finally:
            for process in processes.values():
                process.terminate()
                process.join()


def load(manifest: Path, seconds: float, images: Any) -> None:
    """Nothing; loads for so long and counts images in shared memory."""
    torch.set_num_threads(1)
    data = DataConfig(
        manifest=str(manifest),
        resolution=RESOLUTION,
        crop_scale_min=0.5,
        horizontal_flip=True,
        num_workers=WORKERS,
        max_bad_share=1.0,
    )
    end, position = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        reopen = time.monotonic() + REOPEN_S
        loader = build_loader(
            data, seed=0, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1, start_image=position
        )
        for batch in loader:
            assert len(batch.images) == BATCH
            assert int(batch.image_numbers[0]) == position
            position += BATCH
            images.value = position
            if time.monotonic() >= min(end, reopen):
                break


def _watch(
    processes: dict[str, SpawnProcess], counts: dict[str, Any], seconds: float, server: FaultServer
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
                with suppress(psutil.NoSuchProcess):  # a loader was just closed
                    samples[source].append([now, *_measured(process), float(counts[source].value)])
        time.sleep(1.0 / RESETS_PER_S)
    return samples


def _measured(process: SpawnProcess) -> tuple[float, float, float]:
    """Resident bytes, open descriptors and number of a process and its children."""
    parent = psutil.Process(process.pid)
    family = [parent, *parent.children(recursive=True)]
    return (
        float(sum(member.memory_info().rss for member in family)),
        float(sum(member.num_fds() for member in family)),
        float(len(family)),
    )


def evaluate(rows: list[list[float]]) -> dict[str, Any]:
    """Slopes over the second half, of the samples in which all processes were there, and whether they are flat."""
    usual = float(np.median([row[3] for row in rows]))
    whole = np.array([row for row in rows if row[3] == usual])
    half = whole[whole[:, 0] >= whole[-1, 0] / 2]
    minutes = half[:, 0] / 60
    mib, files = (float(np.polyfit(minutes, half[:, column], 1)[0]) for column in (1, 2))
    mib /= MIB
    first, last = whole[0], whole[-1]
    return {
        "minutes": float(last[0] / 60),
        "samples": len(whole),
        "processes": int(usual),
        "images": int(last[4]),
        "images_per_s": float((last[4] - first[4]) / (last[0] - first[0])),
        "resident_mib": {"median": float(np.median(half[:, 1]) / MIB), "max": float(whole[:, 1].max() / MIB)},
        "open_files": {"median": float(np.median(half[:, 2])), "max": float(whole[:, 2].max())},
        "mib_per_minute": mib,
        "files_per_minute": files,
        "bytes_per_image": mib * MIB / max(1.0, (half[-1, 4] - half[0, 4]) / float(minutes[-1] - minutes[0])),
        "is_flat": mib < MAX_MIB_PER_MINUTE and files < MAX_FILES_PER_MINUTE,
    }


def table(results: dict[str, Any]) -> str:
    """A line per source."""
    heads = ("minutes", "images", "images/s", "MiB", "MiB/min", "files", "files/min")
    lines = [" " * 8 + "".join(f"{head:>{width}}" for head, width in zip(heads, (9, 10, 10, 8, 9, 7, 11), strict=True))]
    for source, result in results.items():
        lines.append(
            f"{source:<8}{result['minutes']:>9.1f}{result['images']:>10}{result['images_per_s']:>10.0f}"
            f"{result['resident_mib']['median']:>8.0f}{result['mib_per_minute']:>9.2f}"
            f"{result['open_files']['median']:>7.0f}{result['files_per_minute']:>11.2f}"
            f"  {'flat' if result['is_flat'] else 'NOT FLAT'}"
        )
    return "\n".join(lines)


def draw(samples: dict[str, list[list[float]]], path: Path) -> None:
    """Nothing; resident memory and open descriptors over time as a picture."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5))
    for source, rows in samples.items():
        values = np.array(rows)
        panels[0].plot(values[:, 0] / 60, values[:, 1] / MIB, label=source, linewidth=1.0)
        panels[1].plot(values[:, 0] / 60, values[:, 2], label=source, linewidth=1.0)
    for panel, title in zip(panels, ("resident memory, MiB", "open descriptors"), strict=True):
        panel.set_title(f"{title}, of a process and its {WORKERS} loader processes")
        panel.set_xlabel("minutes")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
