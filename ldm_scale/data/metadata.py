"""What a sample says of its picture in words: captions, class, and the object in its .json.

Text is UTF-8; UTF-16 or UTF-32 where it begins with their byte-order mark; else cp1252, what Western tools wrote before
and the superset of Latin-1's characters. Of cp1252 five bytes have no meaning, and text never holds a null character:
both tell binary data. In JSON, NaN and Infinity are null, because pandas writes them for values that are missing.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_scale.data.permutation import uniforms
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import RawSample
from ldm_scale.telemetry.log import say_once

NO_CLASS = -1  # label of a sample without a class
MAX_CAPTION_CHARACTERS = 65_536  # a text encoder reads a few hundred; what is longer is no caption

# The longer mark first: UTF-32's begins with UTF-16's.
_MARKED = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(data: bytes, what: str) -> str:
    """The text of a member, in the encodings above, without blanks around it.

    Raises: BadSample, in which `what` names it, if it is in none of them.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    else:
        return text.removeprefix("\ufeff").strip()
    encoding = next((name for mark, name in _MARKED if data.startswith(mark)), "cp1252")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise BadSample(f"{what} is not text in UTF-8, UTF-16 or cp1252") from None
    if encoding == "cp1252":
        say_once(f"{what} in cp1252", f"data: text that is not UTF-8 ({what}) is read as cp1252")
    return text.strip()


def read_captions(sample: RawSample, metadata: dict[str, Any]) -> list[str]:
    """All captions, at least one: the metadata's "captions", else member .txt, else the metadata's "caption", else "".

    Raises: BadSample if one is not text.
    """
    captions = metadata.get("captions")
    if captions:
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise BadSample("captions are not a list of strings")
        return [_checked(caption.strip()) for caption in captions]
    if "txt" in sample:
        return [_checked(decode_text(member_bytes(sample, "txt"), "caption"))]
    caption = metadata.get("caption")
    if caption is None:
        return [""]
    if not isinstance(caption, str):
        raise BadSample("caption is not a string")
    return [_checked(caption.strip())]


def _checked(caption: str) -> str:
    """The caption.

    Raises: BadSample if it holds what text does not, or too much.
    """
    if len(caption) > MAX_CAPTION_CHARACTERS:
        raise BadSample(f"caption has more than {MAX_CAPTION_CHARACTERS:,} characters")
    if "\0" in caption:
        raise BadSample("caption holds a null character")
    # JSON can spell half a surrogate pair, which no tokenizer and no log can encode.
    if not caption.isascii() and any("\ud800" <= character <= "\udfff" for character in caption):
        raise BadSample("caption holds half a surrogate pair")
    return caption


def read_caption(sample: RawSample, metadata: dict[str, Any]) -> str:
    """The first caption.

    Raises: BadSample as `read_captions`.
    """
    return read_captions(sample, metadata)[0]


def choose_caption(captions: Sequence[str], augment: bool, seed: int, epoch: int, key: str) -> str:
    """The caption that a sample has in an epoch: any of them in training, else the first."""
    if not augment or len(captions) == 1:
        return captions[0]
    (choice,) = uniforms(1, "caption", seed, epoch, key)
    return captions[int(choice * len(captions))]


def read_metadata(sample: RawSample) -> dict[str, Any]:
    """The member .json, {} if there is none.

    Raises: BadSample if it is no JSON object, or gives a key twice.
    """
    if "json" not in sample:
        return {}
    try:
        metadata = json.loads(
            member_bytes(sample, "json"), parse_constant=lambda name: None, object_pairs_hook=_without_twins
        )
    except (ValueError, RecursionError):
        raise BadSample("metadata is not JSON") from None
    if not isinstance(metadata, dict):
        raise BadSample("metadata is not a JSON object")
    return metadata


def may_name(sample: RawSample, *names: str) -> bool:
    """Whether the member .json may have one of these keys at its top: sure only if not, and without parsing it."""
    if "json" not in sample:
        return False
    content = member_bytes(sample, "json")
    # Other encodings and escapes can spell a key in other bytes.
    if content[:1] != b"{" or b"\0" in content or b"\\u" in content:
        return True
    return any(f'"{name}"'.encode() in content for name in names)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's content.

    Raises: BadSample if a key comes twice: which value is meant, readers disagree about.
    """
    content = dict(pairs)
    if len(content) != len(pairs):
        raise BadSample("metadata gives a key twice")
    return content


def read_class(sample: RawSample, metadata: dict[str, Any]) -> int | str | None:
    """The class as stored: member .cls, else "class" in the metadata; a number where it reads as one, else a name.

    None if there is neither.
    Raises: BadSample if it is not text, or the metadata's is of another type.
    """
    if "cls" in sample:
        stored: Any = decode_text(member_bytes(sample, "cls"), "class")
        return int(stored) if re.fullmatch("[0-9]{1,9}", stored) else str(stored)
    stored = metadata.get("class")
    if stored is None or (isinstance(stored, int | str) and not isinstance(stored, bool)):
        return stored
    raise BadSample("class is neither a number nor a name")


def read_label(sample: RawSample, metadata: dict[str, Any], class_numbers: Mapping[str, int] | None) -> int:
    """The class's number in the manifest's list, NO_CLASS if the sample has none, or nothing lists them.

    Raises: BadSample if it is not listed.
    """
    stored = read_class(sample, metadata) if class_numbers is not None else None
    if stored is None or class_numbers is None:
        return NO_CLASS
    label = class_numbers.get(stored, NO_CLASS) if isinstance(stored, str) else stored
    if not 0 <= label < len(class_numbers):
        raise BadSample("class is not in the manifest's list")
    return label


def member_bytes(sample: RawSample, extension: str) -> bytes:
    """A member of a raw sample, copied where it is a view of a file."""
    member = sample[extension]
    assert not isinstance(member, str), extension
    return bytes(member)  # of bytes: themselves
