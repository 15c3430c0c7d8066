"""Arrays that stand as .npy among the members of a sample, read without a copy.

numpy's reader evaluates each header as Python and copies what follows, which takes longer than all else that is done to
a cached sample. The members of a cache have few different headers: each is parsed once, by numpy.
"""

from __future__ import annotations

import io
import math
import tokenize
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_scale.errors import DataError

Members = Mapping[str, bytes | memoryview | str]  # of a sample

_NPY_START = 10  # bytes before a .npy's header: magic, version, length of the header

# What numpy's reader raises besides ValueError where a header is no Python.
_HEADER_ERRORS = (SyntaxError, TypeError, tokenize.TokenError, RecursionError, MemoryError, OverflowError, LookupError)


def array_of(sample: Members, name: str) -> NDArray[Any]:
    """The array of a .npy among the members, a view of it.

    Raises: DataError, naming the key, if it is missing or none.
    """
    content = sample.get(name)
    if content is None or isinstance(content, str):
        raise DataError(f"{sample['__key__']!s}: no member {name}, which its manifest promises; encode its shard anew")
    try:
        # Version 1 alone, which numpy writes for every array of numbers: its header's length is in two bytes.
        end = _NPY_START + int.from_bytes(content[_NPY_START - 2 : _NPY_START], "little")
        shape, dtype, count = _npy_header(bytes(content[:end]))
        if len(content) != end + count * dtype.itemsize:
            raise ValueError(f"{len(content) - end} bytes of data for {count} numbers in {dtype}")
        return np.frombuffer(content, dtype, count, end).reshape(shape)
    except ValueError as error:
        raise DataError(f"{sample['__key__']!s}: its {name} cannot be read ({error}); encode its shard anew") from None


@lru_cache(maxsize=64)  # a cache's members have one header each kind; parsing it costs more than all else of a sample
def _npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """(shape, dtype, number of numbers) that the first bytes of a .npy tell.

    Raises: ValueError if they are malformed, or tell of something else than an array of numbers in C order.
    """
    stream = io.BytesIO(header)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("not a .npy of version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except _HEADER_ERRORS as error:
        raise ValueError(f"malformed header: {type(error).__name__}") from None
    if dtype.hasobject or dtype.itemsize == 0 or (fortran and len(shape) > 1):
        raise ValueError(f"not an array of numbers in C order, but {dtype}")
    return shape, dtype, math.prod(shape)


def all_finite(values: NDArray[Any]) -> bool:
    """Whether there is neither NaN nor infinity, of floats in one piece.

    By their bits, many times as fast as `np.isfinite` in half precision: infinity's are the smallest that are not
    finite, of positive floats among signed integers and of negative ones among unsigned.
    """
    if not values.size:
        return True
    for kind, infinity in (("i", math.inf), ("u", -math.inf)):
        integer = np.dtype(f"{kind}{values.itemsize}")
        if values.view(integer).max() >= np.array(infinity, values.dtype).view(integer):
            return False
    return True


def not_finite(key: str, name: str) -> DataError:
    """The error of a member that holds NaN or infinity."""
    return DataError(f"{key}: its {name} holds NaN or infinity; encode its shard anew")
