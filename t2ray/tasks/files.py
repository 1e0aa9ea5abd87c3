"""Where rows are: in files of many kinds, on a disk or in a bucket, or on the Hugging Face hub.

A source is a file, a pattern such as `shards/*.parquet`, a folder, a list of these, or the id of a hub data set. The
libraries that a source needs are imported when it is read; no remote code is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2ray.core import DataError
from t2ray.tasks.table import FORMATS, Table, kind_of, of_arrow, of_bytes

if TYPE_CHECKING:
    from t2ray.store import Store

_HUB_ID = re.compile(r"[\w-]+(/[\w.-]+)?(:[\w.-]+)?")
_SPLIT = re.compile(r"(train|validation|valid|dev|test)(?![a-z])", re.I)
_SPLITS, _STATE = "dataset_dict.json", "state.json"  # which `save_to_disk` of datasets writes
_BATCH = 1_000  # rows of the hub that are converted at once


def read(source: str | Sequence[str], split: str = "train", folder: str | None = None) -> Table:
    """Reads all rows of a source, in the order of its files' names.

    A relative path is looked up in the working folder, then in `folder`. Of a folder whose files are named after
    splits, such as `train-00000-of-00002.parquet`, those of `split` are read, as of a hub data set (`id` or
    `id:configuration`).

    Raises:
        DataError: there is no such file, or one is malformed (the message has the line) or of another format; there are
            no rows; the hub cannot be reached or has no such data set.
        ResourceError: a file cannot be read.
    """
    tables = []
    for name in [source] if isinstance(source, str) else source:
        files = _find(name, split, folder)
        if not files and (is_file_like(name) or not _HUB_ID.fullmatch(name)):
            raise DataError(
                f"{name}: no such data file; give a file ({', '.join(FORMATS)}; also .gz), a folder, a pattern such as "
                "shards/*.parquet, an s3:// or gs:// address, or a hub data set's id"
            )
        tables += [of_bytes(file, _bytes(file)) for file in files] or [_hub(name, split)]
    table = tables[0]
    if len(tables) > 1:
        table = Table(
            source=source if isinstance(source, str) else ", ".join(source),
            rows=[row for table in tables for row in table.rows],
            places=[place for table in tables for place in table.places],
            unusable={column: why for table in tables for column, why in table.unusable.items()},
        )
    if not table.rows:
        raise DataError(f"{table.source}: the file holds no rows")
    return table


def is_file_like(source: str | Sequence[str]) -> bool:
    """Whether a source can only be files, and not a split's or a hub data set's name."""
    return not isinstance(source, str) or bool(kind_of(source) or "://" in source or re.search(r"[*?\[]|/$", source))


def absolute(source: str) -> str:
    """Returns a source with its whole path if it is in the working folder, else as it is."""
    local = "://" not in source and _find(source, None, None)
    return str(Path(_expanded(source)).absolute()) if local else source


def _expanded(source: str) -> str:
    from t2ray.config.files import expanded  # pydantic, which a verifier's process does without

    return expanded(source)


def _find(source: str, split: str | None, folder: str | None) -> list[str]:
    """Returns the files that a source names; none if there are none."""
    if source.startswith(("http://", "https://")):
        raise DataError(f"{source}: data is not read from the web; download the file and name it")
    if "://" in source:
        return _files_at(source.rstrip("/"), split)
    places = [Path(_expanded(source)), *([Path(folder) / source] if folder else [])]
    return next((files for place in places if (files := _files_at(str(place), split))), [])


def _files_at(place: str, split: str | None) -> list[str]:
    """Returns the files at a place: itself, those of a folder, or those that fit a pattern."""
    from t2ray.store import Store

    def around(path: str) -> tuple[Store, str, str]:
        before, slash, rest = path.rpartition("/")
        return Store(before or slash or "."), before + slash, rest

    store, before, name = around(place)
    if store.exists(name):
        if not store.is_folder(name):
            if not kind_of(name):
                raise DataError(
                    f"{place}: its name ends in {Path(name).suffix!r}; a data file is one of {', '.join(FORMATS)}"
                )
            return [place]
        return _in_folder(place, split)
    fixed = re.split(r"[*?\[]", place)[0]
    if fixed == place:
        return []
    store, before, _ = around(fixed)
    pattern = place.removeprefix(before)
    if "/" not in pattern:
        names = store.names()
    else:
        names = sorted(store.tree()[0]) if store.local is None or store.local.is_dir() else []
    deep = "**" in pattern
    found = [
        n for n in names if fnmatchcase(n, pattern) and (deep or n.count("/") == pattern.count("/")) and kind_of(n)
    ]
    return [before + name for name in found]


def _in_folder(place: str, split: str | None) -> list[str]:
    """Returns the files of a folder that are read: data files, or what `save_to_disk` of datasets wrote."""
    from t2ray.store import Store

    store = Store(place)
    names = store.names()
    if _SPLITS in names:  # a folder per split
        splits = _listed(store, _SPLITS, "splits")
        if split is not None and split not in splits:
            raise DataError(f"{place} has no split {split!r}; it has {', '.join(sorted(splits))}")
        return _in_folder(f"{place}/{split or splits[0]}", split)
    if _STATE in names:
        files = [file["filename"] for file in _listed(store, _STATE, "_data_files")]
        if gone := sorted({*files} - {*names}):
            raise DataError(f"{place}/{gone[0]} is missing, which {_STATE} names; save the data set again")
        return [f"{place}/{file}" for file in files]
    names = [name for name in names if kind_of(name)]
    return [f"{place}/{name}" for name in _of_split(place, names, split)]


def _listed(store: Store, file: str, key: str) -> list[Any]:
    try:
        return list(json.loads(store.read_bytes(file))[key])
    except (ValueError, LookupError, TypeError):
        raise DataError(f"{store.uri}/{file} is damaged: it has no list {key!r}; save the data set again") from None


def _of_split(folder: str, names: list[str], split: str | None) -> list[str]:
    """Returns those of a folder's files that are read."""
    named = {name: match[1].lower() for name in names if (match := _SPLIT.match(name))}
    if named and split is not None:
        names = [name for name, of in named.items() if of == split]
        if not names:
            raise DataError(
                f"{folder} has no files of the split {split!r}; it has {', '.join(sorted({*named.values()}))}"
            )
    if len(kinds := {kind_of(name) for name in names}) > 1:
        kind = min(kinds)
        raise DataError(
            f"{folder} holds files of several kinds ({', '.join(sorted(kinds))}); write a pattern such as "
            f"{folder}/*{kind}"
        )
    return names


def _bytes(path: str) -> bytes:
    """Returns what a file holds, decompressed."""
    from t2ray.store import Store

    folder, slash, name = path.rpartition("/")
    return Store(folder or slash or ".").read_bytes(name)


def _hub(source: str, split: str) -> Table:
    import datasets
    import pyarrow
    from huggingface_hub.utils import logging

    # Each of the hub's retries would print two lines before the error that counts.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    name, _, configuration = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # offline, unknown, gated, no such configuration or split
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot load the data set {source!r}, split {split!r}, from the hub: {reason}; "
            f"give a local {', '.join(FORMATS)} file with data instead"
        ) from None
    # as Arrow: pictures and sounds that nobody uses are not decoded
    parts = [*loaded.with_format("arrow").iter(_BATCH)]
    if not parts:
        raise DataError(f"the data set {source!r} has no rows in its split {split!r}")
    return of_arrow(f"{source} ({split})", pyarrow.concat_tables(parts))
