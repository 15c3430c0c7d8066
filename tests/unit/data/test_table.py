"""`ldm-scale prepare table`: CSV, TSV and Parquet files of paths, captions and classes."""

from __future__ import annotations

import csv
import io
import json
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm_scale.data import open_manifest
from ldm_scale.data.metadata import read_captions, read_metadata
from ldm_scale.data.sources.table_files import Columns, read_rows, survey
from ldm_scale.errors import DataError
from ldm_scale.prepare import main

COLORS = {"a.png": (255, 0, 0), "sub/b.png": (0, 255, 0), "c.jpg": (0, 0, 255)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name, color in COLORS.items():
        Image.new("RGB", (40, 20), color).save(folder / name)
    return folder


def _csv(path: Path, rows: list[list[str]], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(rows)
    return path


def _prepare(table: Path, *options: str, out: str = "out") -> dict[str, Any]:
    """The manifest."""
    sizes = ["--resolution", "8", "--heldout-percent", "0", "--out", str(table.parent.parent / out)]
    assert main(["table", str(table), "--image-column", "path", *sizes, *options]) == 0
    manifest: dict[str, Any] = json.loads((table.parent.parent / out / "manifest.json").read_text("utf-8"))
    return manifest


def _samples(pictures: Path, out: str = "out") -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """(key, captions, metadata) of every sample."""
    dataset = open_manifest(pictures.parent / out, "train")
    for number in range(dataset.num_samples):
        raw = dataset.read(number)
        metadata = read_metadata(raw)
        data = raw["png"]
        assert isinstance(data, bytes)
        shown = np.asarray(Image.open(io.BytesIO(data)))
        assert shown.shape == (8, 8, 3)
        assert np.abs(shown.astype(int) - COLORS[Path(metadata["file"]).as_posix()]).max() < 4
        yield str(raw["__key__"]), read_captions(raw, metadata), metadata


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.tsv", "\t"), ("T.CSV", ",")])
def test_rows_become_samples(pictures: Path, name: str, delimiter: str) -> None:
    rows = [
        ["path", "text", "kind", "score", "note", "unused"],
        ["a.png", 'a "red"\ncar, caf\u00e9', "car", "6.5", "007", "x"],
        ["sub/b.png", "", "bus", "1e400", "", "x"],
        ["c.jpg", " blue ", "car", "-3", "true", "x"],
    ]
    options = ["--caption-column", "text", "--class-column", "kind", "--keep", "score,note", "--license", "CC0-1.0"]
    manifest = _prepare(_csv(pictures / name, rows, delimiter), *options)
    assert (manifest["classes"], manifest["license"], manifest["left_out"]) == (["bus", "car"], "CC0-1.0", {})
    wanted = [
        ("a.png", 'a "red"\ncar, caf\u00e9', 1, 6.5, "007"),
        ("sub/b.png", "", 0, None, None),
        ("c.jpg", "blue", 1, -3, "true"),
    ]
    found = list(_samples(pictures))
    assert [key for key, _, _ in found] == [f"train-000000/{number:09d}" for number in range(3)]
    for number, (file, caption, label, score, note) in enumerate(wanted):
        _, captions, metadata = found[number]
        assert captions == [caption]
        assert metadata == {"file": file, "row": number, "class": label, "score": score, "note": note}
    assert type(found[2][2]["score"]) is int


def test_parquet_has_several_captions_an_image(pictures: Path) -> None:
    columns = {
        "path": ["a.png", "sub/b.png", "c.jpg"],
        "text": [["one", " two "], [], None],
        "kind": pa.array([2, 0, 2], pa.int16()),
        "score": pa.array([0.5, float("nan"), 2.0], pa.float32()),
        "good": [True, False, None],
        "word": pa.array(["x", "y", "x"]).dictionary_encode(),
        "blob": [b"\xff", b"", None],
    }
    pq.write_table(pa.table(columns), pictures / "t.parquet", row_group_size=2)
    options = ["--caption-column", "text", "--class-column", "kind", "--keep", "score,good,word"]
    manifest = _prepare(pictures / "t.parquet", *options)
    assert manifest["classes"] == ["0", "1", "2"]  # numbers stay what they are
    found = list(_samples(pictures))
    assert [captions for _, captions, _ in found] == [["one", "two"], [""], [""]]
    assert [(m["class"], m["score"], m["good"], m["word"]) for _, _, m in found] == [
        (2, 0.5, True, "x"),
        (0, None, False, "y"),
        (2, 2.0, None, "x"),
    ]
    with pytest.raises(DataError, match=r"column 'blob' is of type binary; it must hold text, numbers or truth values"):
        _prepare(pictures / "t.parquet", "--keep", "blob", out="other")
    with pytest.raises(DataError, match=r"column 'text' is of type list<.*; it must hold text or integers"):
        _prepare(pictures / "t.parquet", "--class-column", "text", out="other")
    assert not (pictures.parent / "other").exists()


def test_rows_that_cannot_be_used_are_left_out_counted_and_named(pictures: Path) -> None:
    (pictures / "broken.png").write_bytes(b"junk")
    (pictures.parent / "outside.png").write_bytes((pictures / "a.png").read_bytes())
    (pictures / "t.csv").write_bytes(
        b"path,text,kind\r\na.png,ok,k\r\n\r\nbroken.png,x,k\r\nnone.png,x,k\r\n,x,k\r\n"
        b"../outside.png,x,k\r\nhttp://host/a.png,x,k\r\nc.jpg,caf\xe9,k\r\nc.jpg,x,\r\nc.jpg,x\r\na\0.png,x,k\r\n"
        b"\xff.png,x,k\r\n.,x,k\r\n"
    )
    manifest = _prepare(pictures / "t.csv", "--caption-column", "text", "--class-column", "kind")
    assert manifest["splits"]["train"]["num_samples"] == 1
    assert manifest["left_out_names"] == [
        "row 1, broken.png: image does not decode",
        "row 2, none.png: no such file",
        "row 3, no path: no path",
        "row 4, ../outside.png: path leads out of the folder of the table, or out of --base",
        "row 5, http://host/a.png: path is a URL; download the images first, with img2dataset for one",
        "row 6, c.jpg: caption is not UTF-8",
        "row 7, c.jpg: no class",
        "row 8, no path: row has another number of fields than the header",
        "row 9, a\0.png: path has a null byte",
        "row 10, ?.png: no such file",
        "row 11, .: no such file",
    ]
    assert sum(manifest["left_out"].values()) == 11
    assert manifest["left_out"]["no such file"] == 3


def test_paths_are_relative_to_a_folder(pictures: Path) -> None:
    elsewhere = pictures.parent / "lists"
    elsewhere.mkdir()
    table = _csv(elsewhere / "t.csv", [["path"], ["pictures/a.png"], [str(pictures / "c.jpg")]])
    with pytest.raises(DataError, match=r"none of 2 images can be used; row 0, pictures/a.png: no such file"):
        _prepare(table)
    assert not (pictures.parent / "out").exists()
    manifest = _prepare(table, "--base", str(pictures.parent))
    assert manifest["splits"]["train"]["num_samples"] == 2
    with pytest.raises(DataError, match=r"prepared by another request.*base=pictures"):
        _prepare(table, "--base", str(pictures))


def test_a_changed_table_is_another_request(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _prepare(_csv(pictures / "t.csv", [["path"], ["a.png"]]))
    _prepare(pictures / "t.csv")
    assert capsys.readouterr().out.splitlines()[-1].startswith("reused: ")
    _csv(pictures / "t.csv", [["path"], ["c.jpg"]])
    with pytest.raises(DataError, match=r"prepared by another request: .*table=t.csv@\w+"):
        _prepare(pictures / "t.csv")
    with pytest.raises(DataError, match=r"prepared by another request: .*license=MIT"):
        _prepare(pictures / "t.csv", "--license", "MIT")


def test_rows_of_one_picture_are_on_one_side(pictures: Path) -> None:
    names = [f"{number}.png" for number in range(20)]
    for name in names:
        Image.new("RGB", (8, 8)).save(pictures / name)
    table = _csv(pictures / "t.csv", [["path"], *[[name] for name in names * 3]])
    manifest = _prepare(table, "--heldout-percent", "40")
    sides = []
    for split in manifest["splits"]:
        dataset = open_manifest(pictures.parent / "out", split)
        sides.append([read_metadata(dataset.read(n))["file"] for n in range(dataset.num_samples)])
    assert set(sides[0]).isdisjoint(sides[1])
    assert sorted(sides[0] + sides[1]) == sorted(names * 3)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("t.txt", b"path\n", (), r"must end in .csv, .tsv, .parquet"),
        ("t.csv", b"", (), r"no column 'path'; it has: $"),
        ("t.csv", b"file,text\n", (), r"no column 'path'; it has: file, text"),
        ("t.csv", b"path,path\n", (), r"more than one column 'path'"),
        ("t.csv", b"path,a\n", ("--keep", "a,b"), r"no column 'b'"),
        ("t.csv", b"path,file\n", ("--keep", "file"), r"--keep file: a sample's .json has an entry of this name"),
        ("t.csv", "path\nx\n".encode("utf-16"), (), r"t.csv: not UTF-8; save it as UTF-8"),
        ("t.csv", b'path\na.png\n"b\nc\n', (), r"malformed at line 4 \(unexpected end of data\); put fields"),
        ("t.tsv", b'path\ttext\na\t"b" c\n', (), r"malformed at line 2 \(.*expected after"),
        ("t.csv", b"path\n", (), r"none of 0 images can be used; it has none"),
        ("t.parquet", b"PAR1", (), r"t.parquet: not a Parquet file"),
    ],
)
def test_tables_that_cannot_be_read(
    pictures: Path, name: str, content: bytes, options: tuple[str, ...], message: str
) -> None:
    (pictures / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        _prepare(pictures / name, *options)
    assert not (pictures.parent / "out").exists()


def test_a_table_that_is_missing(pictures: Path) -> None:
    with pytest.raises(DataError, match=r"none.csv: cannot be read \(No such file"):
        _prepare(pictures / "none.csv")
    with pytest.raises(DataError, match=r"--base .*/none: no such folder"):
        _prepare(_csv(pictures / "t.csv", [["path"]]), "--base", str(pictures / "none"))


def test_without_pyarrow_parquet_says_what_to_install(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"path": ["a.png"]}), pictures / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"package pyarrow, which is not installed; pip install 'ldm-scale\[parquet\]'"):
        _prepare(pictures / "t.parquet")


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_large_tables_are_streamed(tmp_path: Path, name: str) -> None:
    """The rows take 6 MB as text and thrice that as objects; so little memory holds a batch of them and no more."""
    path, count = tmp_path / name, 30_000
    texts = [f"{number} " + "x" * 190 for number in range(count)]
    if name == "t.csv":
        _csv(path, [["path", "text"], *[["a.png", text] for text in texts]])
    else:
        pq.write_table(pa.table({"path": ["a.png"] * count, "text": texts}), path)
    del texts
    columns = Columns("path", "text")
    before, arrow_peak = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        for row in read_rows(path, columns):
            if row.number % 3000 == 0:
                arrow_peak = max(arrow_peak, pa.total_allocated_bytes() - before)
                assert row.captions == f"{row.number} " + "x" * 190
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert row.number == count - 1
    assert peak < 3 * 2**20
    assert arrow_peak < 4 * 2**20
    assert survey(path, columns, 10) == (count, set())


def test_a_column_of_identifiers_is_no_column_of_classes(tmp_path: Path) -> None:
    table = _csv(tmp_path / "t.csv", [["path", "id"], *[["a.png", f"x{n}"] for n in range(12)]])
    assert len(survey(table, Columns("path", class_name="id"), 12)[1]) == 12
    with pytest.raises(DataError, match="column 'id' has more than 11 values"):
        survey(table, Columns("path", class_name="id"), 11)
