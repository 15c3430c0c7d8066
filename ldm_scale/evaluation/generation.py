"""How well a denoiser denoises and what its samples look like, without any reference model.

The denoising loss over random timesteps is one number dominated by where it happens to be large. Here every image is
noised once in each of several equal ranges of timesteps, with noise and timesteps that depend on the image's number
alone: the same at every validation, for raw and averaged weights and on any number of ranks, so that two numbers
differ because the models do.
"""

from __future__ import annotations

import math
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from ldm_scale.diffusion.loss import diffusion_loss
from ldm_scale.engine import seeding
from ldm_scale.errors import NumericsError
from ldm_scale.telemetry.log import shows_progress

NUM_BINS = 8
_NOISE_PURPOSE = "noise-level-losses"
_GOLDEN_RATIO_SHARE = (math.sqrt(5.0) - 1.0) / 2.0

_MARGIN_PX = 12
_GAP_PX = 4
_FONT_PX = 13
_MAX_CAPTION_LINES = 2
_TEXT_COLOUR = (70, 70, 70)


class ForwardProcess(Protocol):
    """What is needed of diffusion.schedule.NoiseSchedule."""

    @property
    def num_timesteps(self) -> int:
        """T."""

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Latents (B, c, h, w) noised to the timesteps t (B,)."""


@dataclass(frozen=True, eq=False)
class NoiseLevelLosses:
    """Mean squared error of predicted noise in equal ranges of timesteps, least noisy first.

    Sets of images combine as means weighted by `num_images`.
    Shapes: denoiser and zero (num_bins,), float64, on the CPU.
    """

    denoiser: Tensor
    zero: Tensor  # of predicting no noise at all, on the same noise: about 1
    num_images: int


@torch.no_grad()
def noise_level_losses(
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
    latents: Tensor,
    contexts: Tensor,
    schedule: ForwardProcess,
    seed: int,
    image_numbers: Sequence[int] | None = None,
    num_bins: int = NUM_BINS,
    batch_size: int = 64,
) -> NoiseLevelLosses:
    """Losses of `denoise(z_t, t, context) -> eps`, every image once in every range of timesteps.

    `image_numbers` are the images' places in the whole validation set, which choose their noise and timesteps; None
    counts from 0. A rank that holds a part of the set passes that part's numbers. `contexts` is whatever has one row
    per image: a context, or tokens that `denoise` encodes.
    Shapes: latents (N, c, h, w), contexts (N, ...), on the device where `denoise` runs.
    Source: arXiv:2112.10752, eq. 2.
    """
    num_images = len(latents)
    numbers = range(num_images) if image_numbers is None else image_numbers
    assert len(numbers) == len(contexts) == num_images, "one context and one number per latent are needed"
    assert 1 <= num_bins <= schedule.num_timesteps, f"{num_bins} ranges of {schedule.num_timesteps} timesteps"
    sums = torch.zeros(2, num_bins, dtype=torch.float64)
    images_per_batch = max(1, batch_size // num_bins)
    bins = torch.arange(num_bins)
    # A bar only for what takes long: during training this runs often and mostly within seconds.
    with tqdm(
        total=num_images,
        desc="noise levels",
        unit="images",
        mininterval=1.0,
        delay=3.0,
        leave=False,
        file=sys.stderr,
        disable=not shows_progress(),
    ) as bar:
        for begin in range(0, num_images, images_per_batch):
            chosen = slice(begin, begin + images_per_batch)
            streams = [seeding.stream(seed, _NOISE_PURPOSE, number) for number in numbers[chosen]]
            noise = seeding.normal(streams, (num_bins, *latents.shape[1:])).flatten(0, 1).to(latents.device)
            t = _timesteps(numbers[chosen], num_bins, schedule.num_timesteps).flatten().to(latents.device)
            z0 = latents[chosen].float().repeat_interleave(num_bins, dim=0)
            context = contexts[chosen].repeat_interleave(num_bins, dim=0)
            prediction = denoise(schedule.add_noise(z0, noise, t), t, context)
            losses = torch.stack(
                [diffusion_loss(prediction, noise, "l2"), diffusion_loss(torch.zeros_like(noise), noise, "l2")]
            )
            sums.index_add_(1, bins.repeat(len(streams)), losses.double().cpu())
            bar.update(len(streams))
    means = sums / max(1, num_images)
    return NoiseLevelLosses(means[0], means[1], num_images)


def frechet_closure(untrained: float, trained: float, real: float) -> float:
    """Share of the way from an untrained model's distance to that between two real sets which training has closed.

    0: no better than untrained; 1: as near as real images are to each other.
    Raises: NumericsError if untrained samples are not farther from real images than these are from each other.
    """
    if not untrained > real:
        raise NumericsError(
            f"the distance of untrained samples ({untrained:.4g}) does not exceed that between two real sets "
            f"({real:.4g}): this feature space cannot judge these images; fit it on images of the same kind and size"
        )
    return (untrained - trained) / (untrained - real)


def captioned_grid(
    images: Tensor,
    captions: Sequence[str],
    columns: int,
    path: Path | str,
    real: Tensor | None = None,
    side_px: int = 96,
) -> None:
    """Writes a PNG on white: the images with their captions below, each beside its real image where `real` is given.

    Small images are enlarged without smoothing where `side_px` is a multiple of their side, so that their pixels are
    seen as they are.
    Shapes: images and real (N, 3, H, W) in [-1, 1]; one caption per image.
    """
    assert len(images) == len(captions) > 0, f"{len(images)} images, {len(captions)} captions"
    assert real is None or len(real) == len(images), "one real image per image is needed"
    columns = min(columns, len(images))
    font = ImageFont.load_default(_FONT_PX)
    line_px = _FONT_PX + 3
    cell_width = side_px if real is None else 2 * side_px + _GAP_PX
    wrapped = [_wrapped(caption, cell_width, font) for caption in captions]
    text_px = line_px * max(text.count("\n") + 1 for text in wrapped)
    step_x, step_y = cell_width + _MARGIN_PX, side_px + _GAP_PX + text_px + _MARGIN_PX
    header_px = 0 if real is None else line_px + _GAP_PX
    rows = math.ceil(len(images) / columns)
    size = (columns * step_x + _MARGIN_PX, rows * step_y + _MARGIN_PX + header_px)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    if real is not None:
        draw.text((_MARGIN_PX, _MARGIN_PX), "left: real image    right: sample", fill=_TEXT_COLOUR, font=font)
    for i, text in enumerate(wrapped):
        x = _MARGIN_PX + i % columns * step_x
        y = _MARGIN_PX + header_px + i // columns * step_y
        pair = [images[i]] if real is None else [real[i], images[i]]
        for place, image in enumerate(pair):
            canvas.paste(_tile(image, side_px), (x + place * (side_px + _GAP_PX), y))
        below = (x + cell_width / 2, y + side_px + _GAP_PX)
        draw.multiline_text(below, text, fill=_TEXT_COLOUR, font=font, anchor="ma", align="center", spacing=3)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, format="PNG", optimize=True)


def _timesteps(numbers: Sequence[int], num_bins: int, num_timesteps: int) -> Tensor:
    """One timestep per image and range, (N, num_bins) int64, at the same share of every range.

    The share of image i is the fraction of i times the golden ratio, which fills [0, 1) evenly however many images
    there are; random ones would leave gaps.
    """
    shares = torch.tensor([(number + 0.5) * _GOLDEN_RATIO_SHARE % 1.0 for number in numbers], dtype=torch.float64)
    positions = (torch.arange(num_bins) + shares[:, None]) * num_timesteps / num_bins
    return positions.long()


def _tile(image: Tensor, side_px: int) -> Image.Image:
    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    tile = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    whole = side_px % tile.width == 0 and side_px % tile.height == 0
    return tile.resize((side_px, side_px), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _wrapped(caption: str, width_px: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The caption on at most two lines that fit, cut with an ellipsis.

    Accents go: Pillow's own font, the only one that is everywhere, would draw boxes for accented letters.
    """
    decomposed = unicodedata.normalize("NFKD", caption)
    plain = "".join(character for character in decomposed if not unicodedata.combining(character))
    max_characters = max(4, int(width_px / font.getlength("e")))
    return "\n".join(textwrap.wrap(plain, max_characters, max_lines=_MAX_CAPTION_LINES, placeholder="...") or [""])
