"""What stands where in a composed scene, and its caption: a function of (seed, number), the same at any resolution.

Overlaps are judged on one coarse grid, so that a scene keeps its objects however large it is drawn. Objects of a scene
have different classes, so that a caption can name each of them, and lie wholly inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm_scale.data.permutation import uniforms

Mask = NDArray[np.bool_]
Colour = tuple[int, int, int]

# Sides of the square that an emoji is drawn in, as shares of the scene's; its ink takes about three quarters of that.
CELL_SIDES = (0.36, 0.44, 0.52, 0.6, 0.7)

_GRID = 64  # side of the scene on which overlaps are judged
# Of an object's own area, on the grid; more than the half that is promised, because other resolutions round otherwise.
_MIN_VISIBLE = 0.6
_ATTEMPTS = 12  # to place one object before the scene does with fewer

_COLOURS: dict[str, Colour] = {
    "white": (245, 245, 245),
    "grey": (150, 150, 150),
    "black": (25, 25, 25),
    "red": (215, 50, 45),
    "orange": (240, 140, 40),
    "yellow": (250, 220, 80),
    "green": (60, 160, 75),
    "light green": (165, 220, 130),
    "teal": (40, 150, 150),
    "blue": (50, 95, 205),
    "light blue": (150, 205, 245),
    "purple": (125, 65, 165),
    "pink": (245, 165, 195),
    "brown": (130, 85, 50),
}
_SHADES = 12  # of 255: how far a scene's colour lies from the named one, at most

Pattern = Literal["flat", "fade", "stripes", "checks", "dots"]


class _Backgrounds(NamedTuple):
    """What a scene's background is drawn from."""

    patterns: tuple[Pattern, ...]
    colours: Mapping[str, Colour] = _COLOURS
    shades: int = _SHADES


# What `--backgrounds` chooses from.
BACKGROUNDS: dict[str, _Backgrounds] = {
    "all": _Backgrounds(("flat", "flat", "fade", "stripes", "checks", "dots")),
    "plain": _Backgrounds(("flat", "flat", "fade")),
    "white": _Backgrounds(("flat",), {"white": (255, 255, 255)}, shades=0),
}
_STRIPES = ("horizontal", "vertical", "diagonal")
# (across, down) of the axis along which each of them changes.
_AXES = ((0.0, 1.0), (1.0, 0.0), (0.70710678, 0.70710678))
_FADES = ("from top to bottom", "from left to right", "from corner to corner")

# Names of emoji that are no nouns.
_NOUNS = {"locked": "padlock", "unlocked": "open padlock"}


@dataclass(frozen=True)
class Background:
    """What is behind the objects."""

    pattern: Pattern
    names: tuple[str, str]  # of its colours; a flat one has the first alone
    colours: tuple[Colour, Colour]
    axis: int
    period: float  # of stripes, checks and dots, as a share of the side

    def describe(self) -> str:
        """The noun phrase for a caption."""
        first, second = self.names
        if self.pattern == "flat":
            return f"{_article(first)} {first} background"
        if self.pattern == "fade":
            return f"a background fading {_FADES[self.axis]} from {first} to {second}"
        kind = f"{_STRIPES[self.axis]} stripes" if self.pattern == "stripes" else self.pattern
        if self.pattern == "dots":
            return f"{_article(first)} {first} background with {second} dots"
        return f"a background of {first} and {second} {kind}"

    def draw(self, resolution: int) -> NDArray[np.uint8]:
        """The picture. Shapes: returns (resolution, resolution, 3)."""
        first, second = (np.array(colour, np.float32) for colour in self.colours)
        return (first + self._share(resolution)[..., None] * (second - first)).round().astype(np.uint8)

    def _share(self, resolution: int) -> NDArray[np.float32]:
        """How much of the second colour each pixel has, in [0, 1]."""
        centres = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
        across, down = centres[None, :], centres[:, None]
        along = _AXES[self.axis][0] * across + _AXES[self.axis][1] * down
        if self.pattern == "flat":
            share = 0.0 * along
        elif self.pattern == "fade":
            share = along / sum(_AXES[self.axis])
        elif self.pattern == "stripes":
            share = np.floor(2.0 * along / self.period) % 2.0
        elif self.pattern == "checks":
            share = (np.floor(2.0 * across / self.period) + np.floor(2.0 * down / self.period)) % 2.0
        else:
            share = np.hypot(across % self.period - 0.5 * self.period, down % self.period - 0.5 * self.period)
            share = (share < 0.28 * self.period).astype(np.float32)
        return np.broadcast_to(share, (resolution, resolution)).astype(np.float32)


@dataclass(frozen=True)
class Placed:
    """An object of a scene. Where: shares of the room that it has left, so that it is inside at any resolution."""

    label: int
    cell: float  # one of CELL_SIDES
    across: float
    down: float

    def corner(self, resolution: int, mask: Mask) -> tuple[int, int]:
        """(left, top) in pixels of an object with this mask."""
        height, width = mask.shape
        return round(self.across * (resolution - width)), round(self.down * (resolution - height))


@dataclass(frozen=True)
class Scene:
    """A scene; later objects lie on top of earlier ones."""

    background: Background
    objects: tuple[Placed, ...]
    caption: str


def cell_pixels(cell: float, resolution: int) -> int:
    """Side of an emoji's square in pixels."""
    return max(1, round(cell * resolution))


def plan_scene(
    seed: int,
    number: int,
    names: Sequence[str],
    max_objects: int,
    mask_of: Callable[[int, int], Mask],
    backgrounds: str = "all",
) -> Scene:
    """The scene of a number; `mask_of(label, pixels)` is an object's mask in a square of so many, cut to its ink.

    Objects that cover an earlier one by too much are placed anew, and left out when that does not help.
    """
    how_many = 1 + int(uniforms(1, "scene", seed, number)[0] * min(max_objects, len(names)))
    left = list(range(len(names)))
    objects: list[Placed] = []
    masks: list[Mask] = []  # what can be seen of each so far
    areas: list[int] = []  # of each when nothing covers it
    centres: list[tuple[float, float]] = []
    for place in range(how_many):
        (choice,) = uniforms(1, "object", seed, number, place)
        label = left.pop(int(choice * len(left)))
        for attempt in range(_ATTEMPTS):
            size, across, down = uniforms(3, "place", seed, number, place, attempt)
            item = Placed(label, CELL_SIDES[int(size * len(CELL_SIDES))], across, down)
            mask = mask_of(label, cell_pixels(item.cell, _GRID))
            x, y = item.corner(_GRID, mask)
            whole = paste_mask(mask, x, y, _GRID)
            below = [earlier & ~whole for earlier in masks]
            if all(part.sum() >= _MIN_VISIBLE * area for part, area in zip(below, areas, strict=True)):
                objects.append(item)
                masks = [*below, whole]
                areas.append(int(whole.sum()))
                centres.append(((x + mask.shape[1] / 2) / _GRID, (y + mask.shape[0] / 2) / _GRID))
                break
    background = _background(seed, number, BACKGROUNDS[backgrounds])
    nouns = [noun_phrase(names[item.label]) for item in objects]
    return Scene(background, tuple(objects), f"{_describe(nouns, centres)} on {background.describe()}")


def paste_mask(mask: Mask, left: int, top: int, resolution: int) -> Mask:
    """The mask in a scene of this resolution. Shapes: returns (resolution, resolution)."""
    whole = np.zeros((resolution, resolution), np.bool_)
    whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return whole


def _background(seed: int, number: int, choice: _Backgrounds) -> Background:
    """The background of a number."""
    pattern, first, second, axis, period = uniforms(5, "background", seed, number)
    shades = uniforms(6, "shade", seed, number)
    names = list(choice.colours)
    one = names.pop(int(first * len(names)))
    chosen = (one, names[int(second * len(names))] if names else one)
    colours = [
        tuple(
            min(255, max(0, channel + round((2.0 * shade - 1.0) * choice.shades)))
            for channel, shade in zip(choice.colours[name], shades[3 * n : 3 * n + 3], strict=True)
        )
        for n, name in enumerate(chosen)
    ]
    return Background(
        choice.patterns[int(pattern * len(choice.patterns))],
        chosen,
        (colours[0], colours[1]),  # type: ignore[arg-type]  # three channels each
        int(axis * len(_AXES)),
        0.2 + 0.2 * period,
    )


def noun_phrase(name: str) -> str:
    """A name with its article; plurals have none."""
    noun = _NOUNS.get(name, name)
    head = noun.partition(" with ")[0].partition(" showing ")[0].lower()
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is"))
    return noun if plural else f"{_article(noun)} {noun}"


def _article(words: str) -> str:
    """The indefinite article, by the sound that the first word begins with."""
    lower = words.lower()
    vowel = lower.startswith(("hour", "honest")) or (
        lower.startswith(tuple("aeiou")) and not lower.startswith(("uni", "use", "eu", "one-"))
    )
    return "an" if vowel else "a"


def _describe(nouns: Sequence[str], centres: Sequence[tuple[float, float]]) -> str:
    """The objects two by two, each pair by how its first lies to its second; an odd last one by its own place."""
    parts = []
    for n in range(0, len(nouns) - 1, 2):
        parts.append(f"{nouns[n]} {_relation(centres[n], centres[n + 1])} {nouns[n + 1]}")
    if len(nouns) % 2:
        parts.append(f"{nouns[-1]} {_place(centres[-1])}")
    return " and ".join(parts)


def _relation(first: tuple[float, float], second: tuple[float, float]) -> str:
    """How the first centre lies to the second, along the axis on which they are farther apart."""
    across, down = second[0] - first[0], second[1] - first[1]
    if abs(across) >= abs(down):
        return "left of" if across > 0 else "right of"
    return "above" if down > 0 else "below"


def _place(centre: tuple[float, float]) -> str:
    """Where a centre lies in the scene, by thirds of what a centre can reach."""
    column, row = (min(2, max(0, int((value - 0.2) / 0.2))) for value in centre)
    down, across = ("top", "", "bottom")[row], ("left", "", "right")[column]
    if not down and not across:
        return "in the middle"
    return f"at the {' '.join(filter(None, (down, across)))}"


def scene_record(scene: Scene) -> dict[str, Any]:
    """What a scene's metadata say of its background, as plain values."""
    background = scene.background
    count = 1 if background.pattern == "flat" else 2
    return {"pattern": background.pattern, "colours": list(background.names[:count])}
