"""Which sample stands at which position of the training stream: arithmetic, no state and no reading.

A position counts images from the start of training, over all ranks and epochs: global batch k of B images owns
positions kB .. (k + 1)B - 1, and rank r of W the slots rB/W .. (r + 1)B/W - 1 of it. What stands there is a function of
(number of samples N, seed, B, L, chunk, block), never of ranks or loader processes, so that a batch holds the same
images at any number of them, every sample comes once an epoch, and a run goes on with one integer. Epochs may end in
the middle of a batch: the rest of it is the beginning of the next epoch.

**Lanes.** Sequential reading and small memory ask that a rank reads few places at a time. So the order has L lanes
(`lanes`, at most B), and slot p of a batch belongs to lane l = floor(pL/B), that is, slots s_l .. s_(l+1) - 1 with
s_l = ceil(lB/L). A rank with B/W slots needs about L/W lanes while W <= L, and a part of one beyond that.

**Epochs.** Let C_l(X) = floor(X/B) s_l + min(X mod B, s_l) count the positions below X in lanes before l. Epoch e has
positions eN .. (e + 1)N - 1. In it lane l owns exactly the places C_l((e+1)N) - C_l(eN) .. C_(l+1)((e+1)N) -
C_(l+1)(eN) - 1 of the epoch's arrangement, as many as it has positions: these ranges partition 0 .. N - 1 for every N,
B and L, which is why each sample comes once, whatever does not divide.

**Arrangement.** The epoch's samples, rotated by a random number, are cut into chunks of G neighbours (`chunk`); chunks
are permuted, and the shorter last one, another one in each epoch by the rotation, stays last. Samples of a chunk lie
side by side in a shard, so that a chunk is one read.

**Blocks.** A lane walks its range in blocks of K places (`block`, some chunks). Its first block is shorter by
floor(lK/L), so that lanes do not begin blocks at the same time. Whoever reads a lane holds one block. Within it chunks
are dealt: in each round every chunk gives one sample, chunks in an order drawn for the round, samples in one drawn for
the chunk.

So two neighbours of a lane come from one chunk with probability (G/K)^2, at the seam of two rounds, where a plain
permutation of the block would have G/K. All permutations differ in every epoch. For data sets too small for chunks to
matter G is 1: a plain random order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm_scale.data.permutation import Words, below, derive, digest, key_of, permute
from ldm_scale.errors import ConfigError

Numbers = NDArray[np.int64]

LANES, CHUNK, BLOCK_CHUNKS = 64, 32, 32
_CHUNKS_PER_LANE = 8 * BLOCK_CHUNKS  # that a lane has at least, by smaller chunks if need be


class Block(NamedTuple):
    """One block of one lane."""

    epoch: int
    lane: int
    number: int


class Places(NamedTuple):
    """Where positions lead. Shapes: (n,) each."""

    samples: Numbers
    epochs: Numbers


@dataclass(frozen=True)
class Order:
    """The order of one pool of samples, of which each global batch has `batch`."""

    num_samples: int
    seed: int
    batch: int
    lanes: int = LANES
    chunk: int = CHUNK
    block_chunks: int = BLOCK_CHUNKS

    def __post_init__(self) -> None:
        assert self.num_samples > 0
        for name in ("batch", "lanes", "chunk", "block_chunks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"the data order's {name} is {getattr(self, name)}; it must be at least 1")

    @cached_property
    def num_lanes(self) -> int:
        """Lanes that have slots."""
        return min(self.lanes, self.batch)

    @cached_property
    def chunk_samples(self) -> int:
        """Neighbours that stay together."""
        return min(self.chunk, max(1, self.num_samples // (self.lanes * _CHUNKS_PER_LANE)))

    @cached_property
    def block_samples(self) -> int:
        """Places that are permuted with each other."""
        return self.chunk * self.block_chunks

    @cached_property
    def first_slots(self) -> Numbers:
        """s_0 .. s_L, the last being the batch."""
        return -(-np.arange(self.num_lanes + 1) * self.batch // self.num_lanes)

    def locate(self, positions: Numbers) -> Places:
        """The samples at these positions of the pool's stream."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, slots = positions // self.num_samples, positions % self.batch
        lanes = slots * self.num_lanes // self.batch
        lane_starts, lane_ends = self._lane_range(epochs, lanes)
        own = self._counted(positions, lanes + 1) - self._counted(positions, lanes)
        before = self._counted(epochs * self.num_samples, lanes + 1) - self._counted(epochs * self.num_samples, lanes)
        samples = self._samples(epochs, lanes, own - before, lane_starts, lane_ends - lane_starts)
        return Places(samples, epochs)

    def block_at(self, positions: Numbers) -> list[Block]:
        """The blocks in which these positions lie."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, slots = positions // self.num_samples, positions % self.batch
        lanes = slots * self.num_lanes // self.batch
        own = self._counted(positions, lanes + 1) - self._counted(positions, lanes)
        start = epochs * self.num_samples
        index = own - (self._counted(start, lanes + 1) - self._counted(start, lanes))
        numbers = (index + self._shortening(lanes)) // self.block_samples
        return [Block(*row) for row in np.stack([epochs, lanes, numbers], axis=1).tolist()]

    def positions_in(self, block: Block) -> Numbers:
        """All positions that lie in a block, in their order."""
        lane, lanes = block.lane, np.array([block.lane])
        start, stop = self._lane_range(np.array([block.epoch]), lanes)
        first = block.number * self.block_samples - int(self._shortening(lanes)[0])
        index = np.arange(max(0, first), min(first + self.block_samples, int((stop - start)[0])))
        epoch_start = np.array([block.epoch * self.num_samples])
        before = int((self._counted(epoch_start, lanes + 1) - self._counted(epoch_start, lanes))[0])
        first_slot, end_slot = self.first_slots[lane : lane + 2].tolist()
        batches, slots = np.divmod(index + before, end_slot - first_slot)
        return np.asarray(batches * self.batch + first_slot + slots, dtype=np.int64)

    def _counted(self, ends: Numbers, lanes: Numbers) -> Numbers:
        """C_l(X): positions below X in lanes before l."""
        first = self.first_slots[lanes]
        return np.asarray(ends // self.batch * first + np.minimum(ends % self.batch, first), dtype=np.int64)

    def _lane_range(self, epochs: Numbers, lanes: Numbers) -> tuple[Numbers, Numbers]:
        """First place of a lane in its epoch's arrangement, and the one after its last."""
        start, end = epochs * self.num_samples, (epochs + 1) * self.num_samples
        return (
            self._counted(end, lanes) - self._counted(start, lanes),
            self._counted(end, lanes + 1) - self._counted(start, lanes + 1),
        )

    def _shortening(self, lanes: Numbers) -> Numbers:
        """Places that are missing from the first block of a lane."""
        return np.asarray(lanes * self.block_samples // self.num_lanes, dtype=np.int64)

    def _samples(self, epochs: Numbers, lanes: Numbers, index: Numbers, start: Numbers, length: Numbers) -> Numbers:
        """The samples at these indices of their lanes, which begin at `start` and have `length` places."""
        shortening = self._shortening(lanes)
        numbers = (index + shortening) // self.block_samples
        first = np.maximum(0, numbers * self.block_samples - shortening)
        end = np.minimum(length, (numbers + 1) * self.block_samples - shortening)
        keys = derive(derive(derive(key_of("block", self.seed), epochs), lanes), numbers)
        return self.arrange(epochs, start + first + self._dealt(index - first, end - first, start + first, keys))

    def _dealt(self, index: Numbers, length: Numbers, begin: Numbers, keys: Words) -> Numbers:
        """The places in their blocks of `length` from place `begin` on, of which one chunk after the other has a turn.

        Counted from the first chunk that lies whole in the block; what comes before it follows the block's last place.
        """
        chunk = self.chunk_samples
        num_chunks = -(-length // chunk)
        shorter = length - (num_chunks - 1) * chunk  # places of the last chunk, which it has in the first rounds
        beyond = index - shorter * num_chunks
        in_turn = np.where(beyond < 0, num_chunks, np.maximum(1, num_chunks - 1))
        rounds, turns = np.divmod(np.where(beyond < 0, index, beyond), in_turn)
        rounds += np.where(beyond < 0, 0, shorter)
        chunks = permute(turns, in_turn, derive(keys, 2 * rounds))
        sizes = np.where(chunks == num_chunks - 1, shorter, chunk)
        offsets = permute(rounds, sizes, derive(keys, 2 * chunks + 1))
        return np.asarray((chunks * chunk + offsets - begin % -chunk) % length, dtype=np.int64)

    def arrange(self, epochs: Numbers, places: Numbers) -> Numbers:
        """The samples at these places of their epochs' arrangements: permuted chunks of the rotated data set."""
        chunks, offsets = np.divmod(places, self.chunk_samples)
        num_whole = self.num_samples // self.chunk_samples
        whole = np.flatnonzero(chunks < num_whole)
        keys = derive(key_of("chunks", self.seed), epochs[whole])
        chunks[whole] = permute(chunks[whole], num_whole, keys)
        rotations = np.zeros_like(epochs)
        for epoch in np.unique(epochs).tolist():
            rotations[epochs == epoch] = below(self.num_samples, "rotation", self.seed, epoch)
        return (chunks * self.chunk_samples + offsets + rotations) % self.num_samples


def replacement_at(position: int, attempt: int, num_samples: int, seed: int) -> int:
    """Number of the sample that takes a position after `attempt` unusable ones (1, 2, ...), the same on any rank."""
    word = int.from_bytes(digest("replacement", seed, position, attempt), "little")
    return word % num_samples


def shuffled(num_samples: int, *parts: object) -> Numbers:
    """`range(num_samples)` in an order that is a pure function of the parts."""
    return permute(np.arange(num_samples), num_samples, key_of(*parts))


def check_batches(global_batch: int, micro_batch: int, world_size: int) -> None:
    """Nothing; raises ConfigError unless global_batch = world_size x micro_batch x a whole number."""
    if global_batch < 1 or micro_batch < 1 or global_batch % (world_size * micro_batch):
        raise ConfigError(
            f"train.global_batch={global_batch} must be a positive multiple of ranks x train.micro_batch = "
            f"{world_size} x {micro_batch}; change either, or the number of ranks"
        )


def micro_batches(
    index: int, global_batch: int, micro_batch: int, rank: int, world_size: int, end: int | None = None
) -> list[range]:
    """Positions of each micro-batch of one rank in global batch `index`; empty once the stream has ended.

    `end` is the stream's length in positions (None: endless). A last, shorter global batch is divided as evenly as
    possible. Every rank gets the same number of micro-batches, because collectives inside the model need that; where
    fewer images than ranks are left (or micro_batch is 1) some of those ranges may be empty.
    """
    first = index * global_batch
    num_images = global_batch if end is None else min(global_batch, end - first)
    if num_images <= 0:
        return []
    start = first + num_images * rank // world_size
    stop = first + num_images * (rank + 1) // world_size
    largest_share = -(-num_images // world_size)
    num_parts = -(-largest_share // micro_batch)
    bounds = [start + (stop - start) * part // num_parts for part in range(num_parts + 1)]
    return [range(low, high) for low, high in pairwise(bounds)]
