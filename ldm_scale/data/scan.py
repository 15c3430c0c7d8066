"""What a tar holds, in one pass that no content stops: usable samples in the tar's order, and the rest with reasons.

A fault costs the samples that it touches. Where no header stands in its place, the pass goes on at the next block that
is one; it looks from the last member's first byte on, because a tar that lost bytes has the next header too early.
Members that were lost there cannot be named, so the samples on both sides of the place are kept only if they have all
extensions that are usual in the tar. Zeros of any length that something follows are such a place too; webdataset
takes them for the end of the archive.

Memory is bounded whatever the tar holds, by the limits below (about 2 GiB at all of them) and not by sizes that a
header states. Bytes are read again only after a fault, at most twice the tar's. A tar beyond a limit is one bad record.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from tarfile import TarInfo

from ldm_scale.data.members import describes
from ldm_scale.data.picture_size import picture_size
from ldm_scale.data.policy import BadRecord, BadSample
from ldm_scale.data.shards import IMAGE_EXTENSIONS
from ldm_scale.data.sidecar import BLOCK, IndexedSample, Member
from ldm_scale.data.tar_header import Extensions, find_header, padded, parse_header, payload_size
from ldm_scale.data.window import Window

MAX_MEMBERS = 1_000_000  # of all samples of a tar
MAX_SAMPLE_MEMBERS = 64
MAX_EXTENSIONS = 64  # different ones in a tar; each is a column of the sidecar
MAX_NAME = 1024  # bytes
MAX_BAD = 100_000  # records of a tar
MAX_FAULTS = 1_000  # places of a tar without a header where one should be

# Members that only unpickling can read: code from strangers, refused before anything opens them.
PICKLE_EXTENSIONS = frozenset({"pickle", "pkl", "pyd", "pth", "pt"})

# Reasons of which the whole tar is the one bad record; its key is "".
EMPTY_FILE = "empty file"
COMPRESSED = "compressed file or zip archive, not a plain tar"
NOT_A_TAR = "not a tar, or an empty one"
TOO_MUCH = "more members, bad samples or damaged places in one tar than the index takes"
# Reasons that belong to a place; the key is "@" and its byte in the tar.
NO_HEADER = "no tar header where one should be"
ZEROS = "zeros between members"
NO_END = "tar ends without end-of-archive"
# Reasons that belong to a sample or to a member of it.
LOST_MEMBERS = "members lost to damage of the tar"
OVERRUN = "member runs into the next one"
CUT_MEMBER = "member reaches beyond the end of the tar"
REPEATED_SAMPLE = "sample name occurs earlier in the tar"
SCATTERED = "members of the sample are not neighbours in the tar"
REPEATED_MEMBER = "two members of one name"
MANY_MEMBERS = f"more than {MAX_SAMPLE_MEMBERS} members in one sample"
MANY_EXTENSIONS = f"more than {MAX_EXTENSIONS} different extensions in one tar"
NO_IMAGE = f"no image ({', '.join(IMAGE_EXTENSIONS)})"
EMPTY_IMAGE = "image is empty"
NOT_PLAIN = "link, device or sparse file"
OUTSIDE = "name points outside the tar"
BAD_NAME = "name is not printable UTF-8"
LONG_NAME = f"name of more than {MAX_NAME} bytes"
PICKLE = "pickle, which runs code when read"
BAD_EXTENSION = "tar header and its extension disagree, or the extension is too large"
REASONS = frozenset(value for name, value in list(globals().items()) if name.isupper() and isinstance(value, str))

Visit = Callable[[str, Mapping[str, bytes]], None]

_META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset skips these
_BASE_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset's rule: the first dot
_TEXTS = frozenset({"cls", "json"})  # members that are shown to who asks
_MAX_TEXT = 1 << 20  # bytes
_MAX_KEY = 200  # characters of a bad sample's name that are written down
SIGNATURES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"PK\x05\x06")


@dataclass(frozen=True)
class Scan:
    """What was found in a tar."""

    samples: list[IndexedSample]
    bad: list[BadRecord]  # samples, members and places; keys as above
    sha256: str | None = None  # of the tar, if the window reads all


class _TooMuch(Exception):
    """The tar is beyond a limit."""


@dataclass
class _Open:
    """The sample whose members are being met."""

    name: str
    doubtful: bool  # members may have been lost before or after it
    members: dict[str, Member] = field(default_factory=dict)
    reason: str | None = None  # why it is bad: the first fault that was met
    pictures: dict[str, tuple[int, int] | str] = field(default_factory=dict)  # a reason where the size was not found
    texts: dict[str, bytes] = field(default_factory=dict)

    def spoil(self, reason: str) -> None:
        """Nothing; the sample is bad."""
        self.reason = self.reason or reason


def scan_tar(window: Window, pictures: bool = True, visit: Visit | None = None) -> Scan:
    """The samples of a tar; members have checksums if the window reads all.

    `pictures`: samples without one are bad, and sizes are looked up. `visit` is shown name, .cls and .json of samples.

    Raises: DataError if the bytes cannot be read; never for what they are.
    """
    if window.num_bytes == 0:
        samples, bad = list[IndexedSample](), [BadRecord("", EMPTY_FILE)]
    elif window.read(0, 8).startswith(SIGNATURES) and parse_header(window.read(0, BLOCK)) is None:
        samples, bad = [], [BadRecord("", COMPRESSED)]
    else:
        try:
            samples, bad = _Pass(window, pictures, visit).run()
        except _TooMuch:
            samples, bad = [], [BadRecord("", TOO_MUCH)]
    return Scan(samples, bad, window.sha256())


class _Pass:
    """One pass over a tar."""

    def __init__(self, window: Window, pictures: bool, visit: Visit | None) -> None:
        self._window, self._wants_pictures, self._visit = window, pictures, visit
        self._samples: list[IndexedSample | None] = []  # None: found to be bad later
        self._rows: dict[str, int | None] = {}  # name -> place in the samples; None: bad
        self._doubtful: list[int] = []  # places of samples that may lack members
        self._bad: list[BadRecord] = []
        self._open: _Open | None = None
        self._last: tuple[int, int, _Open | None] = (0, 0, None)  # of the last header: payload's bounds, its sample
        self._names_of_extensions: set[str] = set()  # of good samples
        self._extensions = Extensions()
        self._after_fault = False
        self._num_headers = self._num_members = self._num_faults = self._bytes_again = 0

    def run(self) -> tuple[list[IndexedSample], list[BadRecord]]:
        """What is usable and what is not.

        Raises: _TooMuch.
        """
        offset: int | None = 0
        while offset is not None:
            offset = self._step(offset)
        self._close()
        if self._num_headers == 0:
            return [], [BadRecord("", NOT_A_TAR)]
        self._judge_doubtful()
        return [sample for sample in self._samples if sample is not None], self._bad

    def _step(self, offset: int) -> int | None:
        """Where the next header should be, None at the end; `offset` is where one should be."""
        window = self._window
        block = window.read(offset, offset + BLOCK)
        if len(block) < BLOCK:
            return self._fault(offset, NO_END)
        if not block.strip(b"\0"):
            return self._zeros(offset)
        header = parse_header(block)
        if header is None:
            return self._fault(offset, NO_HEADER)
        self._num_headers += 1
        start = offset + BLOCK
        if self._extensions.take(window, header, start):
            size, sample = header.size, None
        else:
            name, stated, sparse = self._extensions.member(header)
            size = header.size if stated is None else stated
            reason = _unusable(header, sparse, name) or (BAD_EXTENSION if stated != header.size else None)
            if self._extensions.too_large:
                self._record(f"@{offset}", BAD_EXTENSION)  # its name is not known
                self._lose()
                sample = None
            else:
                sample = None if header.isdir() else self._take(name, header, start, size, reason)
            self._extensions.clear()
        stop = start + payload_size(header, size)
        self._last = (start, start + size if stop > start else start, sample)
        return stop if self._last[1] <= window.num_bytes else self._fault(offset, NO_END)

    def _take(self, name: str, header: TarInfo, start: int, size: int, reason: str | None) -> _Open | None:
        """The sample that a member belongs to, with that member in it; None if webdataset would skip it too."""
        match = _BASE_AND_EXTENSION.match(name)
        if match is None or _META_MEMBER.match(name):
            return None
        base, extension = match[1][:MAX_NAME], match[2].lower()
        if self._open is None or self._open.name != base:
            self._close()
            self._open = _Open(base, self._after_fault)
            self._after_fault = False
        sample = self._open
        if reason is None and extension.rpartition(".")[2] in PICKLE_EXTENSIONS:
            reason = PICKLE
        if reason is None and not describes(header, f"{base}.{extension}", size):
            reason = BAD_EXTENSION  # who reads the sample will look at this header again
        if extension in sample.members:
            reason = REPEATED_MEMBER
        if len(sample.members) == MAX_SAMPLE_MEMBERS:
            reason = MANY_MEMBERS
        if reason is None and start + size > self._window.num_bytes:
            reason = CUT_MEMBER
        if reason is not None:
            sample.spoil(reason)
            return sample
        self._num_members += 1
        if self._num_members > MAX_MEMBERS:
            raise _TooMuch
        self._read(sample, extension, start, size)
        return sample

    def _read(self, sample: _Open, extension: str, start: int, size: int) -> None:
        """Nothing; the sample has this member, with what its bytes tell."""
        window = self._window
        if self._wants_pictures and extension in IMAGE_EXTENSIONS:
            try:
                sample.pictures[extension] = picture_size(window, start, start + size) if size else EMPTY_IMAGE
            except BadSample as fault:
                sample.pictures[extension] = str(fault)
        if self._visit is not None and extension in _TEXTS and size <= _MAX_TEXT:
            sample.texts[extension] = window.read(start, start + size)
        checksum = window.crc32(start, start + size) if window.reads_all else None
        sample.members[extension] = Member(start, size, checksum)

    def _close(self) -> None:
        """Nothing; the open sample is complete: good or bad."""
        sample, self._open = self._open, None
        if sample is None:
            return
        picture: tuple[int, int] | str | None = (0, 0)
        if self._wants_pictures:
            picture = next((sample.pictures[kind] for kind in IMAGE_EXTENSIONS if kind in sample.pictures), None)
        if picture is None:
            sample.spoil(NO_IMAGE)
        elif isinstance(picture, str):
            sample.spoil(picture)
        if sample.name in self._rows:
            self._repeat(sample)
            sample.reason = REPEATED_SAMPLE if sample.reason in (None, NO_IMAGE) else sample.reason
        extensions = self._names_of_extensions | sample.members.keys()
        if len(extensions) > MAX_EXTENSIONS:
            sample.spoil(MANY_EXTENSIONS)
        if sample.reason is not None or not isinstance(picture, tuple):
            self._rows.setdefault(sample.name, None)
            self._record(sample.name, sample.reason or NO_IMAGE)
            return
        if sample.doubtful:
            self._doubtful.append(len(self._samples))
        self._names_of_extensions = extensions
        self._rows[sample.name] = len(self._samples)
        self._samples.append(IndexedSample(sample.name, sample.members, picture))
        if self._visit is not None:
            self._visit(sample.name, sample.texts)

    def _repeat(self, sample: _Open) -> None:
        """Nothing; the first sample of this name is bad if the later one has members that it lacks."""
        row = self._rows[sample.name]
        earlier = None if row is None else self._samples[row]
        if row is not None and earlier is not None and not set(sample.members) <= set(earlier.members):
            self._samples[row] = self._rows[sample.name] = None
            self._record(sample.name, SCATTERED)

    def _zeros(self, offset: int) -> int | None:
        """Where to go on after blocks of zeros: nowhere if nothing follows."""
        end = self._window.first_not_zero(offset)
        if end >= self._window.num_bytes:
            return None
        return self._fault(offset, ZEROS)

    def _fault(self, offset: int, reason: str) -> int | None:
        """Offset of the next header after there was none, or no complete one, at `offset`; None if none follows."""
        self._num_faults += 1
        if self._num_faults > MAX_FAULTS:
            raise _TooMuch
        start, stop, sample = self._last
        found = find_header(self._window, start)
        end = start + padded(stop - start)
        ends_early = stop > self._window.num_bytes if found is None else found < end
        if sample is not None and (ends_early or self._window.read(stop, end).strip(b"\0")):
            sample.spoil(CUT_MEMBER if found is None and ends_early else OVERRUN)
        else:
            self._record(f"@{offset}", reason)
        self._lose()
        self._extensions.clear()
        if found is not None:
            self._bytes_again += max(0, offset - found)
        if self._bytes_again > 2 * self._window.num_bytes:
            raise _TooMuch
        return found

    def _lose(self) -> None:
        """Nothing; members were lost here, of the sample before or after."""
        if self._open is not None:
            self._open.doubtful = True
        self._after_fault = True

    def _record(self, name: str, reason: str) -> None:
        """Nothing; the sample or place is written down as bad, its name in printable characters."""
        if len(self._bad) == MAX_BAD:
            raise _TooMuch
        self._bad.append(BadRecord(printable(name), reason))

    def _judge_doubtful(self) -> None:
        """Nothing; samples beside a fault are bad if they lack an extension that half of the others have."""
        doubtful = set(self._doubtful)
        rows = [row for row in range(len(self._samples)) if row not in doubtful] or self._doubtful
        others = [sample for sample in (self._samples[row] for row in rows) if sample is not None]
        counts = Counter(extension for sample in others for extension in sample.members)
        usual = {extension for extension, count in counts.items() if 2 * count >= len(others)}
        for row in self._doubtful:
            sample = self._samples[row]
            if sample is not None and not usual <= set(sample.members):
                self._samples[row] = None
                self._record(sample.name, LOST_MEMBERS)


def printable(name: str) -> str:
    """A name as it may stand in a file or on a screen: escapes for what is no printable UTF-8, and not too long."""
    shown = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in name[:_MAX_KEY])
    return shown if len(name) <= _MAX_KEY else f"{shown}..."


def _unusable(header: TarInfo, sparse: bool, name: str) -> str | None:
    """Why a member is not read, as far as its header tells; None if it may be."""
    if not header.isreg() or sparse:
        return NOT_PLAIN
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        return OUTSIDE
    if not name.isprintable():
        return BAD_NAME  # includes the surrogates that stand for bytes which are not UTF-8
    return LONG_NAME if len(name.encode()) > MAX_NAME else None
