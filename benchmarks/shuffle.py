"""How well an epoch is shuffled: our order against webdataset's shuffle of shards and of samples in a buffer.

No files: shards are numbers, and what comes out is the global sequence of batches. webdataset's side runs its own
buffer (`webdataset.filters._shuffle`) over a rank's shards in random order; ranks own every W-th shard, as its splitter
does. Its buffer has as many samples as our order asks a rank to hold (lanes / W x chunk x block_chunks, at most the
data set), and, beside that, its default of 1000.

- serial: correlation of the storage ranks of neighbours in the sequence (a true shuffle: 0)
- shards: distinct shards in a batch, over those of a true shuffle
- again: of pairs within 64 places of each other, the share that were so an epoch before, over that of a true shuffle
- moved: by how much of an epoch a sample's place differs from the epoch before, on average, over a true shuffle's 1/3

    python -m benchmarks.shuffle [--case large] [--ranks 1] [--batch 64] [--chunk 32] [--block-chunks 32] [--lanes 64]
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from webdataset.filters import _shuffle

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.measured import RESULTS, write_results
from ldm_scale.__main__ import run_command
from ldm_scale.data.order import BLOCK_CHUNKS, CHUNK, LANES, Numbers, Order

CASES = {"large": (400, 2500), "small": (40, 250)}  # shards, samples of each
WINDOW = 64
DEFAULT_BUFFER = 1000
OURS, EQUAL, DEFAULT = "ours", "webdataset, equal memory", f"webdataset, buffer {DEFAULT_BUFFER}"
METRICS = ("serial", "shards", "again", "moved")


def main(argv: Sequence[str]) -> int:
    """0."""
    parser = argparse.ArgumentParser(description="How well an epoch is shuffled.")
    parser.add_argument("--case", choices=tuple(CASES), action="append", help="default: all")
    parser.add_argument("--ranks", type=int, action="append", help="default: 1 and 8")
    parser.add_argument("--batch", type=int, action="append", help="images of a global batch; default: 64 and 512")
    for name, default in (("lanes", LANES), ("chunk", CHUNK), ("block-chunks", BLOCK_CHUNKS)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of our order ({default})")
    parser.add_argument("--seeds", type=int, default=3, help="mean over so many (3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file and the picture")
    arguments = parser.parse_args(argv)
    order = {name: getattr(arguments, name) for name in ("lanes", "chunk", "block_chunks")}
    results = []
    for case in arguments.case or CASES:
        for batch in arguments.batch or (64, 512):
            for ranks in arguments.ranks or (1, 8):
                results.append(measure(case, batch, ranks, order, arguments.seeds))
                print(table(results[-1:]) if len(results) == 1 else table(results[-1:]).partition("\n")[2], flush=True)
    written = {"order": order, "seeds": arguments.seeds, "cases": results}
    if arguments.out == RESULTS and order != {"lanes": LANES, "chunk": CHUNK, "block_chunks": BLOCK_CHUNKS}:
        print("with other settings than the defaults nothing is written; give --out")
        return 0
    write_results(arguments.out, "shuffle", torch.device("cpu"), written)
    picture = arguments.out / f"shuffle-{datetime.now(UTC).date().isoformat()}.png"
    draw(results, picture)
    print(f"drawn to {picture}")
    return 0


def measure(case: str, batch: int, ranks: int, order: dict[str, int], num_seeds: int) -> dict[str, Any]:
    """The metrics of each way, mean over seeds."""
    num_shards, shard_size = CASES[case]
    total = num_shards * shard_size
    held = min(total, -(-order["lanes"] // ranks) * order["chunk"] * order["block_chunks"])
    found: dict[str, list[dict[str, float]]] = {OURS: [], EQUAL: [], DEFAULT: []}
    for seed in range(num_seeds):
        rng = np.random.default_rng(seed)
        ideal = qualities([rng.permutation(total) for _ in range(2)], shard_size, batch)
        epochs = {
            OURS: ours(total, seed, batch, order),
            EQUAL: [webdataset(num_shards, shard_size, batch, ranks, held, 2 * seed + epoch) for epoch in (0, 1)],
            DEFAULT: [
                webdataset(num_shards, shard_size, batch, ranks, DEFAULT_BUFFER, 2 * seed + epoch) for epoch in (0, 1)
            ],
        }
        for name, sequences in epochs.items():
            found[name].append(over_ideal(qualities(sequences, shard_size, batch), ideal))
    return {
        "case": case,
        "shards": num_shards,
        "samples": total,
        "batch": batch,
        "ranks": ranks,
        "held_samples": held,
        "ways": {
            name: {metric: float(np.mean([values[metric] for values in all_values])) for metric in METRICS}
            for name, all_values in found.items()
        },
    }


def ours(total: int, seed: int, batch: int, settings: dict[str, int]) -> list[Numbers]:
    """Two epochs of our order."""
    order = Order(total, seed, batch, **settings)
    return [order.locate(np.arange(epoch * total, (epoch + 1) * total)).samples for epoch in (0, 1)]


def webdataset(num_shards: int, shard_size: int, batch: int, ranks: int, buffer: int, seed: int) -> Numbers:
    """An epoch of webdataset's batches: each rank's part of each."""
    sequences = []
    for rank in range(ranks):
        chance = random.Random(f"{seed} {rank}")
        shards = list(range(rank, num_shards, ranks))
        chance.shuffle(shards)
        samples = iter(_samples(shards, shard_size))
        sequences.append(np.fromiter(_shuffle(samples, bufsize=buffer, rng=chance), dtype=np.int64))
    share = batch // ranks
    num_batches = min(len(sequence) for sequence in sequences) // share
    parts = [sequence[: num_batches * share].reshape(num_batches, share) for sequence in sequences]
    return np.concatenate(parts, axis=1).ravel()


def _samples(shards: list[int], shard_size: int) -> Iterator[int]:
    for shard in shards:
        yield from range(shard * shard_size, (shard + 1) * shard_size)


def qualities(epochs: Sequence[Numbers], shard_size: int, batch: int) -> dict[str, float]:
    """The metrics of two epochs as they are."""
    before, now = epochs
    size = 1 + max(int(before.max()), int(now.max()))
    place = np.full(size, 10 * size)  # of samples that were left out before: far from all others
    place[before] = np.arange(len(before))
    num_batches = len(now) // batch
    shards = np.sort((now[: num_batches * batch] // shard_size).reshape(num_batches, batch), axis=1)
    places = place[now]
    again = np.mean([np.mean(np.abs(places[lag:] - places[:-lag]) <= WINDOW) for lag in range(1, WINDOW + 1)])
    known = places < size
    return {
        "serial": float(np.corrcoef(now[:-1], now[1:])[0, 1]),
        "shards": float(1 + (np.diff(shards, axis=1) != 0).sum(axis=1).mean()),
        "again": float(again),
        "moved": float(np.abs(places - np.arange(len(now)))[known].mean() / len(now)),
    }


def over_ideal(found: dict[str, float], ideal: dict[str, float]) -> dict[str, float]:
    """The metrics over those of a true shuffle, but the serial correlation, which is 0 there."""
    return {name: found[name] if name == "serial" else found[name] / ideal[name] for name in METRICS}


def table(results: list[dict[str, Any]]) -> str:
    """A line per case and way."""
    lines = [f"{'':<72}" + "".join(f"{metric:>9}" for metric in METRICS)]
    for result in results:
        where = f"{result['shards']} x {result['samples'] // result['shards']}, batch {result['batch']}, "
        for name, values in result["ways"].items():
            label = f"{where}{result['ranks']} ranks of {result['held_samples']}: {name}"
            lines.append(f"{label:<72}" + "".join(f"{values[metric]:>9.3f}" for metric in METRICS))
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Nothing; the metrics as bars."""
    figure, panels = plt.subplots(len(METRICS), 1, figsize=(11, 10), sharex=True)
    labels = [f"{r['shards']} x {r['samples'] // r['shards']}\nbatch {r['batch']}, {r['ranks']} ranks" for r in results]
    at = np.arange(len(results))
    for panel, metric in zip(panels, METRICS, strict=True):
        for number, name in enumerate((OURS, EQUAL, DEFAULT)):
            values = [result["ways"][name][metric] for result in results]
            panel.bar(at + 0.27 * (number - 1), values, 0.25, label=name)
        panel.set_ylabel(metric if metric == "serial" else f"{metric}\n/ true shuffle")
        panel.axhline(0.0 if metric == "serial" else 1.0, color="black", linewidth=0.8)
        panel.grid(alpha=0.3, axis="y")
    panels[0].legend()
    panels[2].set_yscale("log")
    panels[-1].set_xticks(at, labels, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
