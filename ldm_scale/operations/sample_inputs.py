"""From the files and words of `ldm-scale sample` to what the model is conditioned on.

Every option is a list, and image i takes the i-th entry of each, repeated where a list is shorter. Layouts are JSON:
{"objects": [{"class": name or number, "box": [x, y, width, height]}], "size": [width, height]}, boxes in pixels of a
picture of that size, or in fractions of the picture without "size".
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_scale.conditioning.base import Conditions
from ldm_scale.conditioning.classes import NO_CLASS
from ldm_scale.conditioning.pixel_guidance import named_number
from ldm_scale.data.annotations import Layout, SceneObject, open_map
from ldm_scale.data.decode import to_pixels
from ldm_scale.data.pictures import open_rgb
from ldm_scale.data.policy import BadSample
from ldm_scale.errors import ConfigError
from ldm_scale.interchange.classifier import LoadedClassifier
from ldm_scale.interchange.load import LoadedDiffusion

T = TypeVar("T")
Size = tuple[int, int]  # height, width in pixels

# Section of the configuration -> the options (fields of the arguments) that give it.
_NEEDS = {
    "text": ("prompt",),
    "frozen_text": ("prompt",),
    "classes": ("classes",),
    "layout": ("layout",),
    "semantic_map": ("map",),
    "low_resolution": ("image",),
    "inpainting": ("image", "mask"),
}
_USAGE = {
    "prompt": '--prompt TEXT (as often as you like; "" = none) or --prompts-file FILE',
    "classes": "--class NAME|NUMBER|none",
    "layout": "--layout FILE.json",
    "map": "--map FILE.png",
    "image": "--image FILE",
    "mask": "--mask FILE",
}


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """What the images are to show, one row per image."""

    y: Conditions
    seeds: range
    titles: list[str]  # what stands below each image
    prompts: list[str] | None
    size: Size | None  # of the samples, where the user says it
    init_images: Tensor | None
    guide_classes: Tensor | None  # (N,) of --classifier


def read_request(
    arguments: argparse.Namespace, model: LoadedDiffusion, classifier: LoadedClassifier | None
) -> SampleRequest:
    """What the command line asks of `model`; `classifier` is that of --classifier, where there is one.

    Raises: ConfigError if something is missing, unreadable, or nothing that the model is conditioned on.
    """
    prompts = list(arguments.prompt) + _file_prompts(arguments.prompts_file)
    given: dict[str, Sequence[Any]] = {
        "prompt": prompts,
        "classes": arguments.classes,
        "layout": arguments.layout,
        "map": arguments.map,
        "image": arguments.image,
        "mask": arguments.mask,
    }
    sections = model.network.conditioner.conditions
    _check_given(given, list(sections), has_classifier=classifier is not None)
    longest = max(1, len(arguments.init_image), *map(len, given.values()))
    count = longest if arguments.num_images is None else arguments.num_images
    if count < longest:
        raise ConfigError(
            f"--num-images {count}: must be at least {longest}, the number of images that the lists ask for; leave it "
            "out, or shorten them"
        )
    seeds = range(arguments.seed, arguments.seed + count)
    size = _size(arguments.size)

    def each(name: str, read: Callable[[Any], T]) -> list[T]:
        values = [read(value) for value in given[name]]
        return [values[i % len(values)] for i in range(count)] if values else []

    images = _stacked(each("image", lambda path: _picture(path, None if "low_resolution" in sections else size)))
    inits = [_picture(path, size) for path in arguments.init_image]
    y = Conditions(
        captions=each("prompt", str) or None,
        classes=torch.tensor(each("classes", lambda word: _class(word, model))) if "classes" in sections else None,
        layouts=each("layout", lambda path: _layout(path, model)) or None,
        maps=_stacked(each("map", lambda path: _map(path, size))),
        low_resolution=images if "low_resolution" in sections else None,
        images=images if "inpainting" in sections else None,
        masks=_stacked(each("mask", lambda path: _mask(path, size))),
    )
    if size is None and y.low_resolution is None:
        _require_one_size(y, inits)
    titles = [", ".join(words) for words in zip(*_titles(given, count), strict=True)] or [f"seed {s}" for s in seeds]
    return SampleRequest(
        y,
        seeds,
        titles,
        each("prompt", str) or None,
        size,
        _stacked([inits[i % len(inits)] for i in range(count)] if inits else []),
        None if classifier is None else classifier.class_numbers(each("classes", str), "--class"),
    )


def _check_given(given: dict[str, Sequence[Any]], sections: list[str], *, has_classifier: bool) -> None:
    if "low_resolution" in sections and "inpainting" in sections:
        raise ConfigError(
            "the model takes a small image and an image to fill, and the command line has one --image; use "
            "load_diffusion(...).sample(...) in Python"
        )
    wanted = {option: section for section in sections for option in _NEEDS[section]}
    if has_classifier:
        wanted.setdefault("classes", "classifier")
    for option, section in wanted.items():
        if not given[option]:
            owner = (
                "--classifier needs classes" if section == "classifier" else f"the model is conditioned on {section}"
            )
            raise ConfigError(f"{owner}: give {_USAGE[option]}")
    for option, values in given.items():
        if values and option not in wanted:
            known = ", ".join(sections) or "nothing: it takes --num-images alone"
            raise ConfigError(f"{_USAGE[option].split()[0]}: the model is conditioned on {known}; leave it out")


def _titles(given: dict[str, Sequence[Any]], count: int) -> Iterable[list[str]]:
    for values in given.values():
        words = [value.stem if isinstance(value, Path) else str(value) for value in values]
        if words:
            yield [words[i % len(words)] for i in range(count)]


def _file_prompts(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts-file {path} cannot be read as UTF-8 text: {error}") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts-file {path} holds no prompt; write one per line")
    return prompts


def _size(text: str | None) -> Size | None:
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ConfigError(f"--size {text}: must be height and width in pixels, such as 512x768")
    return int(found[1]), int(found[2])


def _class(word: str, model: LoadedDiffusion) -> int:
    section = model.conditioning.classes
    assert section is not None, "asked for models with classes alone"
    if word.casefold() == "none":
        return NO_CLASS
    return named_number(word, model.labels.get("classes") or list(map(str, range(section.num_classes))), "--class")


def _bytes(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror or error}") from error


def _open(path: Path, option: str, read: Callable[[bytes], Image.Image]) -> Image.Image:
    try:
        return read(_bytes(path, option))
    except BadSample as error:
        raise ConfigError(f"{option} {path}: {error}; give a picture file such as a PNG") from error


def _resized(image: Image.Image, size: Size | None, method: Image.Resampling) -> Image.Image:
    return image if size is None else image.resize((size[1], size[0]), method)


def _picture(path: Path, size: Size | None) -> Tensor:
    """Pixels (3, H, W) in [-1, 1]."""
    image = _resized(_open(path, "picture", open_rgb), size, Image.Resampling.BICUBIC)
    return to_pixels(np.asarray(image)[None].copy())[0]


def _mask(path: Path, size: Size | None) -> Tensor:
    """(1, H, W): 1 where the picture is white (128 and above), 0 elsewhere."""
    image = _resized(_open(path, "--mask", open_rgb).convert("L"), size, Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(image) >= 128)[None].float()


def _map(path: Path, size: Size | None) -> Tensor:
    """Labels (H, W)."""
    image = _open(path, "--map", lambda data: open_map(data, None))
    return torch.from_numpy(np.array(_resized(image, size, Image.Resampling.NEAREST), dtype=np.uint8))


def _layout(path: Path, model: LoadedDiffusion) -> Layout:
    section = model.conditioning.layout
    assert section is not None, "asked for models with layouts alone"
    names = model.labels.get("object_classes") or list(map(str, range(section.num_classes)))
    try:
        document = json.loads(_bytes(path, "--layout"))
        objects = document["objects"]
        width, height = document.get("size", (1.0, 1.0))
        if not (width > 0 and height > 0):
            raise ValueError("size")
        pairs = [(str(entry["class"]), [float(number) for number in entry["box"]]) for entry in objects]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f'--layout {path}: must be JSON like {{"objects": [{{"class": "apple", "box": [x, y, width, height]}}], '
            f'"size": [width, height]}} ({type(error).__name__}: {error})'
        ) from error
    return Layout(tuple(_object(path, names, word, box, width, height) for word, box in pairs))


def _object(path: Path, names: list[str], word: str, box: list[float], width: float, height: float) -> SceneObject:
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ConfigError(f"--layout {path}: box {box} of {word!r} must be [x, y, width, height] in finite numbers")
    left, top = box[0] / width, box[1] / height
    # Sums of decimal fractions miss 1 by a rounding error.
    right, bottom = round((box[0] + box[2]) / width, 9), round((box[1] + box[3]) / height, 9)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ConfigError(
            f"--layout {path}: box {box} of {word!r} is not within the picture of {width:g} x {height:g} or has no "
            'area; give [x, y, width, height] inside it ("size" says how large it is, 1 x 1 without)'
        )
    return SceneObject(named_number(word, names, f"--layout {path}: class"), (left, top, right, bottom))


def _stacked(rows: list[Tensor]) -> Tensor | None:
    """Rows as one tensor.

    Raises: ConfigError if their sizes differ.
    """
    shapes = {tuple(row.shape[-2:]) for row in rows}
    if len(shapes) > 1:
        sizes = " and ".join(f"{height} x {width}" for height, width in sorted(shapes)[:2])
        raise ConfigError(f"pictures of {sizes} pixels in one batch: must have one size; give --size HxW")
    return torch.stack(rows) if rows else None


def _require_one_size(y: Conditions, inits: list[Tensor]) -> None:
    tensors = {"--image": y.images, "--map": y.maps, "--init-image": inits[0] if inits else None}
    sizes = {option: tuple(tensor.shape[-2:]) for option, tensor in tensors.items() if tensor is not None}
    if len(set(sizes.values())) > 1:
        words = ", ".join(f"{option} {height} x {width}" for option, (height, width) in sizes.items())
        raise ConfigError(f"{words} pixels: must have one size; give --size HxW")
