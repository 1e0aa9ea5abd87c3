"""Rows with their places, made of a file's bytes or of an Arrow table. `pyarrow` is imported when it is needed.

Not here: where files lie (`files`), and which columns a prompt needs (`columns`).
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2ray.core import DataError

if TYPE_CHECKING:
    import pyarrow

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""How the name of a data file ends, but for a compression's `.gz`, `.bz2` or `.zst` behind it."""

_COMPRESSED = (".gz", ".bz2", ".zst")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows with their places: `Table(source="dog.jsonl", rows=[{"text": "Once"}], places=["dog.jsonl, line 1"])`.

    `unusable` are columns that no row has although the file does, each with the reason.
    """

    source: str
    rows: list[dict[str, Any]]
    places: list[str]
    unusable: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        return sorted({column for row in self.rows for column in row})

    def need(self, columns: Mapping[str, type]) -> Table:
        """Returns the table itself if every row has these columns with values of these types.

        Raises:
            DataError: a row does not; the message names the file, the line, the column and its value.
        """
        for place, row in zip(self.places, self.rows, strict=True):
            for column, kind in columns.items():
                if column not in row:
                    raise DataError(f"{place}: {self.absent(row, column)}")
                value = row[column]
                if value is None:
                    raise DataError(f"{place}: the column {column!r} is null")
                if not isinstance(value, kind):
                    raise DataError(
                        f"{place}: the column {column!r} holds {str(value)[:60]!r} ({type(value).__name__}); it must "
                        f"hold {kind.__name__}"
                    )
        return self

    def absent(self, row: Mapping[str, Any], column: str) -> str:
        """Says why a row has nothing in a column."""
        if column in self.unusable:
            return f"the column {column!r} cannot be used: {self.unusable[column]}"
        return f"the column {column!r} is missing; the row has {', '.join(row) or 'none'}"


def kind_of(name: str) -> str:
    """Returns a data file's format, such as ".csv", or "" for another file."""
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    return suffix if suffix in FORMATS else ""


def of_bytes(path: str, data: bytes) -> Table:
    """Returns the rows of a file of any format, which its name tells; none if it holds none.

    Raises:
        DataError: the file is malformed; the message has the line.
    """
    return _READERS[kind_of(path)](path, data)


def _jsonl(path: str, data: bytes) -> Table:
    rows, places = [], []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            places.append(f"{path}, line {number}")
            rows.append(_row(places[-1], _json_of(path, line, number)))
    return Table(source=path, rows=rows, places=places)


def _json(path: str, data: bytes) -> Table:
    """Reads a list of rows; or what is JSONL by another name."""
    if not data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return _jsonl(path, data)
    values = _json_of(path, data, 1)
    places = [f"{path}, row {number}" for number in range(1, len(values) + 1)]
    return Table(source=path, rows=[_row(*pair) for pair in zip(places, values, strict=True)], places=places)


def _json_of(path: str, data: bytes, first: int) -> Any:
    """The value of a text that begins in line `first`."""
    try:
        return json.loads(_text(path, data, "JSON", first), object_pairs_hook=_each_once)
    except json.JSONDecodeError as error:
        where = f"line {first + error.lineno - 1}"
        raise DataError(f"{path}, {where}: not valid JSON: {error.msg}, at character {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {first}: not valid JSON: {error}") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in one object")
    return values


def _row(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a row is an object of columns, not {type(value).__name__}")
    return value


def _text(path: str, data: bytes, kind: str, first: int = 1) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = first + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}, line {number}: not valid {kind}: the byte {data[error.start]:#04x} is no UTF-8"
        ) from None


def _csv(path: str, data: bytes) -> Table:
    csv.field_size_limit(sys.maxsize)  # a cell may be a whole document
    text = io.StringIO(_text(path, data, "CSV"), newline="")
    reader = csv.reader(text, strict=True, delimiter="\t" if kind_of(path) == ".tsv" else ",")
    lines: list[tuple[int, list[str]]] = []
    begin = 1
    try:
        for fields in reader:
            if fields:
                lines.append((begin, fields))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {begin}: not valid CSV: {error}") from None
    if not lines:
        return Table(source=path, rows=[], places=[])
    (_, header), *records = lines
    for number, fields in records:
        if len(fields) != len(header):
            raise DataError(f"{path}, line {number}: {len(fields)} fields, but the header names {len(header)}")
    once = [(i, name) for i, name in enumerate(header) if name and header.count(name) == 1]
    return Table(
        source=path,
        rows=[{name: fields[i] for i, name in once} for _, fields in records],
        places=[f"{path}, line {number}" for number, _ in records],
        unusable={name: "it stands twice in the header" for name in header if header.count(name) > 1},
    )


def _parquet(path: str, data: bytes) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        batches = list(file.iter_batches())  # a whole file of nested columns may be too large for one array
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from None
    return of_arrow(path, pyarrow.Table.from_batches(batches, file.schema_arrow))


def _arrow(path: str, data: bytes) -> Table:
    """Reads an Arrow stream, as `save_to_disk` of datasets writes, or an Arrow file."""
    import pyarrow

    opened = pyarrow.ipc.open_file if data.startswith(b"ARROW1") else pyarrow.ipc.open_stream
    try:
        table = opened(data).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Arrow file: {' '.join(str(error).split())}") from None
    return of_arrow(path, table)


def of_arrow(source: str, table: pyarrow.Table) -> Table:
    """Rows of an Arrow table; binary columns that hold UTF-8 become texts, what Python cannot hold is left out."""
    import pyarrow

    columns: dict[str, list[Any]] = {}
    unusable = {name: "it stands twice" for name in table.column_names if table.column_names.count(name) > 1}
    for name in [name for name in table.column_names if name not in unusable]:
        column = table.column(name)
        try:
            if pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type):
                column = column.cast(pyarrow.large_string())
        except pyarrow.ArrowInvalid:
            pass  # bytes that are no text, which a column that nobody reads may hold
        try:
            columns[name] = column.to_pylist()
        except (ValueError, OverflowError, KeyError, pyarrow.ArrowException) as error:  # such as nanoseconds, zones
            unusable[name] = " ".join(str(error).split())
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows = rows or [{} for _ in range(table.num_rows)]
    places = [f"{source}, row {number}" for number in range(1, len(rows) + 1)]
    return Table(source=source, rows=rows, places=places, unusable=unusable)


_READERS: dict[str, Callable[[str, bytes], Table]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
    ".arrow": _arrow,
}  # fmt: skip
