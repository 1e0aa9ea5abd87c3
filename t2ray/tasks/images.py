"""What a column of pictures holds: the path of a file, its bytes, or both as the hub's data sets have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2ray.core import ConfigError, DataError, Image
from t2ray.pictures import opened
from t2ray.store import Store
from t2ray.tasks.table import Table


def with_images(table: Table, column: str) -> Table:
    """Returns the table with the pictures of a column in the place of what names them.

    A relative path is looked up beside the file that the row is in. Pictures that lie in files are read when they are
    used, so that there may be more of them than there is memory.

    Raises:
        DataError: a row has no picture there, or names a file that does not exist.
    """
    rows = []
    for place, row in zip(table.places, table.rows, strict=True):
        if column not in row:
            raise DataError(f"{place}: {table.absent(row, column)}")
        cells = row[column] if isinstance(row[column], list | tuple) else [row[column]]
        images = tuple(_image(cell, column, place) for cell in cells)
        rows.append({**row, column: images if len(images) != 1 else images[0]})
    return Table(source=table.source, rows=rows, places=table.places, unusable=table.unusable)


def images_of(cell: Image | tuple[Image, ...]) -> tuple[Image, ...]:
    """Returns the pictures that a row of `with_images` has in its column."""
    return cell if isinstance(cell, tuple) else (cell,)


def _image(cell: Any, column: str, place: str) -> Image:
    if isinstance(cell, Image):
        return cell
    named: Mapping[str, Any] = (
        cell if isinstance(cell, Mapping) else {"bytes" * isinstance(cell, bytes) or "path": cell}
    )
    data, path = named.get("bytes"), named.get("path")
    if isinstance(data, bytes) and data:
        image = Image(data=data)
        try:
            opened(image)
        except ConfigError as error:
            raise DataError(f"{place}: the column {column!r}: {error}") from None
        return image
    if not isinstance(path, str) or not path.strip():
        raise DataError(
            f"{place}: the column {column!r} holds {str(cell)[:60]!r} ({type(cell).__name__}), which is no picture; "
            "give the path of a file, its bytes, or a list of these"
        )
    whole = path if path.startswith("/") or "://" in path else f"{_folder(place)}{path}"
    folder, slash, name = whole.rpartition("/")
    if not Store(folder or slash or ".").exists(name):
        raise DataError(f"{place}: the column {column!r} names the picture {whole}, and there is no such file")
    return Image(path=whole)


def _folder(place: str) -> str:
    """The folder of the file that a place such as "shapes/train.jsonl, line 3" is in."""
    file = place.rpartition(", ")[0]
    return file[: file.rfind("/") + 1]
