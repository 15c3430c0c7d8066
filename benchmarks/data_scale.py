"""A training on a million shards of ten thousand samples: the time and memory until its first batch, and far into it.

The manifest has a row for every shard; of the shards themselves there are those that the first batches need and those
whose sizes are looked at when the data set is opened. All of them are one small tar of ten thousand samples under many
names. Each figure comes from a process of its own, whose peak memory is counted above that of its imports; files were
written just before, so that they lie in the system's cache.

    python -m benchmarks.data_scale [--shards 1000000]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds

from benchmarks.data_shards import one_pixel
from benchmarks.measured import RESULTS, write_results
from ldm_scale.__main__ import run_command
from ldm_scale.config.schema import DataConfig
from ldm_scale.data import build_loader, open_manifest, shards
from ldm_scale.data.manifest import Split, read_split
from ldm_scale.data.order import Order
from ldm_scale.data.sources.tars import index_tars

SAMPLES = 10_000  # of a shard
BATCH, RANKS = 2048, 64
NUM_BATCHES = 2
FAR = 5_000_000_000 // BATCH * BATCH  # images: in the middle of the first epoch
CHECKED = 64  # shards, spread evenly, whose sizes are looked at
MIB = 2.0**20


def main(argv: Sequence[str]) -> int:
    """0."""
    parser = argparse.ArgumentParser(description="A training on very many shards.")
    parser.add_argument("--shards", type=int, default=1_000_000, help="below 100,000: a trial, not written (1,000,000)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="data_scale") as folder:
        manifest = make_manifest(Path(folder), arguments.shards)
        starts = (0, min(FAR, arguments.shards * SAMPLES // 2 // BATCH * BATCH))
        make_shards(manifest, arguments.shards, starts)
        steps: dict[str, tuple[Callable[..., dict[str, float]], tuple[Any, ...]]] = {
            "parse the JSON alone": (parse_json, (manifest,)),
            "read the manifest": (read, (manifest,)),
            "any position of the order": (reach, (arguments.shards * SAMPLES,)),
            "from the manifest to the first batch": (first_batches, (manifest, starts[0])),
            "the same in the middle of an epoch": (first_batches, (manifest, starts[1])),
        }
        results = {name: alone(work, *parts) for name, (work, parts) in steps.items()}
        results["manifest"] = {"mib": manifest.stat().st_size / MIB}
    print(table(results))
    if arguments.shards >= 100_000:
        settings = {"shards": arguments.shards, "samples": SAMPLES, "batch": BATCH, "ranks": RANKS}
        write_results(arguments.out, "data_scale", torch.device("cpu"), {"settings": settings, "steps": results})
    return 0


def make_manifest(folder: Path, num_shards: int) -> Path:
    """A manifest of so many rows, as `ldm-scale prepare index` writes them, and the one tar that they all stand for."""
    tar = folder / "one.tar"
    content = one_pixel()
    with wds.TarWriter(str(tar), encoder=False, mtime=0.0) as writer:
        for number in range(SAMPLES):
            writer.write({"__key__": f"{number:05d}", "png": content, "txt": f"caption {number}".encode()})
    index_tars([tar], folder / "one.json", "train")
    manifest = json.loads((folder / "one.json").read_text())
    row = manifest["splits"]["train"]["shards"][0]
    path = folder / "manifest.json"
    rows = ",\n".join(
        json.dumps({**row, "file": f"{number:07d}.tar", "index": f"{number:07d}.index.safetensors"})
        for number in range(num_shards)
    )
    manifest["splits"]["train"] = {"num_samples": num_shards * SAMPLES, "shards": []}
    path.write_text(json.dumps(manifest).replace('"shards": []', f'"shards": [{rows}]'))
    return path


def make_shards(manifest: Path, num_shards: int, starts: Sequence[int]) -> None:
    """Nothing; there are the shards that are looked at, and those of the first batches of rank 0 from these images on.

    Links: what is opened, mapped and read are as many files as there would be.
    """
    order = Order(num_shards * SAMPLES, 0, BATCH)
    share = BATCH // RANKS
    needed = set(range(0, num_shards, -(-num_shards // CHECKED)))
    for start in starts:
        for batch in range(NUM_BATCHES + 8):  # some are made ahead
            positions = start + batch * BATCH + np.arange(share)
            needed |= set((order.locate(positions).samples // SAMPLES).tolist())
    for number in needed:
        for suffix in (".tar", ".index.safetensors"):
            os.link(manifest.parent / f"one{suffix}", manifest.parent / f"{number:07d}{suffix}")


def parse_json(manifest: Path) -> dict[str, float]:
    """What Python's own reader takes."""
    began = time.perf_counter()
    json.loads(manifest.read_bytes())
    return {"seconds": time.perf_counter() - began}


def read(manifest: Path) -> dict[str, float]:
    """The data set, and its digest."""
    began = time.perf_counter()
    dataset = open_manifest(manifest, "train", check_sizes=False)
    opened = time.perf_counter()
    assert dataset.digest
    return {"seconds": opened - began, "digest_s": time.perf_counter() - opened}


def reach(num_samples: int) -> dict[str, float]:
    """The samples at positions from the first to the 100th epoch."""
    positions = np.random.default_rng(0).integers(0, 100 * num_samples, 1024)
    began = time.perf_counter()
    order = Order(num_samples, 0, BATCH)
    order.locate(positions[:1])
    first = time.perf_counter() - began
    order.locate(positions)
    return {"seconds": first, "of_1024_s": time.perf_counter() - began - first}


def first_batches(manifest: Path, start: int) -> dict[str, float]:
    """From the manifest that was read to the first batch of one of many ranks."""
    reading_s = 0.0

    def timed_read(path: Path, name: str) -> Split:
        nonlocal reading_s
        began = time.perf_counter()
        split = read_split(path, name)
        reading_s = time.perf_counter() - began
        return split

    shards.read_split = timed_read
    data = DataConfig(manifest=str(manifest), resolution=16, num_workers=0, prefetch_batches=1)
    began = time.perf_counter()
    loader = build_loader(
        data, seed=0, global_batch=BATCH, micro_batch=BATCH // RANKS, rank=0, world_size=RANKS, start_image=start
    )
    batches = iter(loader)
    batch = next(batches)
    first_s = time.perf_counter() - began
    assert batch.image_numbers[0] == start
    assert not batch.bad, batch.bad[0]
    return {"seconds": first_s - reading_s, "reading_s": reading_s}


def alone(work: Callable[..., dict[str, float]], *parts: Any) -> dict[str, float]:
    """What a fresh process finds, with its peak memory above the one that it began with."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, work, parts))
    process.start()
    theirs.close()
    try:
        found: dict[str, float] = ours.recv()
    finally:
        process.join()
    return found


def _run(connection: Any, work: Callable[..., dict[str, float]], parts: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    before = _peak_kib()
    began = time.process_time()
    found = work(*parts)
    connection.send({**found, "cpu_s": time.process_time() - began, "peak_mib": (_peak_kib() - before) / 1024})
    os._exit(0)  # a loader may have batches under way


def _peak_kib() -> int:
    """Largest resident memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def table(results: dict[str, dict[str, float]]) -> str:
    """A line per step."""
    lines = [f"{'':<40}{'s':>8}{'peak MiB':>10}"]
    for name, found in results.items():
        if "seconds" in found:
            others = ", ".join(
                f"{key} {value:.3f}" for key, value in found.items() if key not in ("seconds", "peak_mib")
            )
            lines.append(f"{name:<40}{found['seconds']:>8.3f}{found['peak_mib']:>10.0f}  {others}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
