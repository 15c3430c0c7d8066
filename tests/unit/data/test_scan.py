"""What a pass over a tar finds, fault by fault, and that no tar stops it."""

from __future__ import annotations

import hashlib
import io
import os
import random
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image, ImageOps

from ldm_scale.data import scan as s
from ldm_scale.data.members import is_header_of
from ldm_scale.data.picture_size import BAD_HEADER
from ldm_scale.data.pictures import TOO_LARGE, open_rgb
from ldm_scale.data.scan import Scan, scan_tar
from ldm_scale.data.window import Window, open_file
from ldm_scale.errors import DataError
from tests.helpers.shards import png, write_tar

NUM = 40
BLOCK = 512


def _picture(seed: int) -> bytes:
    noise = random.Random(seed).randbytes(3 * 12 * 16)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (16, 12), noise).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


SAMPLES = [
    (f"d/{n:03d}", {"jpg": _picture(n), "txt": f"number {n}".encode(), "json": b'{"n": %d}' % n}) for n in range(NUM)
]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tar(tmp_path_factory.mktemp("tar") / "a.tar", SAMPLES).read_bytes()


def _scan(content: bytes, ahead: int = 4096, checksum: bool = True, pictures: bool = True) -> Scan:
    window = Window("a.tar", len(content), lambda start, stop: content[start:stop], ahead, checksum)
    return scan_tar(window, pictures)


def _tar(*members: tuple[str, bytes], edit: Callable[[tarfile.TarInfo], None] | None = None, form: int = 0) -> bytes:
    """A tar of these members, of which `edit` changes the last."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for number, (name, content) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if edit is not None and number == len(members) - 1:
                edit(info)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _members(content: bytes, found: Scan) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (one.name, {kind: content[m.offset : m.offset + m.size] for kind, m in one.members.items()})
        for one in found.samples
    ]


def _offset(content: bytes, name: str) -> int:
    """Of a member's header."""
    return content.index(name.encode())


PIXEL = png(Image.new("RGB", (4, 2)))


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("ahead", [512, 4096, 1 << 20])
def test_an_intact_tar(intact: bytes, ahead: int, checksum: bool) -> None:
    found = _scan(intact, ahead, checksum)
    assert found.bad == []
    assert _members(intact, found) == SAMPLES
    assert all(one.picture == (16, 12) for one in found.samples)
    for (_, members), one in zip(SAMPLES, found.samples, strict=True):
        for kind, member in one.members.items():
            assert member.crc32 == (zlib.crc32(members[kind]) if checksum else None)


def test_the_checksum_is_of_the_file(tmp_path: Path, intact: bytes) -> None:
    for content in (intact, b"", b"PK\x03\x04", intact[:3000], bytes(70000) + intact):
        (tmp_path / "a.tar").write_bytes(content)
        with open_file(tmp_path / "a.tar", 4096) as window:
            assert scan_tar(window).sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_reads_the_same(tmp_path: Path, form: int) -> None:
    names = ["a.jpg", "a.b.txt", "./x/a.JPG", "dir.1/b.jpg", "c/" * 20 + "d" * 90 + ".jpg", "caf\u00e9.jpg", "e.jpg"]
    content = _tar(
        *((name, _picture(0)) for name in (*names, "__meta__/x.jpg", "plain", ".hidden", "f.jpg")), form=form
    )
    (tmp_path / "a.tar").write_bytes(content)
    found = _scan(content)
    theirs = [
        (one.pop("__key__"), {kind: value for kind, value in one.items() if not kind.startswith("__")})
        for one in wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False, empty_check=False)
    ]
    assert _members(content, found) == theirs
    assert found.bad == []
    assert len(theirs) == 7


def _lost(content: bytes) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of the samples that are not listed, and the bad records; what is listed has the right bytes."""
    found = _scan(content)
    listed = _members(content, found)
    right = dict(SAMPLES)
    assert all(right[name] == members for name, members in listed)
    assert {reason for _, reason in found.bad} <= s.REASONS
    names = [name for name, _ in listed]
    assert names == [name for name, _ in SAMPLES if name in names], "not in the tar's order"
    return [name for name, _ in SAMPLES if name not in names], [tuple(record) for record in found.bad]


def test_a_cut_at_a_member_boundary(intact: bytes) -> None:
    at = _offset(intact, "d/030.jpg")
    assert _lost(intact[:at]) == ([f"d/{n:03d}" for n in range(30, 40)], [(f"@{at}", s.NO_END)])


def test_a_cut_inside_a_header(intact: bytes) -> None:
    at = _offset(intact, "d/030.jpg")
    assert _lost(intact[: at + 100]) == ([f"d/{n:03d}" for n in range(30, 40)], [(f"@{at}", s.NO_END)])


def test_a_cut_inside_a_payload(intact: bytes) -> None:
    at = _offset(intact, "d/030.jpg")
    assert _lost(intact[: at + 700]) == ([f"d/{n:03d}" for n in range(30, 40)], [("d/030", s.CUT_MEMBER)])


def test_a_cut_between_the_members_of_a_sample(intact: bytes) -> None:
    at = _offset(intact, "d/030.txt")
    lost, bad = _lost(intact[:at])
    assert lost == [f"d/{n:03d}" for n in range(30, 40)]
    assert bad == [(f"@{at}", s.NO_END), ("d/030", s.LOST_MEMBERS)]


def test_a_missing_end_of_archive_costs_nothing(intact: bytes) -> None:
    end = len(intact.rstrip(b"\0"))
    lost, bad = _lost(intact[: -(-end // BLOCK) * BLOCK])
    assert (lost, [reason for _, reason in bad]) == ([], [s.NO_END])
    assert _lost(intact + bytes(10240)) == ([], [])


@pytest.mark.parametrize(("kind", "reason"), [("jpg", s.NO_IMAGE), ("txt", s.LOST_MEMBERS), ("json", s.LOST_MEMBERS)])
@pytest.mark.parametrize("damage", ["a bit", "garbage", "zeros", "a page of zeros"])
def test_a_damaged_header_costs_one_sample(intact: bytes, kind: str, reason: str, damage: str) -> None:
    at = _offset(intact, f"d/007.{kind}")
    content = bytearray(intact)
    if damage == "a bit":
        content[at + 127] ^= 4
    elif damage == "a page of zeros":
        content[at : at + 2 * BLOCK] = bytes(2 * BLOCK)
    else:
        content[at : at + BLOCK] = random.Random(0).randbytes(BLOCK) if damage == "garbage" else bytes(BLOCK)
    place = s.ZEROS if "zeros" in damage else s.NO_HEADER
    assert _lost(bytes(content)) == (["d/007"], [(f"@{at}", place), ("d/007", reason)])


def test_garbage_between_samples_costs_nothing_and_lost_bytes_one_sample(intact: bytes) -> None:
    at = _offset(intact, "d/007.jpg")
    garbage = random.Random(1).randbytes
    for size in (1, 512, 777, 5000):
        assert _lost(intact[:at] + garbage(size) + intact[at:]) == ([], [(f"@{at}", s.NO_HEADER)])
    for size in (1, 100, 512):
        content = intact[: at + BLOCK + 50] + intact[at + BLOCK + 50 + size :]
        lost, bad = _lost(content)
        assert (lost, bad) == (["d/007"], [("d/007", s.OVERRUN)])
    lost, bad = _lost(garbage(3000) + intact)
    assert (lost, bad) == ([], [("@0", s.NO_HEADER)])


def test_a_second_archive_behind_the_end(intact: bytes) -> None:
    at = _offset(intact, "d/030.jpg")
    first = intact[:at] + bytes(2 * BLOCK)
    assert _lost(first + intact[at:]) == ([], [(f"@{at}", s.ZEROS)])


def test_what_is_no_tar_at_all(intact: bytes) -> None:
    cases = {
        b"": s.EMPTY_FILE,
        b"<html>not found</html>" * 100: s.NOT_A_TAR,
        bytes(10240): s.NOT_A_TAR,
        random.Random(2).randbytes(100000): s.NOT_A_TAR,
        b"\x1f\x8b\x08" + intact: s.COMPRESSED,
        b"PK\x03\x04" + intact: s.COMPRESSED,
    }
    for content, reason in cases.items():
        found = _scan(content)
        assert (found.samples, found.bad) == ([], [("", reason)])


def test_a_name_that_begins_like_a_compressed_file() -> None:
    assert [one.name for one in _scan(_tar(("BZh/a.png", PIXEL))).samples] == ["BZh/a"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a.tar: not a file"), open_file(tmp_path / "a.tar"):
        pass


def test_names_that_come_back(intact: bytes) -> None:
    a, b = ("a.png", PIXEL), ("b.png", PIXEL)
    found = _scan(_tar(a, b, a))
    assert ([one.name for one in found.samples], found.bad) == (["a", "b"], [("a", s.REPEATED_SAMPLE)])
    # All pictures first, then all captions: the first part alone would train without captions.
    found = _scan(_tar(a, b, ("a.txt", b"x"), ("b.txt", b"y")))
    assert found.samples == []
    assert found.bad == [(name, reason) for name in ("a", "b") for reason in (s.SCATTERED, s.REPEATED_SAMPLE)]


def _set(**values: object) -> Callable[[tarfile.TarInfo], None]:
    def edit(info: tarfile.TarInfo) -> None:
        for name, value in values.items():
            setattr(info, name, value)

    return edit


@pytest.mark.parametrize(
    ("edit", "key", "reason"),
    [
        (_set(type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0), "b", s.NOT_PLAIN),
        (_set(type=tarfile.LNKTYPE, linkname="a.png", size=0), "b", s.NOT_PLAIN),
        (_set(type=tarfile.CHRTYPE, size=0), "b", s.NOT_PLAIN),
        (_set(type=tarfile.FIFOTYPE, size=0), "b", s.NOT_PLAIN),
        (_set(type=tarfile.GNUTYPE_SPARSE), "b", s.NOT_PLAIN),
        (_set(name="/abs/b.png"), "/abs/b", s.OUTSIDE),
        (_set(name="a/../../b.png"), "a/../../b", s.OUTSIDE),
        (_set(name="..\\b.png"), None, None),  # the first dot of the name begins an extension: no sample
        (_set(name="x\\..\\..\\b.png"), "x\\", s.OUTSIDE),
        (_set(name="b\udcff.png"), "b\\udcff", s.BAD_NAME),
        (_set(name="b\n\x1b[31m.png"), "b\\n\\x1b[31m", s.BAD_NAME),
        (_set(name="l" * 1100 + ".png"), "l" * 200 + "...", s.LONG_NAME),
        (_set(name="l" * 70000 + ".png"), "@", s.BAD_EXTENSION),
        (_set(name="b.pyd"), "b", s.PICKLE),
        (_set(name="b.mask.pth"), "b", s.PICKLE),
        (_set(name="a.PNG"), "a", s.REPEATED_MEMBER),
        (_set(name="b.txt"), "b", s.NO_IMAGE),
        (_set(size=0), "b", s.EMPTY_IMAGE),
    ],
)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_that_are_not_read(
    edit: Callable[[tarfile.TarInfo], None], key: str | None, reason: str | None, form: int
) -> None:
    found = _scan(_tar(("a.png", PIXEL), ("b.png", PIXEL), edit=edit, form=form))
    if key == "@":
        key = found.bad[0].key
        assert key.startswith("@")
    assert found.bad == ([] if key is None else [(key, reason)])
    assert [one.name for one in found.samples] == ([] if key == "a" else ["a"])


def test_a_bad_member_spoils_its_own_sample_alone() -> None:
    content = _tar(("a.jpg", _picture(0)), ("a.pkl", b"x"), ("a.txt", b""), ("b.jpg", _picture(1)), ("b.txt", b""))
    found = _scan(content)
    assert ([one.name for one in found.samples], found.bad) == (["b"], [("a", s.PICKLE)])


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (b"junk", BAD_HEADER),
        (PIXEL[:20], BAD_HEADER),
        (b"%!PS-Adobe-3.0 EPSF-3.0", BAD_HEADER),
        (PIXEL[:16] + (20000).to_bytes(4, "big") * 2 + PIXEL[24:], BAD_HEADER),  # its checksum is wrong now
        (
            PIXEL[:12]
            + (header := b"IHDR" + (20000).to_bytes(4, "big") * 2 + PIXEL[24:29])
            + zlib.crc32(header).to_bytes(4, "big")
            + PIXEL[33:],
            TOO_LARGE,
        ),
    ],
)
def test_pictures_that_their_first_bytes_rule_out(picture: bytes, reason: str) -> None:
    assert _scan(_tar(("a.png", picture))).bad == [("a", reason)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_sizes_are_those_of_the_upright_picture(kind: str, orientation: int | None) -> None:
    if orientation is not None and kind in ("GIF", "BMP"):
        return
    image = Image.new("RGB", (30, 20))
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    for options in ({}, {"lossless": True}) if kind == "WEBP" else ({},):
        buffer = io.BytesIO()
        image.save(buffer, format=kind, exif=exif, **options)
        upright = ImageOps.exif_transpose(Image.open(buffer))
        found = _scan(_tar(("a.png", buffer.getvalue())))
        assert found.samples[0].picture == upright.size == open_rgb(buffer.getvalue()).size


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def _bombs() -> Iterator[tuple[str, bytes, str | None]]:
    """(name, tar, reason of its bad record or None) of tars that mean harm."""
    good = _tar(("z.png", PIXEL))
    flood = b"".join(_header(f"{n}.png", 1 << 40) for n in range(1500))
    yield "members larger than the file", flood + good, s.TOO_MUCH
    yield "a GNU long name of a gigabyte", _header("x", 1 << 30, tarfile.GNUTYPE_LONGNAME) + good, s.NO_END
    yield "pax headers of a gigabyte", _header("x", 1 << 30, tarfile.XHDTYPE) + good, s.NO_END
    yield "a chain of extensions", _header("x", 0, tarfile.XHDTYPE) * 20000 + good, None
    yield "members without a sample", _header("plain", 0) * 20000 + good, None
    lying = b"".join(_header(f"{n}.png", 400_000) + b"junk".ljust(BLOCK, b"\0") for n in range(900))
    yield "members that claim half of the file", lying + good, s.TOO_MUCH
    many = b"".join(_header(f"a.{n}", 0) for n in range(100))
    yield "many members in a sample", many + good, s.MANY_MEMBERS
    yield "magic without a header", b"\0ustar  \0" * 20000 + good, s.NO_HEADER
    kinds = b"".join(
        _header(f"{n}.png", len(PIXEL)) + PIXEL.ljust(BLOCK, b"\0") + _header(f"{n}.{n}", 0) for n in range(99)
    )
    yield "an extension per sample", kinds + good, s.MANY_EXTENSIONS


@pytest.mark.parametrize(("content", "reason"), [pytest.param(*case[1:], id=case[0]) for case in _bombs()])
def test_tar_bombs_cost_little(content: bytes, reason: str | None) -> None:
    tracemalloc.start()
    try:
        found = _scan(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    assert {record.reason for record in found.bad} >= ({reason} if reason else set())
    if reason != s.TOO_MUCH:
        assert found.samples[-1].name == "z"


@pytest.mark.parametrize("limit", ["MAX_MEMBERS", "MAX_BAD"])
def test_a_tar_beyond_the_limits_is_one_bad_record(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    content = _tar(*((f"{n}.png", PIXEL if n % 2 else b"") for n in range(20)))
    monkeypatch.setattr(s, limit, 5)
    found = _scan(content)
    assert (found.samples, found.bad) == ([], [("", s.TOO_MUCH)])


def _mutate(content: bytes, rng: random.Random) -> tuple[bytes, list[tuple[int, int]]]:
    """A damaged tar, and the parts of the intact one whose bytes are not where and what they were."""
    size = len(content)
    at = rng.randrange(size)
    length = rng.choice([1, 8, 100, 512, 513, 4096])
    stop = min(at + length, size)
    match rng.choice(["bits", "overwrite", "zeros", "cut", "insert", "remove", "repeat", "swap"]):
        case "bits":
            damaged = bytearray(content)
            damaged[at] ^= 1 << rng.randrange(8)
            return bytes(damaged), [(at, at + 1)]
        case "overwrite":
            return content[:at] + rng.randbytes(stop - at) + content[stop:], [(at, stop)]
        case "zeros":
            return content[:at] + bytes(stop - at) + content[stop:], [(at, stop)]
        case "cut":
            return content[:at], [(at, size)]
        case "insert":
            return content[:at] + rng.randbytes(length) + content[at:], [(at - 1, at + 1)]
        case "remove":
            return content[:at] + content[stop:], [(at - 1, stop + 1)]
        case "repeat":
            start = rng.randrange(size)
            return content[:at] + content[start : start + length] + content[at:], [
                (at - 1, at + 1),
                (start, start + length),
            ]
        case _:
            one, two = sorted(rng.sample(range(size // BLOCK), 2))
            blocks = [content[start : start + BLOCK] for start in range(0, size, BLOCK)]
            blocks[one], blocks[two] = blocks[two], blocks[one]
            return b"".join(blocks), [(n * BLOCK, (n + 1) * BLOCK) for n in (one, two)]


def test_mutated_tars(tmp_path: Path) -> None:
    """Whatever the damage: no crash, listed bytes lie in the file and are unchanged where nothing touched them, and
    every sample that no damage touched is listed.
    """
    intact = write_tar(tmp_path / "a.tar", SAMPLES[:16]).read_bytes()
    found = _scan(intact)
    spans = {}
    for one in found.samples:
        members = one.members.values()
        first, last = min(m.offset for m in members) - BLOCK, max(m.offset + m.size for m in members)
        spans[one.name] = (first, -(-last // BLOCK) * BLOCK)
    end = max(stop for _, stop in spans.values())
    right = dict(SAMPLES)
    rng = random.Random(6)
    counts = {"damaged": 0, "lost": 0}
    for _ in range(1200):
        content, touched = _mutate(intact, rng)
        found = _scan(content, rng.choice([512, 4096, 1 << 16]))
        assert {record.reason for record in found.bad} <= s.REASONS | {BAD_HEADER, TOO_LARGE}
        for one in found.samples:
            assert all(0 < m.offset <= m.offset + m.size <= len(content) for m in one.members.values())
        if found.samples:
            one = found.samples[-1]
            for kind, m in one.members.items():
                assert is_header_of(content[m.offset - BLOCK : m.offset], f"{one.name}.{kind}", m.size)
        listed = _members(content, found)
        whole = {n for n, (first, last) in spans.items() if not any(a < last and b > first for a, b in touched)}
        missing = whole - {name for name, members in listed if members == right[name]}
        assert not missing, (touched, missing, found.bad)
        counts["damaged"] += any(a < end for a, _ in touched)
        counts["lost"] += bool(found.bad)
    assert counts["damaged"] > 1000
    assert counts["lost"] > 300
