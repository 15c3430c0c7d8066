"""Random holes: sizes grow with the style and with the image, streams decide, none is empty."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_scale.conditioning.masks import MaskStyle, random_mask
from ldm_scale.engine.seeding import stream

STYLES: tuple[MaskStyle, ...] = ("thin", "medium", "thick", "mixed")


def masks(style: MaskStyle, side: int, count: int = 60) -> np.ndarray:
    return np.stack([random_mask(side, side, style, stream(0, "mask", number)) for number in range(count)])


def depth(mask: np.ndarray) -> int:
    """How often a hole can be eroded until nothing is left: half the width of its widest place."""
    steps = 0
    while mask.any():
        inner = np.pad(mask, 1)
        mask = mask & inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        steps += 1
    return steps


@pytest.mark.parametrize("style", STYLES)
def test_a_mask_is_a_function_of_its_stream_and_never_empty(style: MaskStyle) -> None:
    for size in ((64, 48), (8, 8), (16, 64), (1, 1)):
        for number in range(10):
            mask = random_mask(*size, style, stream(1, "mask", number))
            assert mask.shape == size
            assert mask.dtype == np.bool_
            assert mask.any()
            np.testing.assert_array_equal(mask, random_mask(*size, style, stream(1, "mask", number)))
    assert len({mask.tobytes() for mask in masks(style, 64)}) > 55


def test_styles_differ_in_width() -> None:
    widths = [np.median([depth(mask) for mask in masks(style, 128)]) for style in ("thin", "medium", "thick")]
    assert widths[0] < 0.7 * widths[1]
    assert widths[1] < 0.7 * widths[2]
    # LaMa's filter keeps up to half of the image; thick ones go beyond it now and then.
    shares = [masks(style, 128).mean() for style in ("thin", "medium", "thick")]
    assert all(0.15 < share < 0.5 for share in shares), shares


@pytest.mark.parametrize("style", STYLES)
def test_lengths_scale_with_the_image(style: MaskStyle) -> None:
    small, large = masks(style, 64), masks(style, 256)
    assert abs(small.mean() - large.mean()) < 0.06


def test_strokes_have_all_directions_and_boxes_stay_inside_their_margin() -> None:
    thick = masks("thick", 128, 300)
    # Boxes alone have straight rows: the mask is a union of few distinct rows.
    boxes = [mask for mask in thick if len(np.unique(mask, axis=0)) <= 7]
    assert 0.12 < len(boxes) / len(thick) < 0.36  # 0.3 / 1.3 of them
    inside = np.pad(np.ones((118, 118), np.bool_), 5)
    assert all(not (mask & ~inside).any() for mask in boxes)
    # No place of the image is spared.
    covered = thick.mean(axis=0)
    assert covered.min() > 0.1
    assert np.abs(covered - np.rot90(covered)).mean() < 0.05
