"""Bytes, text and tensors under a URI: a local folder, `s3://bucket/path` or `gs://bucket/path` (pyarrow.fs).

A file is whole or absent: it is written under a temporary name beside its place and then moved. Tensors are stored as
safetensors, never as pickles.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import ArrowInvalid, fs
from safetensors import SafetensorError

from t2ray.core import ConfigError, ResourceError
from t2ray.integrity import Damaged

if TYPE_CHECKING:
    import torch

DEPTH = 4  # of folders that are listed one by one, which a link to a folder above itself could make endless
STALE_S = 3600.0  # a temporary file older than this was left by a writer that died


class Store:
    """The files under one URI, named by their paths relative to it. `local` is the folder, or None if it is remote.

    Raises:
        ConfigError: the URI's scheme is unknown, or the URI names a file.
    """

    def __init__(self, uri: str | Path, filesystem: fs.FileSystem | None = None) -> None:
        self.uri = str(uri).rstrip("/") or "/"
        self.local: Path | None = None
        if filesystem is not None:
            self.fs, self.root = filesystem, self.uri
        elif "://" in self.uri:
            try:
                self.fs, self.root = fs.FileSystem.from_uri(self.uri)
            except (ArrowInvalid, OSError) as error:
                raise ConfigError(f"{self.uri!r} cannot be opened: use a folder, s3:// or gs:// ({error})") from error
        else:
            self.fs, self.root = fs.LocalFileSystem(), str(Path(self.uri).expanduser().absolute())
        if isinstance(self.fs, fs.LocalFileSystem):
            self.local = Path(self.root)
            if self.local.exists() and not self.local.is_dir():
                raise ConfigError(f"{self.local} is a file; name a folder, s3:// or gs://")

    def exists(self, path: str) -> bool:
        return bool(self._info(f"{self.root}/{path}").type != fs.FileType.NotFound)

    def is_folder(self, path: str) -> bool:
        return bool(self._info(f"{self.root}/{path}").type == fs.FileType.Directory)

    def names(self, path: str = "") -> list[str]:
        """The names in a folder, sorted, without hidden and temporary ones; none if there is no such folder."""
        infos = self._info(fs.FileSelector(f"{self.root}/{path}".rstrip("/"), allow_not_found=True))
        return sorted(info.base_name for info in infos if not info.base_name.startswith("."))

    def tree(self) -> tuple[dict[str, tuple[int | None, int]], dict[str, str]]:
        """All under the URI but hidden files: path -> (size in bytes, None for a folder; time of change in ns).

        Second come the folders that cannot be listed, each with the reason.

        Raises:
            ResourceError: the URI itself cannot be listed, or is a local folder that does not exist.
        """
        unreadable: dict[str, str] = {}
        shown = (i for i in self._walk(self.root, unreadable) if not i.is_file or not i.base_name.startswith("."))
        return {self._relative(info.path): (info.size, info.mtime_ns) for info in shown}, unreadable

    def age_s(self, path: str) -> float:
        """How many seconds ago a file was written, by the storage's own clock, which a file beside it tells."""
        probe = f"{path}.{uuid.uuid4().hex}"
        self.write_bytes(probe, b"")
        try:
            then, now = self._info([f"{self.root}/{path}", f"{self.root}/{probe}"])
            return (now.mtime_ns - then.mtime_ns) / 1e9 if then.is_file else 0.0
        finally:
            self.delete(probe)

    def read_bytes(self, path: str) -> bytes:
        """Returns the content of a file.

        Raises:
            FileNotFoundError: there is no such file.
            Damaged: it is a folder.
            ResourceError: it cannot be read.
        """
        try:
            with self.fs.open_input_stream(f"{self.root}/{path}") as file:
                return bytes(file.read())
        except FileNotFoundError:
            raise
        except OSError as error:
            if self.is_folder(path):
                raise Damaged("it is a folder") from None
            raise ResourceError(f"cannot read {self.uri}/{path} ({error}); mend its rights or its storage") from error

    def read_text(self, path: str) -> str:
        return self.read_bytes(path).decode()

    def write_bytes(self, path: str, data: bytes) -> None:
        """Writes a file, in place of one of that name.

        Raises:
            ResourceError: the disk is full or cannot be written; a file of that name is then unchanged.
        """
        with self._replacing(path) as temporary:
            if self.local is None:
                with self.fs.open_output_stream(temporary) as stream:
                    stream.write(data)
            else:
                Path(temporary).write_bytes(data)

    def write_text(self, path: str, text: str) -> None:
        self.write_bytes(path, text.encode())

    def write_tensors(self, path: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Writes a safetensors file, in place of one of that name; raises as `write_bytes` does."""
        from safetensors import torch as safetensors  # it loads torch, as reading rows must not

        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if self.local is None:
            self.write_bytes(path, safetensors.save(contiguous, dict(metadata)))
            return
        with self._replacing(path) as temporary:
            Path(temporary).touch()
            mode = Path(temporary).stat().st_mode
            safetensors.save_file(contiguous, temporary, dict(metadata))
            Path(temporary).chmod(mode)  # safetensors gives its files to their owner alone

    def read_tensors(self, path: str) -> dict[str, torch.Tensor]:
        """Returns the tensors of a safetensors file by name, read whole: none changes or fails when the file does.

        Raises:
            FileNotFoundError: there is no such file.
            Damaged: the file is truncated or no safetensors file, or it is a folder.
            ResourceError: it cannot be read.
        """
        return self.read_safetensors(path)[0]

    def read_safetensors(self, path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Returns a safetensors file's tensors and its metadata; raises as `read_tensors` does."""
        from safetensors import torch as safetensors

        data = self.read_bytes(path)
        try:
            tensors = dict(sorted(safetensors.load(data).items()))  # whose own order is any
        except SafetensorError as error:
            raise Damaged(str(error)) from error
        length = int.from_bytes(data[:8], "little")  # of the header, which is JSON
        return tensors, dict(json.loads(data[8 : 8 + length]).get("__metadata__", {}))

    def claim(self, path: str) -> bool:
        """Makes a folder that this caller alone may fill. Returns False if another caller has claimed it.

        An object store cannot make a folder exclusively. There, each caller writes a mark and then lists the folder; a
        caller that sees another's mark gives up. Listings are consistent, so that at most one caller succeeds. If two
        try at once, both may fail.

        Raises:
            ResourceError: the folder cannot be made.
        """
        if self.local is None:
            mark = f".claim-{uuid.uuid4().hex}"
            self.write_bytes(f"{path}/{mark}", b"")
            infos = self._info(fs.FileSelector(f"{self.root}/{path}"))
            return [info.base_name for info in infos] == [mark]
        folder = self.local / path
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            return False
        except OSError as error:
            raise ResourceError(
                f"cannot make {folder} ({error.strerror}); free some space or name another place"
            ) from error
        return True

    def delete(self, path: str) -> None:
        """Deletes a file, or a folder with all its files."""
        full = f"{self.root}/{path}"
        if self._info(full).type == fs.FileType.Directory:
            self.fs.delete_dir(full)
        else:
            self.fs.delete_file(full)

    def sweep(self) -> None:
        """Deletes the temporary files that killed writers left in the top folder of a local store."""
        if self.local is not None:
            for path in self.local.glob(".*.tmp"):
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink(missing_ok=True)

    def _walk(self, folder: str, unreadable: dict[str, str], depth: int = DEPTH) -> list[Any]:
        """One listing; where that fails, folder by folder."""
        absent = self.local is None or folder != self.root  # an object store has no folder where there is no file
        try:
            return list(self._info(fs.FileSelector(folder, recursive=True, allow_not_found=absent)))
        except ResourceError:
            infos = list(self._info(fs.FileSelector(folder, allow_not_found=absent)))
        for info in [info for info in infos if depth and info.type == fs.FileType.Directory]:
            try:
                infos += self._walk(info.path, unreadable, depth - 1)
            except ResourceError as error:
                unreadable[self._relative(info.path)] = str(error)
        return infos

    def _relative(self, path: str) -> str:
        return path[len(self.root) :].lstrip("/")

    def _info(self, what: str | list[str] | fs.FileSelector) -> Any:
        try:
            return self.fs.get_file_info(what)
        except FileNotFoundError as error:
            if isinstance(what, fs.FileSelector) and what.allow_not_found:
                return []  # the folder was made while Arrow looked for it
            raise ResourceError(f"cannot look into {self.uri} ({error}); check its address and your rights") from error
        except (OSError, ArrowInvalid, UnicodeError) as error:  # the last: a file's name in another encoding
            raise ResourceError(f"cannot look into {self.uri} ({error}); check its address and your rights") from error

    @contextmanager
    def _replacing(self, path: str) -> Iterator[str]:
        """Yields the full name of a temporary file beside `path`; moves it to `path` if the block does not raise."""
        folder, _, name = f"{self.root}/{path}".rpartition("/")
        temporary, target = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp", f"{folder}/{name}"
        try:
            self.fs.create_dir(folder, recursive=True)
            yield temporary
            if self.local is None:
                self.fs.move(temporary, target)
            else:
                _sync(temporary)
                os.replace(temporary, target)
                _sync(folder)
        except BaseException as error:
            with suppress(OSError):
                self.fs.delete_file(temporary)
            if isinstance(error, OSError | SafetensorError):
                raise ResourceError(
                    f"cannot write {target} ({error}); what stood there is untouched: "
                    "free some space or name another place"
                ) from error
            raise


def _sync(path: str) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
