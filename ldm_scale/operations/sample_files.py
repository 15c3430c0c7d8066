"""Pictures that `ldm-scale sample` leaves: the grid, each image, the way there, and in each how it was made.

PNG text chunks: prompt, negative_prompt, seed, sampler, steps, guidance, ... by their own names, and all of it once
more under "parameters", in the lines that AUTOMATIC1111's web UI writes there and many programs read.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm_scale import __version__
from ldm_scale.config.schema import SamplingConfig
from ldm_scale.engine.tensor_file import replace_file
from ldm_scale.evaluation.generation import draw_captioned_grid, png_bytes
from ldm_scale.interchange.load import LoadedDiffusion
from ldm_scale.operations.sample_inputs import SampleRequest

STRIP_COLUMNS, STRIP_IMAGES = 8, 4  # predictions of an image, and images, in a strip
# Keys of text chunks -> fields of the arguments that hold an entry for each image.
_LISTS = {
    "class": "classes",
    "layout": "layout",
    "map": "map",
    "image": "image",
    "mask": "mask",
    "init_image": "init_image",
}
_SINGLE = (
    *("tile", "tile_overlap", "clip_guidance", "clip_model", "clip_weights", "imagenet_guidance"),
    *("classifier_weights", "guide_scale"),
)
HASH_CHARACTERS = 10  # of the model's hash among the parameters, as other programs abbreviate theirs
_MAX_COLUMNS = 8
_MIN_CELL_PX, _MAX_GRID_PX = 96, 8192


@dataclass(frozen=True)
class Made:
    """How the images of one command were made."""

    model_hash: str
    arguments: argparse.Namespace
    sampling: SamplingConfig
    size: tuple[int, int]  # (H, W) in pixels

    def texts(self, prompt: str | None, seed: str, image: int | None = None) -> dict[str, str]:
        """The text chunks of an image, by their keys; what does not apply is absent. `image` None: of all images."""
        given, sampling = self.arguments, self.sampling
        texts: dict[str, object] = {
            "prompt": prompt,
            "negative_prompt": given.negative_prompt,
            **{key: _listed(getattr(given, name), image) for key, name in _LISTS.items()},
            **{name: getattr(given, name) for name in _SINGLE},
            "classifier": None if given.classifier is None else given.classifier.resolve().name,
            "seed": seed,
            "sampler": sampling.sampler,
            "steps": sampling.num_steps,
            "eta": sampling.eta or None,
            "guidance": f"{sampling.guidance_scale:g}",
            "guidance_rescale": sampling.guidance_rescale or None,
            "guidance_interval": None
            if sampling.guidance_interval is None
            else " ".join(f"{level:g}" for level in sampling.guidance_interval),
            "strength": given.strength,
            "weights": given.weights,
            "model": given.source.resolve().name,
            "model_hash": self.model_hash,
            "Software": f"ldm-scale {__version__}",  # a key that the PNG standard has
        }
        # A path may hold bytes that are no text.
        words = {key: str(value) for key, value in texts.items() if value is not None}
        known = {key: value.encode("utf-8", "backslashreplace").decode() for key, value in words.items()}
        return known | {"parameters": _parameters(known, self.size)}


def _listed(values: Sequence[Path | str], image: int | None) -> str | None:
    """The entry of a list that an image was made for, of files the name; or all of them."""
    names = [value.name if isinstance(value, Path) else value for value in values]
    if not names:
        return None
    return "; ".join(dict.fromkeys(names)) if image is None else names[image % len(names)]


def _parameters(texts: Mapping[str, str], size: tuple[int, int]) -> str:
    """The texts in the lines of AUTOMATIC1111's web UI: prompt, negative prompt, all else as `Name: value`."""
    settings = {
        "Steps": texts["steps"],
        "Sampler": texts["sampler"],
        "CFG scale": texts["guidance"],
        "Seed": texts["seed"],
        "Size": f"{size[1]}x{size[0]}",
        "Model hash": texts["model_hash"][:HASH_CHARACTERS],
        "Model": texts["model"],
        "Denoising strength": texts.get("strength"),
        "Eta": texts.get("eta"),
        "Version": texts["Software"],
    }
    # Readers take a line for the negative prompt, or for the settings, by how it begins: what is given is one line.
    prompt, negative = (" ".join(texts.get(key, "").splitlines()) for key in ("prompt", "negative_prompt"))
    lines = [prompt]
    if "negative_prompt" in texts:
        lines.append(f"Negative prompt: {negative}")
    # Readers split at commas and colons, but for what is quoted as JSON quotes it.
    quoted = {name: json.dumps(v) if re.search(r"[,:\n\"]", v) else v for name, v in settings.items() if v is not None}
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in quoted.items())])


def write_grid(path: Path, images: Tensor, request: SampleRequest, made: Made) -> None:
    """Nothing; the images in their own size, as far as the grid stays below a limit, with their titles."""
    side = max(images.shape[-2:])
    columns = min(_MAX_COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    cell = max(_MIN_CELL_PX, min(side, _MAX_GRID_PX // max(columns, rows)))
    grid = draw_captioned_grid(_squares(images), request.titles, columns, cell)
    prompts = None if request.prompts is None else "; ".join(dict.fromkeys(request.prompts))
    _save(path, grid, made.texts(prompts, _range(request.seeds)))


def write_each(directory: Path, images: Tensor, request: SampleRequest, made: Made) -> list[Path]:
    """The files' paths, one per image."""
    paths = []
    for i, (seed, title) in enumerate(zip(request.seeds, request.titles, strict=True)):
        words = re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-")[:40] or "empty"
        paths.append(directory / f"{seed:06d}-{words}.png")
        prompt = None if request.prompts is None else request.prompts[i]
        _save(paths[-1], _picture(images[i]), made.texts(prompt, str(seed), i))
    return paths


@dataclass
class Strip:
    """Collects what the network takes the first images for, from noise to the end."""

    count: int  # images in all
    num_steps: int
    _seen: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (image, step) -> latents (c, h, w)

    @property
    def num_images(self) -> int:
        """Images of which the strip tells."""
        return min(STRIP_IMAGES, self.count)

    @property
    def steps(self) -> list[int]:
        """Steps that are shown, the first and the last among them."""
        shown = min(STRIP_COLUMNS, self.num_steps)
        return sorted({round(i * (self.num_steps - 1) / max(1, shown - 1)) for i in range(shown)})

    def observe(self, row: int, step: int, x0: Tensor) -> None:
        """Nothing; keeps the clean latents that were predicted for a batch whose first image is `row`."""
        if step in self.steps:
            for i in range(row, min(row + len(x0), self.num_images)):
                self._seen[i, step] = x0[i - row].clone()

    @torch.no_grad()
    def write(self, path: Path, model: LoadedDiffusion, images: Tensor, titles: Sequence[str], made: Made) -> None:
        """Nothing; a row for each image: the decoded predictions, and the image itself behind them."""
        tile, overlap = made.arguments.tile, made.arguments.tile_overlap
        shown, captions = [], []
        for i in range(self.num_images):
            for step in self.steps:
                z0 = self._seen[i, step][None]
                shown.append(model.autoencoder.decode(z0, tile, overlap).float().clamp(-1, 1).cpu())
                captions.append(f"step {step + 1} of {self.num_steps}")
            shown.append(images[i : i + 1])
            captions.append(titles[i])
        columns = len(self.steps) + 1
        side = max(_MIN_CELL_PX, min(max(images.shape[-2:]), _MAX_GRID_PX // columns))
        grid = draw_captioned_grid(_squares(torch.cat(shown)), captions, columns, side)
        seeds = range(made.arguments.seed, made.arguments.seed + self.num_images)
        _save(path, grid, made.texts(None, _range(seeds)))


def _squares(images: Tensor) -> Tensor:
    """The images in the middle of white squares."""
    side = max(images.shape[-2:])
    rest = [side - images.shape[-1], side - images.shape[-2]]
    return F.pad(images, [rest[0] // 2, rest[0] - rest[0] // 2, rest[1] // 2, rest[1] - rest[1] // 2], value=1.0)


def _picture(image: Tensor) -> Image.Image:
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def _range(seeds: range) -> str:
    return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"


def _save(path: Path, picture: Image.Image, texts: Mapping[str, str]) -> None:
    """Nothing; the PNG is there with its texts, whole. Texts beyond Latin-1 become iTXt chunks, in UTF-8."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, png_bytes(picture, info))
