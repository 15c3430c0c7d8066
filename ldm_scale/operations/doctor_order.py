"""`ldm-scale doctor order`: the samples of some global batches, by the code that the loader runs.

Nothing but the manifest and the shards' indices is read, so that the order of a cluster's run can be looked up on any
machine that has these.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_scale.config.schema import DataConfig
from ldm_scale.data import Dataset, open_manifest
from ldm_scale.data.order import Numbers
from ldm_scale.data.slots import SlotSource, StreamSettings
from ldm_scale.data.stream import Buckets, Mixture, Pool, Stream, build_stream
from ldm_scale.errors import ConfigError

ABOUT = """Tells the keys of global batches as the loader of a training delivers them, joined in the order of the ranks.
Batch 0 of an epoch is the global batch that holds the epoch's first image; its beginning may be the rest of the epoch
before. Of a mixture an epoch is as many images as its data sets have together, whatever their weights; of buckets it
begins with a whole batch. No picture is decoded: samples that turn out bad in decoding are listed in their own places,
where a run trains on substitutes (substitutions.jsonl of the run)."""

MAX_POSITION = 1 << 62  # of the stream: beyond, 64 bits would not hold what is computed from it
SHOWN_KEYS = 4  # of a rank's in the table


class Held(NamedTuple):
    """What a rank has open at a time."""

    blocks: int
    samples: int
    shards: int
    bytes: int  # of these samples, by the average of their shards


@dataclass(frozen=True)
class OrderReport:
    """Some global batches, and what they come from."""

    arguments: argparse.Namespace
    dataset: Dataset
    stream: Stream
    first: int  # number of the first of them, from the start of training
    batches: list[list[str]]  # keys
    exit_code: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The keys for programs."""
        return {"batches": self.batches}

    def text(self) -> str:
        """The keys for people: some of each rank, below what the order is made of."""
        asked, size = self.arguments, self.stream.global_batch
        share = size // asked.world_size
        lines = [
            f"order of {self.dataset.manifest_path}, {self.dataset.split}: seed {asked.seed}, epoch {asked.epoch}",
            *self._made_of(),
            f"{'batch':>6} {'global batch':>12} {'image':>12} {'rank':>5}  keys",
        ]
        for row, keys in enumerate(self.batches):
            number = self.first + row
            for rank in range(asked.world_size):
                own = keys[rank * share : (rank + 1) * share]
                more = f", and {len(own) - SHOWN_KEYS} more" if len(own) > SHOWN_KEYS else ""
                batch = (asked.start + row, number) if rank == 0 else ("", "")
                lines.append(
                    f"{batch[0]:>6} {batch[1]:>12} {number * size + rank * share:>12} {rank:>5}  "
                    f"{', '.join(own[:SHOWN_KEYS])}{more}"
                )
        return "\n".join(lines)

    def _made_of(self) -> list[str]:
        stream, epoch, size = self.stream, self.arguments.epoch, self.stream.global_batch
        carried = epoch * stream.num_samples - stream.first_batch(epoch) * size
        begins = f", after {carried} images of epoch {epoch - 1}" if carried and not isinstance(stream, Buckets) else ""
        lines = [
            f"samples per epoch: {stream.num_samples:,} in {len(self.dataset.shards):,} shards; the epoch begins in "
            f"global batch {stream.first_batch(epoch)}{begins}"
        ]
        for part, pool in zip(self.dataset.parts, stream.pools, strict=False):
            order = pool.order
            name = "order"
            if isinstance(stream, Mixture):
                name = f"{len(pool.slots)} of {size} slots: {part.rows.base}, {order.num_samples:,} samples"
            elif isinstance(stream, Buckets):
                name = f"bucket of {pool.size}: {order.num_samples:,} samples"
            lines.append(
                f"{name}: {order.num_lanes} lanes, chunks of {order.chunk_samples} samples, permuted in blocks of "
                f"{order.block_samples:,}"
            )
        held = [held_by(self.dataset, stream, epoch, rank, self.arguments.world_size) for rank in self._some_ranks()]
        most = max(held, key=lambda one: one.bytes)
        lines.append(
            f"a rank of {self.arguments.world_size} holds about {most.blocks} blocks open: {most.samples:,} samples of "
            f"{most.shards:,} shards, {most.bytes / 2**20:,.1f} MiB"
        )
        return lines

    def _some_ranks(self) -> list[int]:
        """The first, the last and one between."""
        last = self.arguments.world_size - 1
        return sorted({0, last // 2, last})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing; the parser knows what `run` reads."""
    defaults = DataConfig()
    parser.add_argument("manifest", type=Path, help="a manifest.json of `ldm-scale prepare`, or its folder")
    parser.add_argument("--seed", type=int, required=True, help="train.seed")
    parser.add_argument("--epoch", type=int, required=True, help="the first is 0")
    parser.add_argument("--global-batch", type=int, required=True, metavar="B", help="train.global_batch")
    parser.add_argument("--world-size", type=int, required=True, metavar="W", help="ranks, which must divide B")
    parser.add_argument(
        "--batches", required=True, metavar="FROM:TO", help="of the epoch, without TO, which may lie beyond its end"
    )
    parser.add_argument("--split", default=defaults.split, help=f"in the order of training ({defaults.split})")
    for name in ("lanes", "chunk_samples", "block_chunks"):
        option, value = f"--{name.replace('_', '-')}", getattr(defaults, name)
        parser.add_argument(option, type=int, default=value, metavar="N", help=f"data.{name} ({value})")


def run(arguments: argparse.Namespace) -> OrderReport:
    """The batches that were asked for.

    Raises: ConfigError if the arguments do not work out; DataError if the manifest or an index cannot be read.
    """
    arguments.start, stop = _batch_range(arguments.batches)
    _check(arguments)
    dataset = open_manifest(arguments.manifest, arguments.split, check_sizes=False)
    stream = build_stream(
        dataset,
        arguments.seed,
        arguments.global_batch,
        lanes=arguments.lanes,
        chunk=arguments.chunk_samples,
        block_chunks=arguments.block_chunks,
    )
    if max((arguments.epoch + 2) * stream.num_samples, stop * arguments.global_batch) >= MAX_POSITION:
        raise ConfigError(
            f"--epoch={arguments.epoch} --batches={arguments.batches}: image numbers must stay below 2**62; "
            f"an epoch has {stream.num_samples:,} images"
        )
    epoch_start = stream.first_batch(arguments.epoch)
    first, end = epoch_start + arguments.start, epoch_start + stop
    return OrderReport(arguments, dataset, stream, first, _keys(dataset, stream, arguments.world_size, first, end))


def _batch_range(text: str) -> tuple[int, int]:
    """FROM and TO. Raises: ConfigError unless 0 <= FROM < TO."""
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise ConfigError(f"--batches={text} must be FROM:TO with 0 <= FROM < TO, such as 0:4 for the first four")
    return int(start), int(stop)


def _check(arguments: argparse.Namespace) -> None:
    """Nothing; raises ConfigError unless the numbers are those of a training that could run."""
    for name, least in (
        ("seed", 0),
        ("epoch", 0),
        ("global_batch", 1),
        ("world_size", 1),
        ("lanes", 1),
        ("chunk_samples", 1),
        ("block_chunks", 1),
    ):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(arguments, name)} must be at least {least}")
    if arguments.global_batch % arguments.world_size:
        raise ConfigError(
            f"--global-batch={arguments.global_batch} must be a multiple of --world-size={arguments.world_size}: all "
            "ranks have equal shares of a batch; change either"
        )


def _keys(dataset: Dataset, stream: Stream, world_size: int, first: int, end: int) -> list[list[str]]:
    """The keys of global batches first .. end - 1: each rank's own, joined."""
    size = stream.global_batch
    samples = np.empty((end - first, size), dtype=np.int64)
    share = size // world_size
    for rank in range(world_size):
        part = StreamSettings(size, share, rank, world_size, first * size, end * size)
        for row, slot in enumerate(SlotSource(part, stream)()):
            samples[row, rank * share : (rank + 1) * share] = slot.samples
    # In the order of the shards, so that each index is opened once.
    numbers, places = np.unique(samples, return_inverse=True)
    keys = [dataset.key(number) for number in numbers.tolist()]
    return [[keys[place] for place in row] for row in places.reshape(samples.shape).tolist()]


def held_by(dataset: Dataset, stream: Stream, epoch: int, rank: int, world_size: int) -> Held:
    """What a rank has open in the middle of an epoch: the blocks that its slots of a batch lie in."""
    start, stop = (stream.global_batch * number // world_size for number in (rank, rank + 1))
    num_blocks, samples = 0, list[Numbers]()
    for pool in stream.pools:
        blocks = pool.order.block_at(_middle(pool, epoch, start, stop))
        for block in dict.fromkeys(blocks):
            samples.append(pool.first + pool.order.locate(pool.order.positions_in(block)).samples)
            num_blocks += 1
    numbers = np.concatenate(samples)
    shards, counts = np.unique(dataset.shards_of(numbers), return_counts=True)
    sizes = np.concatenate([part.rows.num_bytes for part in dataset.parts])[shards] / dataset.shard_sizes[shards]
    return Held(num_blocks, len(numbers), len(shards), int((sizes * counts).sum()))


def _middle(pool: Pool, epoch: int, start: int, stop: int) -> Numbers:
    """Positions in a pool's stream that slots start .. stop - 1 of a batch in the middle of an epoch have."""
    own = np.flatnonzero((pool.slots >= start) & (pool.slots < stop))
    batch = (2 * epoch + 1) * pool.order.num_samples // (2 * pool.order.batch)
    return np.asarray(batch * pool.order.batch + own, dtype=np.int64)
