"""The rows of a CSV, TSV or Parquet file one after the other: of none more than a batch is in memory.

CSV and TSV are read as the standard library's dialects "excel" and "excel-tab" say, in UTF-8. Their structure must be
right (a quote that is not closed would swallow rows without a word); what is wrong with one row is said of that row.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_scale.errors import DataError

DELIMITED = {".csv": csv.excel, ".tsv": csv.excel_tab}
PARQUET = ".parquet"
_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20  # read of a column at a time, so that a large row group is never in memory
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Columns:
    """Which columns are read, by their names."""

    image: str
    caption: str | None = None
    class_name: str | None = None
    keep: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        named = [name for name in (self.image, self.caption, self.class_name) if name is not None]
        return list(dict.fromkeys([*named, *self.keep]))


@dataclass(frozen=True)
class Row:
    """What a row says of one image."""

    number: int  # in the table, from 0
    path: str = ""  # as the table has it
    captions: str | list[str] | None = None  # a list where the column holds lists
    class_name: str | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None  # why it cannot be used, worded the same for every row with that fault


def read_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows in their order.

    Raises: DataError if it is no such file, has no such columns, or is damaged.
    """
    try:
        if path.suffix.lower() in DELIMITED:
            yield from _delimited_rows(path, columns)
        else:
            yield from _parquet_rows(path, columns)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def survey(path: Path, columns: Columns, max_classes: int) -> tuple[int, set[str]]:
    """(number of rows, classes that occur).

    Raises: DataError as `read_rows`, or if there are more classes than that.
    """
    if path.suffix.lower() == PARQUET and columns.class_name is None:
        with _parquet(path) as file:
            _check_types(path, file.schema_arrow, columns)
            return int(file.metadata.num_rows), set()
    num_rows, classes = 0, set[str]()
    for row in read_rows(path, columns):
        num_rows += 1
        if row.class_name is not None:
            classes.add(row.class_name)
        if len(classes) > max_classes:
            raise DataError(
                f"{path}: column {columns.class_name!r} has more than {max_classes} values; name a column of classes "
                "with --class-column"
            )
    return num_rows, classes


def _places(path: Path, header: Sequence[str], columns: Columns) -> list[int]:
    """Where the wanted columns stand.

    Raises: DataError if one is missing or there twice.
    """
    for name in columns.names:
        if header.count(name) != 1:
            fault = "no column" if name not in header else "more than one column"
            raise DataError(f"{path}: {fault} {name!r}; it has: {', '.join(header)[:500]}")
    return [header.index(name) for name in columns.names]


def _row(number: int, values: dict[str, Any], columns: Columns, keep: Callable[[Any], Any]) -> Row:
    """A row by its values in the wanted columns; `keep` gives those that are kept as JSON has them."""
    path = _text(values[columns.image]) or ""
    if not path:
        return Row(number, fault="no path")
    captions = values[columns.caption] if columns.caption is not None else None
    if isinstance(captions, list):
        captions = [text for text in (_text(caption) for caption in captions) if text]
    elif captions is not None:
        captions = _text(captions) or ""
    class_name = _text(values[columns.class_name]) or None if columns.class_name is not None else None
    kept = {name: keep(values[name]) for name in columns.keep}
    fault = None
    if columns.class_name is not None and class_name is None:
        fault = "no class"
    texts = {"caption": captions, "class": class_name, "kept column": kept}
    if not _is_utf8(texts):
        what = next(what for what, value in texts.items() if not _is_utf8(value))
        return Row(number, path, fault=f"{what} is not UTF-8")
    return Row(number, path, captions, class_name, kept, fault)


def _text(value: Any) -> str | None:
    """A cell as text without blanks around it; bytes that are not UTF-8 stand in it as surrogates."""
    if value is None:
        return None
    return (value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)).strip()


def _is_utf8(value: Any) -> bool:
    """Whether all text in it can be written down."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _delimited_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of a CSV or TSV file."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, DELIMITED[path.suffix.lower()], strict=True)
        try:
            header = next(reader, [])
            if not _is_utf8(header) or "\0" in "".join(header):
                raise DataError(f"{path}: not UTF-8; save it as UTF-8")
            places = dict(zip(columns.names, _places(path, header, columns), strict=True))
            for number, cells in enumerate(filter(None, reader)):
                if len(cells) != len(header):
                    yield Row(number, fault="row has another number of fields than the header")
                else:
                    values = {name: cells[place] for name, place in places.items()}
                    yield _row(number, values, columns, _number_or_text)
        except csv.Error as error:
            raise DataError(
                f"{path}: malformed at line {reader.line_num} ({error}); put fields with quotes, separators or line "
                'ends into quotes, with "" for a quote in them'
            ) from None


def _number_or_text(cell: str) -> Any:
    """What a cell of text is in JSON: a number where it is one in JSON's spelling, nothing where it is empty."""
    cell = cell.strip()
    if not _JSON_NUMBER.fullmatch(cell):
        return cell or None
    return _finite(json.loads(cell))


def _finite(value: Any) -> Any:
    """The value, nothing for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parquet(path: Path) -> Any:
    """The open Parquet file.

    Raises: DataError if pyarrow is not installed, or it is none.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(
            f"{path}: Parquet is read by the package pyarrow, which is not installed; pip install 'ldm-scale[parquet]'"
        ) from None
    try:
        return ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ArrowException as error:
        raise DataError(f"{path}: not a Parquet file ({error})") from None


def _parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of a Parquet file."""
    from pyarrow import ArrowException

    with _parquet(path) as file:
        _check_types(path, file.schema_arrow, columns)
        names, number = columns.names, 0
        try:
            for batch in file.iter_batches(_BATCH_ROWS, columns=names, use_threads=False):
                cells = [batch.column(name).to_pylist() for name in names]
                for values in zip(*cells, strict=True):
                    yield _row(number, dict(zip(names, values, strict=True)), columns, _finite)
                    number += 1
        except (ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: damaged after row {number} ({error}); write or copy it again") from None


def _check_types(path: Path, schema: Any, columns: Columns) -> None:
    """Nothing; raises DataError if a column is missing or of a type that it cannot have."""
    from pyarrow import types

    def is_text(kind: Any) -> bool:
        if types.is_dictionary(kind):
            kind = kind.value_type
        tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
        return any(test(kind) for test in tests)

    def is_list(kind: Any) -> bool:
        return (types.is_list(kind) or types.is_large_list(kind)) and is_text(kind.value_type)

    def is_plain(kind: Any) -> bool:
        text = is_text(kind) and not types.is_binary(kind) and not types.is_large_binary(kind)
        return text or any(test(kind) for test in (types.is_integer, types.is_floating, types.is_boolean))

    _places(path, schema.names, columns)
    wanted = [(columns.image, is_text, "text")]
    if columns.caption is not None:
        wanted.append((columns.caption, lambda kind: is_text(kind) or is_list(kind), "text, or lists of it"))
    if columns.class_name is not None:
        wanted.append((columns.class_name, lambda kind: is_text(kind) or types.is_integer(kind), "text or integers"))
    wanted += [(name, is_plain, "text, numbers or truth values") for name in columns.keep]
    for name, fits, what in wanted:
        kind = schema.field(name).type
        if not fits(kind):
            raise DataError(f"{path}: column {name!r} is of type {kind}; it must hold {what}")
