"""Members of a sample in its tar: which to read together, and whether what was read is what an index says."""

from __future__ import annotations

import tarfile

MAX_GAP = 8192  # bytes between two members up to which one read is cheaper than two


def neighbours(places: list[tuple[str, int, int]]) -> list[list[tuple[str, int, int]]]:
    """Members (extension, offset, size) in groups that one read gets with all their headers.

    Members of a sample are neighbours in the tar; only what is left out makes a gap between them.
    """
    groups: list[list[tuple[str, int, int]]] = []
    for place in sorted(places, key=lambda place: place[1]):
        if groups and place[1] - (groups[-1][-1][1] + groups[-1][-1][2]) <= MAX_GAP:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def is_header_of(block: bytes, member: str, size: int) -> bool:
    """Whether a tar header block describes a plain file of this name and size."""
    try:
        return describes(tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"), member, size)
    except tarfile.HeaderError:
        return False


def describes(header: tarfile.TarInfo, member: str, size: int) -> bool:
    """Whether a header is of a plain file of this name (extension in any case) and size.

    A name over 100 bytes or outside ASCII may stand in an extension block before the header, which then has only a
    shortened form of it: there, the size alone must agree.
    """
    same_name = header.name.lower() == member.lower()
    return header.isreg() and header.size == size and (same_name or len(member) > 100 or not member.isascii())
