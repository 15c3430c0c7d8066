"""Names of shards: which are allowed, and how patterns become names.

A name is a path or a `file://`, `http(s)://`, `s3://` or `gs://` URL. Everything else is refused: a scheme that runs a
command or unpacks archives (`pipe:`, fsspec's chains) would turn a manifest from a stranger into code. Nothing of the
environment is put into a name, and no shell sees one.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice

from braceexpand import braceexpand

from ldm_scale.errors import DataError
from ldm_scale.redaction import public_name, redact

__all__ = ["expand_names", "local_path", "names_shards", "public_name", "redact", "scheme_of", "shard_stem"]

SCHEMES = ("file", "http", "https", "s3", "gs")
MAX_NAMES = 10_000_000  # of one pattern: a slip of the finger in a brace range must not fill the memory

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
_GLOB = re.compile(r"[*?\[]")
_Lister = Callable[[str], list[str]]


def scheme_of(name: str) -> str:
    """The scheme of a name in lower case; "" for a path.

    Raises: DataError if it is none of `SCHEMES`.
    """
    match = _SCHEME.match(name)
    if match is None:
        return ""
    scheme = match[1].lower()
    if scheme not in SCHEMES or not name.startswith("//", match.end()):
        raise DataError(
            f"{scheme}:... cannot be read: shards are local paths or {', '.join(f'{s}://' for s in SCHEMES)} URLs, and "
            f"commands are never run; copy the shards there, or write ./{scheme}:... for a file of that name"
        )
    return scheme


def local_path(name: str) -> str | None:
    """The path of a local name, `file://` or not; None for a remote one. Percent signs stand for themselves.

    Raises: DataError if the scheme is not allowed, or a `file://` URL names another host.
    """
    scheme = scheme_of(name)
    if scheme != "file":
        return None if scheme else name
    host, slash, path = name[len("file://") :].partition("/")
    if host not in ("", "localhost") or not slash:
        raise DataError(f"{public_name(name)}: a file URL is file:///path, with three slashes; this one has a host")
    return slash + path


def shard_stem(name: str) -> str:
    """The first part of the keys of a shard's samples: its file name without ending."""
    return public_name(name).rpartition("/")[2].removesuffix(".tar")


def names_shards(name: str) -> bool:
    """Whether a name is that of a tar or a pattern of tars, where a manifest or its folder is expected."""
    return public_name(name).endswith(".tar") and not os.path.isdir(name)


def expand_names(patterns: Sequence[str], list_remote: _Lister | None = None) -> list[str]:
    """The names that patterns stand for: brace ranges, and globs of local, `s3://` and `gs://` names.

    The order is that of the patterns, braces as bash expands them, globs sorted. `file://` names become paths. A local
    path that exists is itself, whatever characters it has. `list_remote` gives the names that a remote glob matches.

    Raises: DataError if a name is not allowed or not printable, a pattern matches nothing, or two names are the same.
    """
    names: list[str] = []
    for pattern in patterns:
        found = _expand_one(pattern, list_remote)
        if not found:
            raise DataError(f"{public_name(pattern)}: matches nothing; check the folder, the pattern and your rights")
        names += found
    if not names:
        raise DataError("no shards are named; give at least one path, URL or pattern")
    if len(set(names)) != len(names):
        name, times = Counter(names).most_common(1)[0]
        raise DataError(
            f"{public_name(name)}: named {times} times; a shard counts once, so make the patterns not overlap"
        )
    return names


def _expand_one(pattern: str, list_remote: _Lister | None) -> list[str]:
    """The names of one pattern."""
    if not pattern or not pattern.isprintable():
        raise DataError(f"{redact(repr(pattern))}: not a name; a shard's name is printable text and not empty")
    if _SCHEME.match(pattern) is None and os.path.exists(pattern):
        return [os.path.normpath(pattern)]
    escaped = "\\" in pattern
    if "{" not in pattern and "}" not in pattern and not escaped:
        expanded = [pattern]
    else:
        expanded = _expand_braces(pattern, escaped)
    # All names share what stands before the first brace: one look at it does for a million of them.
    common = re.split(r"[{\\]", pattern, maxsplit=1)[0]
    is_alike = _SCHEME.match(common) is not None or ("/" in common and ":" not in pattern)
    if is_alike and scheme_of(expanded[0]) in ("http", "https", "s3", "gs") and not _GLOB.search(pattern):
        return expanded
    names: list[str] = []
    for name in expanded:
        names += _expand_globs(name, list_remote, must_exist=len(expanded) == 1)
    return names


def _expand_braces(pattern: str, escaped: bool) -> list[str]:
    # braceexpand makes a range's names before it gives the first of them.
    expanded: list[str] = []
    ranges = sum(abs(int(last) - int(first)) // max(1, int(step or 1)) for first, last, step in _RANGE.findall(pattern))
    if ranges <= MAX_NAMES:
        try:
            expanded = list(islice(braceexpand(pattern, escape=escaped), MAX_NAMES + 1))
        except ValueError:  # its UnbalancedBracesError
            raise DataError(
                f"{public_name(pattern)}: a brace has no partner; write {{0000..0099}}, or \\{{ for the character"
            ) from None
    if ranges > MAX_NAMES or len(expanded) > MAX_NAMES:
        raise DataError(f"{public_name(pattern)}: more than {MAX_NAMES} names; check the brace ranges")
    return expanded


def _expand_globs(name: str, list_remote: _Lister | None, must_exist: bool) -> list[str]:
    """What a name without braces stands for."""
    path = local_path(name)
    if path is not None:
        if not _GLOB.search(path):
            if must_exist and not os.path.exists(path):
                return []
            # Two spellings of a path are one file.
            return [os.path.normpath(path) if "./" in path or "//" in path else path]
        return _printable(sorted(os.path.normpath(found) for found in glob.glob(path, recursive=True)))
    if scheme_of(name) in ("http", "https"):
        # A question mark begins the query there, and brackets hold an IPv6 address.
        if "*" in re.split(r"[?#]", name, maxsplit=1)[0]:
            raise DataError(
                f"{public_name(name)}: a web server lists no files; name them by a range such as {{0000..0099}}"
            )
        return [name]
    if not _GLOB.search(name):
        return [name]
    if list_remote is None:
        raise DataError(f"{public_name(name)}: patterns of remote names are not expanded here; name the shards")
    return _printable(sorted(list_remote(name)))


def _printable(found: list[str]) -> list[str]:
    """The names.

    Raises: DataError if one could not be written to a manifest or a log as it is.
    """
    if not all(map(str.isprintable, found)):
        name = next(name for name in found if not name.isprintable())
        raise DataError(
            f"{redact(repr(name))}: not a shard's name, which is printable text in UTF-8; rename it, or make the "
            "pattern leave it out"
        )
    return found
