"""Pictures of a run, embedded in its page: checked, reduced where they are large, as many as the page may weigh."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from ldm_scale.operations.report_html import Html, details, tag
from ldm_scale.telemetry.events import EventPicture

MAX_SIDE_PX = 1600
MAX_PICTURE_BYTES = 1_500_000
MAX_PICTURES_BYTES = 10_000_000  # of all of a page, before base64 makes a third more of them
EARLIER = 4  # pictures of each name that show how it came about
_JPEG_QUALITY = 88


@dataclass
class Album:
    """The pictures of a page as they are put into it."""

    left_bytes: int = MAX_PICTURES_BYTES
    count: int = 0
    num_left_out: int = 0

    def embedded(self, encoded: bytes, label: str) -> Html | None:
        """The picture; None where the page has no room left for it.

        Raises: OSError, SyntaxError or ValueError of Pillow if it cannot be decoded.
        """
        data, kind, size = _reduced(encoded)
        if len(data) > self.left_bytes:
            self.num_left_out += 1
            return None
        self.left_bytes -= len(data)
        self.count += 1
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return tag("img", src=source, alt=label, width=size[0], height=size[1])


def _reduced(encoded: bytes) -> tuple[bytes, str, tuple[int, int]]:
    """The picture as bytes, their format and its size; as it was given where that is small enough."""
    given = Image.open(io.BytesIO(encoded))
    given.load()
    kind = (given.format or "png").lower()
    if max(given.size) <= MAX_SIDE_PX and len(encoded) <= MAX_PICTURE_BYTES and kind in ("png", "jpeg", "webp"):
        return encoded, kind, given.size
    image, kind, side = given.convert("RGB"), "png", MAX_SIDE_PX
    while True:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=_JPEG_QUALITY, optimize=True)
        if buffer.tell() <= MAX_PICTURE_BYTES:
            return buffer.getvalue(), kind, image.size
        if kind == "jpeg":
            side = side * 3 // 4
        kind = "jpeg"


def figures(pictures: dict[str, list[EventPicture]], album: Album, missing: list[str]) -> Iterator[Html]:
    """The last picture of each name with its captions, then those before it as far as there is room."""
    newest = {name: _shown(series[-1], album, missing) for name, series in pictures.items() if series}
    for name, picture in newest.items():
        *before, last = pictures[name]
        earlier = [_shown(one, album, missing) for one in _spread(before, EARLIER)]
        kept = [
            tag("figure", one, tag("figcaption", f"{shown.images_seen:,} images"))
            for one, shown in zip(earlier, _spread(before, EARLIER), strict=True)
            if one is not None
        ]
        captions = tag("ol", *(tag("li", caption or "(none)") for caption in last.captions)) if last.captions else None
        yield tag(
            "figure",
            tag("figcaption", tag("b", name), f" at {last.images_seen:,} images"),
            picture or tag("p", "left out, or damaged: see what is missing", class_="muted"),
            details(f"{len(last.captions)} captions, row by row", captions) if captions else None,
            details("earlier", tag("div", *kept, class_="earlier")) if kept else None,
            class_="picture",
        )


def _shown(picture: EventPicture, album: Album, missing: list[str]) -> Html | None:
    label = f"{picture.name} at {picture.images_seen:,} images"
    try:
        return album.embedded(picture.encoded, f"{label}: {'; '.join(picture.captions)}" if picture.captions else label)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        missing.append(f"the picture {label} is damaged ({error})")
        return None


def _spread(pictures: Sequence[EventPicture], count: int) -> list[EventPicture]:
    """So many of them, from the first to the last."""
    if len(pictures) <= count:
        return list(pictures)
    return [pictures[round(i * (len(pictures) - 1) / (count - 1))] for i in range(count)]
