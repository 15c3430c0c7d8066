"""Seeded damage to bytes, as disks, networks and enemies do it."""

from __future__ import annotations

import struct
import zlib

import numpy as np

_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """The bytes after one or two injuries; `other` is what pieces are spliced in from."""
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 3))):
        _INJURIES[int(rng.integers(len(_INJURIES)))](damaged, other, rng)
    return bytes(damaged)


def _place(data: bytes | bytearray, rng: np.random.Generator) -> int:
    """An offset; every fourth among the first bytes, where formats say what they are."""
    return int(rng.integers(min(len(data), 64 if rng.random() < 0.25 else len(data)) or 1))


def _flip(data: bytearray, other: bytes, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(1, 9))):
        at = _place(data, rng)
        if at < len(data):
            data[at] ^= 1 << int(rng.integers(8))


def _cut(data: bytearray, other: bytes, rng: np.random.Generator) -> None:
    del data[_place(data, rng) :]


def _drop(data: bytearray, other: bytes, rng: np.random.Generator) -> None:
    at = _place(data, rng)
    del data[at : at + int(rng.integers(1, 40))]


def _splice(data: bytearray, other: bytes, rng: np.random.Generator) -> None:
    at, start = _place(data, rng), _place(other, rng)
    data[at : at + int(rng.integers(0, 40))] = other[start : start + int(rng.integers(1, 200))]


def _repeat(data: bytearray, other: bytes, rng: np.random.Generator) -> None:
    at = _place(data, rng)
    data[at:at] = data[at : at + int(rng.integers(1, 60))] * int(rng.integers(1, 20))


def _length(data: bytearray, other: bytes, rng: np.random.Generator) -> None:
    """A length field, or what is taken for one, says something else."""
    value = _EXTREMES[int(rng.integers(len(_EXTREMES)))] if rng.random() < 0.5 else int(rng.integers(2**32))
    form = (">I", "<I", ">H", "<H")[int(rng.integers(4))]
    packed = struct.pack(form, value & (0xFFFFFFFF if form[1] == "I" else 0xFFFF))
    at = _place(data, rng)
    data[at : at + len(packed)] = packed


def with_checksums(data: bytes) -> bytes:
    """The chunks of a PNG with checksums that fit what they hold, so that damage to it reaches the decoder."""
    fixed, at = bytearray(data), 8
    while at + 12 <= len(fixed):
        end = at + 8 + int.from_bytes(fixed[at : at + 4], "big")
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(fixed[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


_INJURIES = (_flip, _cut, _drop, _splice, _repeat, _length)
