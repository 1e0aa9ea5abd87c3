"""A model folder's safetensors, read one tensor at a time, and the digest that identifies a base model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from t2ray.core import ModelError

TINY = Path(__file__).parents[1] / "tiny" / "model"
PACKAGED = {"tiny": TINY, "tiny-vision": TINY.with_name("vision_model")}
INDEX = "model.safetensors.index.json"
SAMPLES, SAMPLE_BYTES = 16, 4096
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library


def resolve(ref: str) -> Path:
    """Returns the local folder of a model: "tiny" or "tiny-vision" (packaged), a folder, or a hub id ("org/name").

    A GGUF file, or a folder with one, is dequantised first (see `t2ray.models.gguf`).
    From the hub, only safetensors, JSON, tokenizer and chat template files are fetched, never pickles or code.

    Raises:
        ModelError: the path is no folder, or the hub id is not cached and cannot be fetched, or a GGUF file cannot be
            read.
        ResourceError: what reads GGUF files is not installed.
    """
    if ref in PACKAGED:
        return PACKAGED[ref]
    path = Path(ref).expanduser()
    if is_gguf(path):
        from t2ray.models.gguf import dequantised

        return dequantised(path)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"model {ref!r} is a file; name the folder that holds it, with config.json and *.safetensors")
    if ref.startswith((".", "/", "~")) or len(path.parts) > 2:
        raise ModelError(f"model {ref!r}: no such folder; name a folder with config.json and *.safetensors")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Only the top folder: subfolders have the same weights in other formats.
    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt", "*.model"]
    unwanted = ["*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.py", "*.pkl"]
    try:
        return Path(snapshot_download(ref, allow_patterns=wanted, ignore_patterns=unwanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {ref!r} is neither a folder here nor available from the hub ({reason}); "
            "download it where there is a network and pass the path of its folder"
        ) from error


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a folder that has such files and no safetensors."""
    if path.is_dir():
        return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors*"))
    return path.is_file() and path.suffix == ".gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a tensor's bytes are: `Entry(file="a.safetensors", dtype="BF16", shape=(64, 64), start=128, size=8192)`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Weights:
    """The tensors of a model folder, by name. Opening it reads the headers of the shards, but no tensor.

    Raises:
        ModelError: the folder has no safetensors, a shard is truncated or malformed, a shard that the index names is
            missing, or a tensor is in two shards.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        for shard in _shards(self.folder):
            for name, entry in _header(shard).items():
                if name in self.entries:
                    raise ModelError(
                        f"{self.folder}: tensor {name!r} is in {self.entries[name].file} and in {shard.name}"
                    )
                self.entries[name] = entry

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by name, in the order of the files."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str) -> torch.Tensor:
        """Returns one tensor, memory-mapped: its pages are read when they are used, and no other tensor is read."""
        entry = self.entries[name]
        with safe_open(self.folder / entry.file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    @cached_property
    def digest(self) -> str:
        """32 hex digits that identify these weights, whatever their sharding.

        BLAKE2b over the sorted tensor names, their dtypes and shapes, and 16 evenly spaced samples of 4 KiB of each
        tensor's bytes (of a smaller tensor, all bytes).
        """
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            with open(self.folder / entry.file, "rb") as file:
                for offset, length in _samples(entry.size):
                    file.seek(entry.start + offset)
                    digest.update(file.read(length))
        return digest.hexdigest()


def open_weights(ref: str | Path) -> Weights:
    """Returns the weights of a model (see `resolve`). They are opened once per process, and again if a file changes.

    Raises:
        ModelError: as `resolve` and `Weights` raise it.
    """
    folder = resolve(str(ref)).absolute()
    files = sorted(folder.glob("*.safetensors*"))
    return _opened(folder, tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=8)
def _opened(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> Weights:
    return Weights(folder)


def _samples(size: int) -> list[tuple[int, int]]:
    """Returns (offset, length) of the samples of a tensor of `size` bytes; the first and last byte are among them."""
    if size <= SAMPLES * SAMPLE_BYTES:
        return [(0, size)]
    return [(i * (size - SAMPLE_BYTES) // (SAMPLES - 1), SAMPLE_BYTES) for i in range(SAMPLES)]


def _shards(folder: Path) -> list[Path]:
    """Returns the files of a model: those that the index names, else `model.safetensors`, else all *.safetensors."""
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is not a safetensors index (weight_map is missing or malformed)") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{index} names the shard {missing[0]!r}, which is not in the folder; download it again")
        return [folder / name for name in names]
    whole = folder / "model.safetensors"
    shards = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ModelError(f"{folder} has no *.safetensors; name a model folder saved with safe_serialization (no .bin)")
    return shards


def _header(path: Path) -> dict[str, Entry]:
    """Returns the tensors of one safetensors file; raises ModelError if its length is not what its header says."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= HEADER_LIMIT:
            raise ModelError(f"{path} is not a safetensors file ({size} bytes, no header)")
        if size < 8 + length:
            raise ModelError(
                f"{path} is truncated: {size} bytes, of which the header alone takes {8 + length}; copy it again"
            )
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {
            name: Entry(
                file=path.name,
                dtype=info["dtype"],
                shape=tuple(info["shape"]),
                start=8 + length + info["data_offsets"][0],
                size=info["data_offsets"][1] - info["data_offsets"][0],
            )
            for name, info in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path} is not a safetensors file (its header is malformed)") from error
    end = max((entry.start + entry.size for entry in entries.values()), default=8 + length)
    if size != end:
        what = "truncated" if size < end else "malformed"
        raise ModelError(f"{path} is {what}: {size} bytes where its header says {end}; copy it again")
    return entries
