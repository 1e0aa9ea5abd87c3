"""Files that are whole or absent, on a local disk and on a store without exclusive folders."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from t2ray.core import ConfigError, ResourceError
from t2ray.integrity import Damaged
from t2ray.store import STALE_S, Store


@pytest.fixture(params=["local", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(tmp_path / "root")
    return Store("bucket/root", fs._MockFileSystem())


def test_what_is_written_is_read(store: Store) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(3, dtype=torch.bfloat16)}
    store.write_text("a/b.json", "{}")
    store.write_tensors("a/c.safetensors", tensors, {})
    assert store.read_text("a/b.json") == "{}"
    assert {name: tensor.tolist() for name, tensor in store.read_tensors("a/c.safetensors").items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    assert store.names("a") == ["b.json", "c.safetensors"]
    assert store.exists("a/b.json") and not store.exists("a/x")


def test_a_write_replaces_and_leaves_nothing_else(store: Store) -> None:
    store.write_text("a.json", "old")
    store.write_text("a.json", "new")
    assert store.read_text("a.json") == "new"
    assert [info.base_name for info in store.fs.get_file_info(fs.FileSelector(store.root))] == ["a.json"]


def test_a_missing_folder_has_no_names(store: Store) -> None:
    assert store.names("nowhere") == []


def test_a_folder_is_claimed_once(store: Store) -> None:
    assert store.claim("x/v0001")
    assert not store.claim("x/v0001")
    assert store.claim("x/v0002")


def test_deleting_a_folder_takes_what_is_in_it(store: Store) -> None:
    store.write_text("a/b/c", "")
    store.write_text("a/d", "")
    store.delete("a/b")
    assert store.names("a") == ["d"]
    store.delete("a/d")
    assert store.names("a") == []


def test_of_many_that_claim_at_once_one_has_the_folder(tmp_path: Path) -> None:
    won: list[bool] = []
    threads = [threading.Thread(target=lambda: won.append(Store(tmp_path).claim("x/v0001"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="ftp://host/x"):
        Store("ftp://host/x")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file"):
        Store(tmp_path / "file")


def test_a_store_that_cannot_be_reached_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable(fs.FileSystemHandler):  # type: ignore[misc]
        """Every call fails, as S3's do without a network."""

        def get_file_info(self, paths: list[str]) -> None:
            raise OSError(113, "No route to host")

        get_file_info_selector = get_file_info

    for name in Unreachable.__abstractmethods__:
        monkeypatch.setattr(Unreachable, name, Unreachable.get_file_info)
    monkeypatch.setattr(Unreachable, "__abstractmethods__", frozenset())
    store = Store("bucket/root", fs.PyFileSystem(Unreachable()))
    for look in (store.names, lambda: store.exists("a")):
        with pytest.raises(ResourceError, match="bucket/root .*No route to host"):
            look()


FULL_DISK = """
import resource, sys, torch
from t2ray.core import ResourceError
from t2ray.store import Store
store = Store(sys.argv[1])
store.write_text("a.json", "old")
store.write_tensors("a.safetensors", {"z": torch.zeros(4)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (
    lambda: store.write_bytes("a.json", b"x" * 5000),
    lambda: store.write_tensors("a.safetensors", {"z": torch.zeros(5000)}, {}),
):
    try:
        write()
    except ResourceError as error:
        print(error)
"""


def test_a_write_that_finds_no_room_leaves_what_stood_there(tmp_path: Path) -> None:
    """A limit on file sizes fails a write half-way, as a full disk does."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2
    assert str(tmp_path / "a.json") in lines[0] and "free some space" in lines[0]
    assert str(tmp_path / "a.safetensors") in lines[1] and "free some space" in lines[1]
    assert (tmp_path / "a.json").read_text() == "old"
    assert torch.equal(Store(tmp_path).read_tensors("a.safetensors")["z"], torch.zeros(4))
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.safetensors"]


def test_no_space_is_reported_with_path_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match=r"a\.json .*No space left on device.*free some space"):
        Store(tmp_path).write_text("a.json", "x")


def test_only_what_dead_writers_left_is_swept(tmp_path: Path) -> None:
    for name, age in (".dead.tmp", 2 * STALE_S), (".alive.tmp", 0.0), ("a.json", 2 * STALE_S):
        (tmp_path / name).touch()
        when = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (when, when))
    Store(tmp_path).sweep()
    assert sorted(os.listdir(tmp_path)) == [".alive.tmp", "a.json"]


def test_tensors_are_as_readable_to_others_as_any_file(tmp_path: Path) -> None:
    Store(tmp_path).write_text("a", "")
    Store(tmp_path).write_tensors("b", {"z": torch.zeros(1)}, {})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_tensors_stay_when_their_file_is_written_over_or_cut(tmp_path: Path) -> None:
    """A process that had the file mapped would see other numbers, and die of the cut."""
    store, path = Store(tmp_path), tmp_path / "a.safetensors"
    store.write_tensors("a.safetensors", {"z": torch.zeros(5000)}, {"a": "b"})
    (tensors, metadata), content = store.read_safetensors("a.safetensors"), path.read_bytes()
    with path.open("r+b") as file:
        file.write(b"\xff" * len(content))
    assert torch.equal(tensors["z"], torch.zeros(5000)) and metadata == {"a": "b"}
    path.write_bytes(content[:4000])
    assert torch.equal(tensors["z"], torch.zeros(5000))
    with pytest.raises(Damaged):
        store.read_tensors("a.safetensors")
