"""Permutations of `range(n)` that are evaluated at single places: no table, whatever n is.

A Feistel network permutes a power of two that holds n, mostly the smallest; what falls beyond n is permuted again until
it does not (cycle walking: fewer than two rounds on average). Both are bijections for any round function, so the result
is one too, and a random one as far as the round function is: Black and Rogaway, "Ciphers with Arbitrary Finite Domains"
(CT-RSA 2002). Integer arithmetic alone, fixed here: numpy's own permutations may change with its version, and a
resumed run's order with them.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint64]

_NUM_ROUNDS = 8  # even, so that halves of unequal width stand in their places again
# Networks on fewer bits than this are far from uniform (chi-squared over all orders of five: 6,844 of 119 degrees of
# freedom with 3 bits, 134 with 6), so that few numbers are permuted as part of 64.
_MIN_BITS = 6
_WEYL = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: keys that differ by one are far apart after mixing


def digest(*parts: object, size: int = 8) -> bytes:
    """BLAKE2b digest of the parts, the source of every random choice of the data layer."""
    return blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=size).digest()


def uniforms(count: int, *parts: object) -> tuple[float, ...]:
    """`count` (at most 8) numbers in [0, 1), a pure function of the parts."""
    words = np.frombuffer(digest(*parts, size=8 * count), dtype="<u8")
    return tuple(int(word >> 11) * 2.0**-53 for word in words.tolist())


def below(size: int, *parts: object) -> int:
    """A number of `range(size)`, a pure function of the parts."""
    return int.from_bytes(digest(*parts, size=16), "little") % size


def key_of(*parts: object) -> Words:
    """A key for `permute`, shaped to broadcast; keys of one family are made from it by `derive`."""
    return np.array([int.from_bytes(digest(*parts), "little")], dtype=np.uint64)


def derive(key: Words, number: ArrayLike) -> Words:
    """The keys of these numbers, elementwise."""
    return _mix(key + _WEYL * (np.atleast_1d(np.asarray(number)).astype(np.uint64) + np.uint64(1)))


def _mix(words: Words) -> Words:
    """Words in which every bit depends on all bits of the given ones: the finalizer of SplitMix64 (Steele et al.)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def permute(index: ArrayLike, size: ArrayLike, key: Words) -> NDArray[np.int64]:
    """Where the permutation of `range(size)` under `key` puts `index`, elementwise over arrays that broadcast."""
    places, sizes, keys = (
        array.ravel()
        for array in np.broadcast_arrays(
            np.atleast_1d(np.asarray(index)).astype(np.uint64), np.asarray(size).astype(np.uint64), key
        )
    )
    assert (places < sizes).all(), "an index outside the permuted range"
    # Bits that hold size - 1. A float holds it exactly below 2**53, far above any number of samples.
    exact = np.frexp((sizes - np.uint64(1)).astype(np.float64))[1]
    bits = np.where(exact == 0, 0, np.maximum(exact, _MIN_BITS)).astype(np.uint64)  # of one number: nothing to do
    result = _network(places, bits, keys)
    beyond = np.flatnonzero(result >= sizes)
    while len(beyond):
        result[beyond] = _network(result[beyond], bits[beyond], keys[beyond])
        beyond = beyond[result[beyond] >= sizes[beyond]]
    return result.astype(np.int64)


def _network(places: Words, bits: Words, keys: Words) -> Words:
    """The Feistel network on words of `bits` bits."""
    one = np.uint64(1)
    low_bits = bits - bits // np.uint64(2)
    low_mask, high_mask = (one << low_bits) - one, (one << (bits - low_bits)) - one
    high, low = places >> low_bits, places & low_mask
    for number in range(_NUM_ROUNDS):
        high, low = low, (high ^ _mix(low ^ derive(keys, number))) & high_mask
        high_mask, low_mask = low_mask, high_mask
    return (high << low_bits) | low
