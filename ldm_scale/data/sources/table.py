"""The images that a table lists, with captions and classes from its columns.

Images are local files; paths are relative to the table's folder, or to another that is named. They are cut to the
largest centred square and resized once, as those of a folder are. A row whose image cannot be used is left out, counted
and named. The table is never in memory: a first pass counts rows and classes, a second one hands the rows out.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ldm_scale.data.policy import BadSample
from ldm_scale.data.sources import (
    Layout,
    LeftOut,
    Prepared,
    Sample,
    Source,
    file_digest,
    find_prepared,
    license_request,
)
from ldm_scale.data.sources.squares import make_square
from ldm_scale.data.sources.table_files import DELIMITED, PARQUET, Columns, Row, read_rows, survey
from ldm_scale.data.sources.writing import write_dataset
from ldm_scale.errors import DataError

_MAX_CLASSES = 1_000_000  # more, or a larger number, are identifiers and not classes
# What the .json of a sample says itself, and what would be read as something of its picture.
_TAKEN = frozenset({"caption", "captions", "class", "file", "objects", "row"})


@dataclass(frozen=True)
class TableRequest:
    """How the rows of a table become samples."""

    table: Path
    columns: Columns
    resolution: int
    base: Path | None = None  # what paths are relative to; None: the table's folder
    license_text: str | None = None

    @property
    def folder(self) -> Path:
        """What paths are relative to."""
        return (self.table.parent if self.base is None else self.base).resolve()


def prepare_table(
    out: Path, request: TableRequest, heldout_percent: float, samples_per_shard: int, num_workers: int | None = None
) -> Prepared:
    """The data set at `out`, made now or found there. Rows of one path are on one side of the held-out split.

    Raises: DataError if the table cannot be read, none of its images can be used, or something else lies at `out`.
    """
    _check(request)
    described: dict[str, Any] = {
        "source": "table",
        "table": file_digest(request.table),
        "columns": {
            "image": request.columns.image,
            "caption": request.columns.caption,
            "class": request.columns.class_name,
            "keep": list(request.columns.keep),
        },
        "base": request.folder.name,
        "resolution": request.resolution,
        "heldout_percent": heldout_percent,
        "samples_per_shard": samples_per_shard,
        **license_request(request.license_text),
    }
    if found := find_prepared(out, described):
        return found
    num_rows, names = survey(request.table, request.columns, _MAX_CLASSES)
    classes = _classes(names)
    describe = {
        "name": request.table.stem,
        "resolution": request.resolution,
        "classes": classes,
        "license": request.license_text,
        "attribution": None,
        "left_out": {},
        "left_out_names": [],
        "request": described,
    }
    make = partial(_make_sample, request=request, class_numbers={name: number for number, name in enumerate(classes)})
    rows = read_rows(request.table, request.columns)
    source = Source(str(request.table), rows, num_rows, make, family=lambda row: row.path)
    return write_dataset(
        out, described, describe, source, Layout(samples_per_shard, heldout_percent, num_workers=num_workers)
    )


def _check(request: TableRequest) -> None:
    """Nothing.

    Raises: DataError if the table is of no kind that is read, the folder of the images is none, or a column's name is
    taken.
    """
    if request.table.suffix.lower() not in (*DELIMITED, PARQUET):
        raise DataError(f"{request.table}: not a table that is read; it must end in {', '.join((*DELIMITED, PARQUET))}")
    if not request.folder.is_dir():
        raise DataError(f"--base {request.folder}: no such folder")
    if taken := sorted(_TAKEN & set(request.columns.keep)):
        raise DataError(f"--keep {taken[0]}: a sample's .json has an entry of this name already; rename the column")


def _classes(found: set[str]) -> list[str]:
    """The classes in the order of their numbers: names by the alphabet, or numbers from 0 that stay what they are."""
    if found and all(re.fullmatch(r"0|[1-9][0-9]{0,5}", name) for name in found):
        return [str(number) for number in range(max(map(int, found)) + 1)]
    return sorted(found)


def _make_sample(row: Row, request: TableRequest, class_numbers: dict[str, int]) -> Sample | LeftOut:
    """The sample of one row, or why there is none."""
    try:
        if row.fault is not None:
            raise BadSample(row.fault)
        square = make_square(_read(row.path, request.folder), request.resolution)
    except BadSample as error:
        return LeftOut(f"row {row.number}, {row.path or 'no path'}", str(error))
    metadata: dict[str, Any] = {"file": row.path, "row": row.number, **row.kept}
    if row.class_name is not None:
        metadata["class"] = class_numbers[row.class_name]
    members = dict(square.members)
    if isinstance(row.captions, list):
        metadata["captions"] = row.captions
    elif row.captions is not None:
        members["txt"] = row.captions.encode("utf-8")
    members["json"] = json.dumps(metadata, ensure_ascii=False).encode("utf-8", "replace")
    return Sample(f"{row.number:09d}", members)


def _read(path: str, folder: Path) -> bytes:
    """The file of a path of the table.

    Raises: BadSample if it leads elsewhere, or cannot be read.
    """
    if "\0" in path:
        raise BadSample("path has a null byte")
    if "://" in path:
        raise BadSample("path is a URL; download the images first, with img2dataset for one")
    file = os.path.normpath(os.path.join(folder, path))
    if os.path.commonpath((folder, file)) != str(folder):
        raise BadSample("path leads out of the folder of the table, or out of --base")
    try:
        if not os.path.isfile(file):
            raise BadSample("no such file")
        return Path(file).read_bytes()
    except OSError as error:
        raise BadSample(f"file cannot be read ({error.strerror})") from None
