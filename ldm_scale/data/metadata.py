"""What a sample says of its picture in words: captions, class, and the object in its .json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_scale.data.permutation import uniforms
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import RawSample

NO_CLASS = -1  # label of a sample without a class


def read_captions(sample: RawSample, metadata: dict[str, Any]) -> list[str]:
    """All captions, at least one: the metadata's "captions", else member .txt, else the metadata's "caption", else "".

    Raises: BadSample if one is not UTF-8 or not a string.
    """
    captions = metadata.get("captions")
    if captions:
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise BadSample("captions are not a list of strings")
        return [caption.strip() for caption in captions]
    if "txt" in sample:
        try:
            return [member_bytes(sample, "txt").decode("utf-8").strip()]
        except UnicodeDecodeError:
            raise BadSample("caption is not UTF-8") from None
    caption = metadata.get("caption")
    if caption is None:
        return [""]
    if not isinstance(caption, str):
        raise BadSample("caption is not a string")
    return [caption.strip()]


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

    Raises: BadSample if it is no JSON object.
    """
    if "json" not in sample:
        return {}
    try:
        metadata = json.loads(member_bytes(sample, "json"))
    except (ValueError, RecursionError):
        raise BadSample("metadata is not JSON") from None
    if not isinstance(metadata, dict):
        raise BadSample("metadata is not a JSON object")
    return metadata


def read_class(sample: RawSample, metadata: dict[str, Any]) -> int | str | None:
    """The class as stored: member .cls, else "class" in the metadata; a number where it reads as one, else a name.

    None if there is neither.
    Raises: BadSample if the metadata's class is of another type.
    """
    if "cls" in sample:
        stored: Any = member_bytes(sample, "cls").decode("utf-8", "replace").strip()
        return int(stored) if re.fullmatch("[0-9]{1,9}", stored) else str(stored)
    stored = metadata.get("class")
    if stored is None or (isinstance(stored, int | str) and not isinstance(stored, bool)):
        return stored
    raise BadSample("class is neither a number nor a name")


def read_label(sample: RawSample, metadata: dict[str, Any], class_numbers: Mapping[str, int]) -> int:
    """The class's number in the manifest's list, NO_CLASS if the sample has none.

    Raises: BadSample if it is not listed.
    """
    stored = read_class(sample, metadata)
    if stored is None:
        return NO_CLASS
    label = class_numbers.get(stored, NO_CLASS) if isinstance(stored, str) else stored
    if not 0 <= label < len(class_numbers):
        raise BadSample("class is not in the manifest's list")
    return label


def member_bytes(sample: RawSample, extension: str) -> bytes:
    """A member of a raw sample."""
    member = sample[extension]
    assert isinstance(member, bytes), extension
    return member
