"""Random holes to learn inpainting from: irregular strokes and boxes (arXiv:2109.07161, section 2.3 and appendix).

The three settings are those of its evaluation masks at 256 px; lengths and widths scale with the image's shorter
side. An image gets strokes or boxes, never both. No hole is empty, and nothing limits its share of the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

MaskStyle = Literal["thin", "medium", "thick", "mixed"]

_REFERENCE_SIDE = 256  # of the image that lengths below are pixels of
_MIN_LENGTH, _MIN_WIDTH = 10, 5  # of a stroke's segment
_MAX_SEGMENTS = 5  # of a stroke


@dataclass(frozen=True)
class _Boxes:
    """Number of boxes, their sides, and how far from the image's edges they stay."""

    num: tuple[int, int]
    side: tuple[int, int]
    margin: int


@dataclass(frozen=True)
class _Style:
    """Number of strokes, what is added at most to a segment's least length and width, and the share with boxes."""

    num_strokes: tuple[int, int]
    length: int
    width: int
    box_share: float = 0.0
    boxes: _Boxes | None = None


# Strokes have weight 1 and boxes 0.3 where there are any.
_STYLES: dict[str, _Style] = {
    "thin": _Style((4, 50), 40, 10),
    "medium": _Style((4, 5), 100, 50, 0.3 / 1.3, _Boxes((1, 5), (10, 50), 0)),
    "thick": _Style((1, 5), 200, 100, 0.3 / 1.3, _Boxes((1, 3), (30, 150), 10)),
}


def random_mask(height: int, width: int, style: MaskStyle, stream: np.random.Generator) -> NDArray[np.bool_]:
    """A hole, True where the image is to be filled. Shapes: returns (height, width)."""
    name = str(stream.choice(list(_STYLES))) if style == "mixed" else style
    settings = _STYLES[name]
    image = Image.new("1", (width, height))
    canvas, scale = ImageDraw.Draw(image), min(height, width) / _REFERENCE_SIDE
    if settings.boxes is not None and stream.random() < settings.box_share:
        _draw_boxes(canvas, (height, width), settings.boxes, scale, stream)
    else:
        for _ in range(_between(settings.num_strokes, stream)):
            _draw_stroke(canvas, (height, width), settings, scale, stream)
    return np.array(image)


def _between(bounds: tuple[int, int], stream: np.random.Generator) -> int:
    return int(stream.integers(bounds[0], bounds[1] + 1))


def _draw_stroke(
    canvas: ImageDraw.ImageDraw, size: tuple[int, int], style: _Style, scale: float, stream: np.random.Generator
) -> None:
    """One chain of segments, each of its own direction, length and width, with round joints."""
    height, width = size
    x, y = float(stream.integers(width)), float(stream.integers(height))
    for _ in range(_between((1, _MAX_SEGMENTS), stream)):
        angle = float(stream.uniform(0, 2 * math.pi))
        length = scale * (_MIN_LENGTH + stream.random() * style.length)
        thickness = max(1, round(scale * (_MIN_WIDTH + stream.random() * style.width)))
        end_x = min(max(x + length * math.cos(angle), 0.0), width - 1.0)
        end_y = min(max(y + length * math.sin(angle), 0.0), height - 1.0)
        canvas.line([(x, y), (end_x, end_y)], fill=1, width=thickness)
        for joint in ((x, y), (end_x, end_y)):
            canvas.circle(joint, thickness / 2, fill=1)
        x, y = end_x, end_y


def _draw_boxes(
    canvas: ImageDraw.ImageDraw, size: tuple[int, int], boxes: _Boxes, scale: float, stream: np.random.Generator
) -> None:
    margin = round(scale * boxes.margin)
    for _ in range(_between(boxes.num, stream)):
        sides = [min(max(1, round(scale * _between(boxes.side, stream))), max(1, whole - 2 * margin)) for whole in size]
        top, left = (
            int(stream.integers(margin, max(margin, whole - margin - side) + 1))
            for side, whole in zip(sides, size, strict=True)
        )
        canvas.rectangle([left, top, left + sides[1] - 1, top + sides[0] - 1], fill=1)
