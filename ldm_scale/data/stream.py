"""From positions of the training stream to samples of a data set with one part, several, or buckets.

Every part is a pool with an order of its own (data/order.py); what differs is which pool a position belongs to.

**A mixture** gives each data set d a fixed number a_d of a batch's B slots: its weight times B, rounded by largest
remainders, so that every batch has the same composition and a position tells its pool by its slot alone. The slots of
a pool are spread evenly over the batch, so that ranks get alike shares.

**Buckets** (pictures of different shapes) give whole batches: bucket b with N_b samples supplies floor((e+1)N_b/B) -
floor(eN_b/B) batches to epoch e, spread evenly over it, each bucket from a random moment on. The rest of its last
batch carries over, so that within a bucket every sample comes once before any comes again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm_scale.data.order import BLOCK_CHUNKS, CHUNK, LANES, Numbers, Order, replacement_at
from ldm_scale.data.permutation import uniforms
from ldm_scale.data.shards import Dataset
from ldm_scale.errors import ConfigError

Floats = NDArray[np.float64]


class Located(NamedTuple):
    """Samples at positions. Shapes: (n,) each; `places` are positions in the pools' own streams."""

    samples: Numbers
    epochs: Numbers
    pools: Numbers
    places: Numbers


@dataclass(frozen=True)
class Pool:
    """The samples first .. first + order.num_samples - 1 of a data set."""

    first: int
    order: Order
    slots: Numbers  # of a global batch that it fills, where it fills any; ascending
    size: tuple[int, int] | None = None  # height and width of its bucket


class Stream:
    """The order of a whole data set; a pure function of its manifest, the seed and the settings."""

    def __init__(self, pools: tuple[Pool, ...], global_batch: int, seed: int) -> None:
        self.pools, self.global_batch, self._seed = pools, global_batch, seed
        self.num_samples = sum(pool.order.num_samples for pool in pools)

    def first_batch(self, epoch: int) -> int:
        """The global batch that holds the first position of an epoch; the epoch before may end in it."""
        return epoch * self.num_samples // self.global_batch

    def locate(self, positions: Numbers) -> Located:
        """The samples at these positions."""
        positions = np.asarray(positions, dtype=np.int64)
        pools, places = self._pools_at(positions)
        samples, epochs = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(pools).tolist():
            own = pools == number
            found = self.pools[number].order.locate(places[own])
            samples[own], epochs[own] = found.samples + self.pools[number].first, found.epochs
        return Located(samples, epochs, pools, places)

    def replacement_at(self, position: int, pool: int, attempt: int) -> int:
        """The sample of the same pool that takes the place of an unusable one."""
        own = self.pools[pool]
        return own.first + replacement_at(position, attempt, own.order.num_samples, self._seed)

    def size_at(self, position: int) -> tuple[int, int] | None:
        """Height and width of the pictures of a position's batch; None = the training's resolution."""
        if len(self.pools) == 1:
            return self.pools[0].size
        return self.pools[int(self._pools_at(np.array([position]))[0][0])].size

    def _pools_at(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """The pool of each position, and the position in that pool's own stream."""
        return np.zeros_like(positions), positions


class Mixture(Stream):
    """Pools with fixed slots of every batch."""

    def __init__(self, pools: tuple[Pool, ...], global_batch: int, seed: int) -> None:
        super().__init__(pools, global_batch, seed)
        self._pool_of_slot = np.empty(global_batch, dtype=np.int64)
        self._rank_of_slot = np.empty(global_batch, dtype=np.int64)
        for number, pool in enumerate(pools):
            self._pool_of_slot[pool.slots] = number
            self._rank_of_slot[pool.slots] = np.arange(len(pool.slots))
        self._quotas = np.array([len(pool.slots) for pool in pools])

    def _pools_at(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        batches, slots = np.divmod(positions, self.global_batch)
        pools = self._pool_of_slot[slots]
        return pools, batches * self._quotas[pools] + self._rank_of_slot[slots]


class Buckets(Stream):
    """Pools that take turns by whole batches."""

    def __init__(self, pools: tuple[Pool, ...], global_batch: int, seed: int) -> None:
        super().__init__(pools, global_batch, seed)
        self._counts = np.array([pool.order.num_samples for pool in pools])
        self._phases = lru_cache(maxsize=4)(self._make_phases)
        self._turn = lru_cache(maxsize=1024)(self._find_turn)

    def first_batch(self, epoch: int) -> int:
        """The first global batch of an epoch, which is one of whole batches."""
        return int(self._before(epoch).sum())

    def _pools_at(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        batches, slots = np.divmod(positions, self.global_batch)
        turns = {batch: self._turn(batch) for batch in np.unique(batches).tolist()}
        pools, numbers = np.array([turns[batch] for batch in batches.tolist()], dtype=np.int64).reshape(-1, 2).T
        return pools, numbers * self.global_batch + slots

    def _find_turn(self, batch: int) -> tuple[int, int]:
        """Which bucket global batch `batch` is from, and which of that bucket's batches it is."""
        epoch = batch * self.global_batch // self.num_samples
        while self.first_batch(epoch) > batch:
            epoch -= 1
        while self.first_batch(epoch + 1) <= batch:
            epoch += 1
        before = self._before(epoch)
        pool, number = _at_turn(batch - int(before.sum()), self._before(epoch + 1) - before, self._phases(epoch))
        return pool, int(before[pool]) + number

    def _before(self, epoch: int) -> Numbers:
        """Batches that each bucket has supplied before an epoch."""
        return np.asarray(epoch * self._counts // self.global_batch, dtype=np.int64)

    def _make_phases(self, epoch: int) -> Floats:
        """For each bucket, the moment of its first batch in an epoch, as a share of the time between two of them."""
        return np.array([uniforms(1, "bucket", self._seed, epoch, bucket)[0] for bucket in range(len(self.pools))])


def _at_turn(turn: int, counts: Numbers, phases: Floats) -> tuple[int, int]:
    """The bucket of an epoch's batch number `turn`, and which of that bucket's batches in the epoch it is.

    Batch i of the n of a bucket has its turn at the time (i + phase) / n. Up to a time t, a bucket gives less than one
    batch more or less than t n, so that only the few batches near turn / sum(counts) need to be sorted.
    """
    margin, total = 3 * len(counts) + 2, int(counts.sum())
    low, high = max(0.0, (turn - margin) / total), (turn + 1 + margin) / total
    starts = np.clip(np.ceil(low * counts - phases), 0, counts).astype(np.int64)
    stops = np.clip(np.ceil(high * counts - phases) + 1, starts, counts).astype(np.int64)
    lengths = stops - starts
    pools = np.repeat(np.arange(len(counts)), lengths)
    numbers = np.arange(len(pools)) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    times = (numbers + phases[pools]) / counts[pools]
    found = np.argsort(times, kind="stable")[turn - int(starts.sum())]
    return int(pools[found]), int(numbers[found])


def build_stream(
    dataset: Dataset,
    seed: int,
    global_batch: int,
    *,
    lanes: int = LANES,
    chunk: int = CHUNK,
    block_chunks: int = BLOCK_CHUNKS,
    ends: bool = False,
) -> Stream:
    """The stream of a data set. One that `ends` (validation) has all its samples in one pool, without weights or sizes.

    Its order does not depend on the batch either (it has one lane), since validation is cut to what fits the ranks.

    Raises: ConfigError if the settings cannot work, or a part of a mixture is too small for a slot.
    """
    arguments = {"lanes": lanes, "chunk": chunk, "block_chunks": block_chunks}
    parts = dataset.parts
    all_slots = np.arange(global_batch)
    if ends or len(parts) == 1:
        one_lane = {"batch": 1, **arguments, "lanes": 1}
        every_lane = {"batch": global_batch, **arguments}
        order = Order(dataset.num_samples, seed, **(one_lane if ends else every_lane))
        return Stream((Pool(0, order, all_slots, None if ends else parts[0].size),), global_batch, seed)
    firsts = np.cumsum([0, *(part.num_samples for part in parts)]).tolist()
    is_mixture = parts[0].weight is not None
    slots = _spread(_quotas(dataset, global_batch)) if is_mixture else [all_slots] * len(parts)
    # Streams of one seed would walk data sets of one size in step.
    pools = tuple(
        Pool(first, Order(part.num_samples, seed + (number << 32), len(own), **arguments), own, part.size)
        for number, (part, first, own) in enumerate(zip(parts, firsts, slots, strict=False))
    )
    return (Mixture if is_mixture else Buckets)(pools, global_batch, seed)


def _quotas(dataset: Dataset, global_batch: int) -> list[int]:
    """Slots of a batch for each part of a mixture.

    Raises: ConfigError if one has none.
    """
    shares = np.array([part.weight for part in dataset.parts], dtype=np.float64) * global_batch
    quotas = np.floor(shares).astype(int)
    remainders = np.argsort(quotas - shares, kind="stable")
    quotas[remainders[: global_batch - int(quotas.sum())]] += 1
    for part, quota in zip(dataset.parts, quotas.tolist(), strict=True):
        if quota < 1:
            raise ConfigError(
                f"{dataset.manifest_path}: a share of {part.weight:.3g} is less than one image of "
                f"train.global_batch={global_batch} for {part.rows.base}; raise its weight or the batch"
            )
    return [int(quota) for quota in quotas]


def _spread(quotas: list[int]) -> list[Numbers]:
    """For each part, its slots: as evenly over the batch as whole numbers allow."""
    times = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quotas])
    owners = np.repeat(np.arange(len(quotas)), quotas)[np.argsort(times, kind="stable")]
    return [np.flatnonzero(owners == number) for number in range(len(quotas))]
