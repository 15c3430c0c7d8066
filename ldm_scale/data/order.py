"""Which sample stands at which position of the training stream: arithmetic, no state.

A position counts images from the start of training, over all ranks and epochs. Position p holds sample
perm(seed, epoch = p // N)[p mod N]; global batch k owns positions kB .. (k + 1)B - 1, and rank r of W the r-th of its W
equal parts. So a batch holds the same images at any number of ranks and loader workers, a resumed run needs one
integer, and epochs may end in the middle of a batch. The cost is random access to the shards and one permutation per
process (4 bytes per sample, 8 above 2**32 samples).

Permutations are the argsort of Philox's raw output and other choices are BLAKE2 digests: both are fixed by their
definitions, where numpy's `Generator.permutation` may change from version to version and break a resumed run's order.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ldm_scale.errors import ConfigError


def digest(*parts: object, size: int = 8) -> bytes:
    """BLAKE2b digest of the parts, the source of every random choice of the data layer but permutations."""
    return blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=size).digest()


def uniforms(count: int, *parts: object) -> tuple[float, ...]:
    """`count` (at most 8) numbers in [0, 1), a pure function of the parts."""
    words = np.frombuffer(digest(*parts, size=8 * count), dtype="<u8")
    return tuple(int(word >> 11) * 2.0**-53 for word in words.tolist())


@lru_cache(maxsize=4)
def global_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.uint32 | np.uint64]:
    """The permutation of `range(num_samples)` that epoch `epoch` visits, read-only.

    Several are cached: a batch may span the end of an epoch, and validation has its own stream.
    """
    key = int.from_bytes(digest("order", seed, epoch, size=16), "little")
    raw = np.random.Philox(key=key).random_raw(num_samples)
    order: NDArray[np.uint32 | np.uint64] = np.argsort(raw, kind="stable").astype(
        np.uint32 if num_samples <= 2**32 else np.uint64
    )
    order.flags.writeable = False
    return order


def sample_at(position: int, num_samples: int, seed: int) -> int:
    """Index of the sample that stands at a global position."""
    epoch, offset = divmod(position, num_samples)
    return int(global_order(num_samples, seed, epoch)[offset])


def replacement_at(position: int, attempt: int, num_samples: int, seed: int) -> int:
    """Index of the sample that takes a position after `attempt` undecodable ones (1, 2, ...), the same on any rank."""
    word = int.from_bytes(digest("replacement", seed, position, attempt), "little")
    return word % num_samples


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
