"""What samples are worth without any reference model, and a grid to look at them."""

from __future__ import annotations

import io
import math
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm_scale.engine.tensor_file import replace_file
from ldm_scale.errors import NumericsError

_MARGIN_PX = 12
_GAP_PX = 4
_FONT_PX = 13
_MAX_CAPTION_LINES = 2
_TEXT_COLOUR = (70, 70, 70)


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
    images: Tensor | Mapping[str, Tensor],
    captions: Sequence[str],
    columns: int,
    path: Path | str,
    side_px: int = 96,
) -> None:
    """Writes what `draw_captioned_grid` draws as a PNG, which is there whole, or as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, png_bytes(draw_captioned_grid(images, captions, columns, side_px)))


def png_bytes(picture: Image.Image, texts: PngInfo | None = None) -> bytes:
    """A picture as the content of a PNG file, with texts in its chunks."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=texts, optimize=True)
    return buffer.getvalue()


def draw_captioned_grid(
    images: Tensor | Mapping[str, Tensor], captions: Sequence[str], columns: int, side_px: int = 96
) -> Image.Image:
    """A picture on white: the images with their captions below, or groups of them side by side, by name.

    Small images are enlarged without smoothing where `side_px` is a multiple of their side, so that their pixels are
    seen as they are.
    Shapes: each (N, 3, H, W) in [-1, 1], of sizes of their own; one caption per image or group.
    """
    panels = {"": images} if isinstance(images, Tensor) else images
    for part in panels.values():
        assert len(part) == len(captions) > 0, f"{len(part)} images, {len(captions)} captions"
    columns = min(columns, len(captions))
    font = ImageFont.load_default(_FONT_PX)
    line_px = _FONT_PX + 3
    cell_width = len(panels) * (side_px + _GAP_PX) - _GAP_PX
    wrapped = [_wrapped(caption, cell_width, font) for caption in captions]
    text_px = line_px * max(text.count("\n") + 1 for text in wrapped)
    step_x, step_y = cell_width + _MARGIN_PX, side_px + _GAP_PX + text_px + _MARGIN_PX
    header_px = line_px + _GAP_PX if len(panels) > 1 else 0
    rows = math.ceil(len(captions) / columns)
    size = (columns * step_x + _MARGIN_PX, rows * step_y + _MARGIN_PX + header_px)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    if header_px:
        draw.text((_MARGIN_PX, _MARGIN_PX), "  |  ".join(panels), fill=_TEXT_COLOUR, font=font)
    for i, text in enumerate(wrapped):
        x = _MARGIN_PX + i % columns * step_x
        y = _MARGIN_PX + header_px + i // columns * step_y
        for place, part in enumerate(panels.values()):
            canvas.paste(_tile(part[i], side_px), (x + place * (side_px + _GAP_PX), y))
        below = (x + cell_width / 2, y + side_px + _GAP_PX)
        draw.multiline_text(below, text, fill=_TEXT_COLOUR, font=font, anchor="ma", align="center", spacing=3)
    return canvas


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
