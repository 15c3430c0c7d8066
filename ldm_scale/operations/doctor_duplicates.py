"""Pictures that look alike: what is left of a picture when it is scaled, recompressed or barely changed, and groups.

**Fingerprint.** The picture is reduced to 32 x 32 pixels. Of their luminance, less mid-grey, the 8 x 8 lowest
frequencies of the two-dimensional DCT-II give a bit each: whether the coefficient is greater than 2% of their root mean
square (the constant one left out). That is the DCT hash of Zauner, "Implementation and Benchmarking of Perceptual
Image Hash Functions" (2010), with a dead zone in the place of the median, since coefficients of symmetric drawings are
zero but for noise, which would set half of the bits. A hash of luminance does not tell a red heart from a blue one, so
the mean colours of 4 x 4 fields are kept beside it.

**Groups.** Two pictures look alike if at most `MAX_BITS` bits of their hashes differ, and no colour by more than
`MAX_COLOUR`. Of `MAX_BITS` + 1 bands of bits one is then equal in both: sorted by each band in turn, like pictures
lie in one run (Manku, Jain and Das Sarma, "Detecting Near-Duplicates for Web Crawling", WWW 2007), and pairs within
runs are all that is compared. A group is what such pairs connect.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_BITS = 3  # of 64
MAX_COLOUR = 16  # of 255
NUM_COLOURS = 48  # 4 x 4 fields of red, green and blue
MAX_NEIGHBOURS = 4096  # in a run that a picture is compared with; longer ones are of pictures without content

_SIDE, _KEPT, _FIELDS = 32, 8, 4
_DEAD_ZONE = 0.02
_LEAST = 0.05 * _SIDE**2  # coefficient of a twentieth of a grey level
_DCT = np.cos(np.pi * np.arange(_KEPT)[:, None] * (2 * np.arange(_SIDE) + 1) / (2 * _SIDE))
_LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


class Fingerprint(NamedTuple):
    """What a picture is recognised by."""

    bits: int  # 64
    colours: bytes


NO_FINGERPRINT = Fingerprint(0, bytes(NUM_COLOURS))


class Groups(NamedTuple):
    """Rows of pictures that look alike, the largest group first; `complete`: all pairs within runs were compared."""

    rows: list[list[int]]
    complete: bool


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an RGB picture."""
    small = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), dtype=np.float64)
    waves = _DCT @ (small @ _LUMINANCE - 127.5) @ _DCT.T
    others = waves.ravel()[1:]
    bits = np.packbits(waves.ravel() > max(_LEAST, _DEAD_ZONE * float(np.sqrt((others**2).mean()))))
    fields = small.reshape(_FIELDS, _SIDE // _FIELDS, _FIELDS, _SIDE // _FIELDS, 3).mean(axis=(1, 3))
    return Fingerprint(int.from_bytes(bits.tobytes(), "big"), fields.round().astype(np.uint8).tobytes())


def find_groups(bits: NDArray[np.uint64], colours: NDArray[np.uint8]) -> Groups:
    """The groups of two and more among pictures with these fingerprints. Shapes: (n,) and (n, NUM_COLOURS)."""
    if len(bits) < 2:
        return Groups([], True)
    # Of equal ones one is enough, or a thousand copies would be half a million pairs.
    whole = np.concatenate([bits.astype(">u8").view(np.uint8).reshape(-1, 8), colours], axis=1)
    _, first, same_as = np.unique(whole, axis=0, return_index=True, return_inverse=True)
    bits, colours = bits[first], colours[first].astype(np.int16)
    parents = list(range(len(bits)))
    complete = True
    for band in np.array_split(np.arange(64, dtype=np.uint64), MAX_BITS + 1):
        values = (bits >> band[0]) & ((np.uint64(1) << np.uint64(len(band))) - np.uint64(1))
        order = np.argsort(values, kind="stable")
        values = values[order]
        starts, step = np.arange(len(values)), 1
        while True:
            starts = starts[starts + step < len(values)]
            starts = starts[values[starts] == values[starts + step]]
            if not len(starts) or step > MAX_NEIGHBOURS:
                complete &= not len(starts)
                break
            one, other = order[starts], order[starts + step]
            close = np.flatnonzero(np.bitwise_count(bits[one] ^ bits[other]) <= MAX_BITS)
            one, other = one[close], other[close]
            alike = np.abs(colours[one] - colours[other]).max(axis=1, initial=0) <= MAX_COLOUR
            for pair in zip(one[alike].tolist(), other[alike].tolist(), strict=True):
                _unite(parents, *pair)
            step += 1
    roots = np.array([_root(parents, number) for number in range(len(parents))])[same_as.ravel()]
    by_root = np.argsort(roots, kind="stable")
    runs = np.split(by_root, np.flatnonzero(np.diff(roots[by_root])) + 1)
    return Groups(sorted((run.tolist() for run in runs if len(run) > 1), key=lambda run: (-len(run), run[0])), complete)


def _root(parents: list[int], number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number


def _unite(parents: list[int], one: int, other: int) -> None:
    roots = sorted((_root(parents, one), _root(parents, other)))
    parents[roots[1]] = roots[0]
