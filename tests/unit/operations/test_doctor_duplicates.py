"""Fingerprints and groups of pictures that look alike: by hand, against a brute-force search, and on copies."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ldm_scale.operations import doctor_duplicates
from ldm_scale.operations.doctor_duplicates import MAX_BITS, MAX_COLOUR, NUM_COLOURS, find_groups, fingerprint


def _wave(row: int, column: int, amplitude: float, size: int = 32) -> Image.Image:
    """One basis function of the DCT around mid-grey."""
    x = (2 * np.arange(size) + 1) / (2 * size) * np.pi
    values = 127.5 + amplitude * np.cos(row * x)[:, None] * np.cos(column * x)[None]
    return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize(("row", "column"), [(0, 3), (2, 0), (5, 7), (7, 7), (1, 1)])
def test_a_wave_sets_the_bit_of_its_frequency_alone(row: int, column: int) -> None:
    bit = 1 << (63 - 8 * row - column)
    assert fingerprint(_wave(row, column, 100)).bits == bit
    assert fingerprint(_wave(row, column, 100, size=96)).bits == bit
    assert fingerprint(_wave(row, column, -100)).bits == 0


def test_a_speck_on_a_plain_picture_sets_no_bit() -> None:
    grey = np.full((32, 32, 3), 127, np.uint8)
    grey[9, 4] = 150  # 0.02 of a grey level in the mean
    assert fingerprint(Image.fromarray(grey)).bits == 0


def test_plain_pictures_are_told_apart_by_their_colours() -> None:
    prints = [fingerprint(Image.new("RGB", (50, 40), color)) for color in ("white", "#fdfdfd", "red", "black")]
    assert [found.bits for found in prints] == [1 << 63, 1 << 63, 0, 0]
    assert prints[2].colours == bytes([255, 0, 0] * 16)
    bits = np.array([found.bits for found in prints], dtype=np.uint64)
    colours = np.array([list(found.colours) for found in prints], dtype=np.uint8)
    assert find_groups(bits, colours).rows == [[0, 1]]


def _photo() -> Image.Image:
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(path).convert("RGB")


def _emblem() -> Image.Image:
    """A symmetric drawing: most of its coefficients are zero."""
    values = np.full((96, 96, 3), 255, np.uint8)
    y, x = np.mgrid[:96, :96] - 47.5
    values[np.hypot(x, y) < 40] = (250, 210, 40)
    values[np.hypot(np.abs(x) - 14, y + 10) < 6] = 0
    return Image.fromarray(values)


@pytest.mark.parametrize("picture", [_photo(), _emblem()], ids=["photo", "emblem"])
def test_copies_in_other_sizes_and_qualities_look_alike_and_others_do_not(picture: Image.Image) -> None:
    copies = [picture, picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)]
    for quality in (30, 75):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        copies.append(Image.open(buffer).convert("RGB"))
    changed = np.asarray(picture).copy()
    changed[: picture.height // 3] = changed[: picture.height // 3][:, ::-1] // 2
    blue = Image.fromarray(np.asarray(picture)[..., ::-1].copy())  # red and blue change places
    shown = [*copies, Image.fromarray(changed), blue]
    prints = [fingerprint(image) for image in shown]
    bits = np.array([found.bits for found in prints], dtype=np.uint64)
    colours = np.array([list(found.colours) for found in prints], dtype=np.uint8)
    assert find_groups(bits, colours) == ([[0, 1, 2, 3]], True)


def _by_brute_force(bits: list[int], colours: NDArray[np.uint8]) -> list[list[int]]:
    """Connected components of the graph of all alike pairs, the largest first."""
    left, groups = set(range(len(bits))), []
    while left:
        group, waiting = [], [min(left)]
        while waiting:
            one = waiting.pop()
            if one not in left:
                continue
            left.remove(one)
            group.append(one)
            for other in left:
                far = np.abs(colours[one].astype(int) - colours[other].astype(int)).max()
                if (bits[one] ^ bits[other]).bit_count() <= MAX_BITS and far <= MAX_COLOUR:
                    waiting.append(other)
        groups.append(sorted(group))
    return sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), group[0]))


@pytest.mark.parametrize("seed", range(6))
def test_groups_are_those_of_a_search_through_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 1 << 63, 12, dtype=np.uint64) * np.uint64(2)
    bits, colours = [], []
    for _ in range(300):
        flips = rng.choice(64, rng.integers(0, 5), replace=False)
        bits.append(int(rng.choice(centres)) ^ sum(1 << int(flip) for flip in flips))
        colours.append((rng.integers(0, 3) * 40 + rng.integers(0, 20, NUM_COLOURS)).astype(np.uint8))
    bits[250:260], colours[250:260] = bits[:10], colours[:10]  # copies
    table = np.array(colours)
    found = find_groups(np.array(bits, dtype=np.uint64), table)
    assert found.rows == _by_brute_force(bits, table)
    assert found.complete
    assert len(found.rows) > 5


@pytest.mark.parametrize("flips", [(0, 16, 32), (15, 31, 63), (0, 1, 2), (61, 62, 63), (20, 40, 60)])
def test_three_bits_wherever_they_lie_are_found_and_four_are_not(flips: tuple[int, ...]) -> None:
    grey = np.full((2, NUM_COLOURS), 128, np.uint8)
    other = 0x0123456789ABCDEF
    for flip in flips:
        other ^= 1 << flip
    assert find_groups(np.array([0x0123456789ABCDEF, other], np.uint64), grey).rows == [[0, 1]]
    other ^= 1 << 50
    assert find_groups(np.array([0x0123456789ABCDEF, other], np.uint64), grey).rows == []


def test_few_pictures_have_no_groups() -> None:
    assert find_groups(np.array([], np.uint64), np.zeros((0, NUM_COLOURS), np.uint8)) == ([], True)
    assert find_groups(np.array([7], np.uint64), np.zeros((1, NUM_COLOURS), np.uint8)) == ([], True)


def test_many_copies_are_one_group_and_long_runs_are_given_up_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_duplicates, "MAX_NEIGHBOURS", 3)
    grey = np.full((50_000, NUM_COLOURS), 128, np.uint8)
    rows, complete = find_groups(np.full(50_000, 5, np.uint64), grey)
    assert (len(rows), len(rows[0]), complete) == (1, 50_000, True)
    several = (np.arange(20, dtype=np.uint64) << np.uint64(40)) | np.uint64(1)  # of one lowest band
    assert not find_groups(several, grey[:20]).complete
