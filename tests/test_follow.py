"""Following a registry: whatever a look meets, what was known stays, and the entry at fault alone is told of."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs
from torch import Tensor

from t2ray.adapters.factors import Target
from t2ray.core import Mixture, ResourceError
from t2ray.experts.follow import Follower
from t2ray.experts.registry import MARKER, Registry
from t2ray.store import Store

BASE = "ab" * 16
LAYOUT = (
    Target(name="model.layers.0.mlp.up_proj", layer=0, m=3, n=8, rank=3),
    Target(name="model.layers.1.mlp.up_proj", layer=1, m=3, n=8, rank=3),
)


def join(z: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([z[target.name] for target in LAYOUT])


def save(registry: Registry, name: str, value: float = 1.5) -> None:
    registry.save(name, {target.name: torch.full((3,), value) for target in LAYOUT}, base_digest=BASE)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "experts")
    for name in ("math", "code"):
        save(registry, name)
    registry.save_mixture("sums", Mixture.of({"math": 0.5}))
    return registry


@pytest.fixture
def follower(registry: Registry) -> Follower:
    return Follower(registry, BASE, LAYOUT, join)


def known(follower: Follower) -> tuple[set[str], set[str]]:
    return set(follower.snapshot.tensors), set(follower.snapshot.mixtures)


def test_a_registry_that_is_gone_for_a_while_changes_nothing(follower: Follower, tmp_path: Path) -> None:
    assert follower.sync()
    before = follower.snapshot
    (tmp_path / "experts").rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(ResourceError, match="cannot look into .*experts"):
            follower.sync()
    assert follower.snapshot is before
    (tmp_path / "away").rename(tmp_path / "experts")
    assert not follower.sync() and follower.snapshot is before


def test_a_registry_whose_disk_is_not_mounted_is_an_empty_folder_and_changes_nothing(
    follower: Follower, tmp_path: Path
) -> None:
    follower.sync()
    before = follower.snapshot
    (tmp_path / "experts").rename(tmp_path / "away")
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / ".keep").touch()
    for _ in range(2):
        with pytest.raises(ResourceError, match="gone at once; mount its disk again"):
            follower.sync()
    assert follower.snapshot is before
    shutil.rmtree(tmp_path / "experts")
    (tmp_path / "away").rename(tmp_path / "experts")
    assert not follower.sync() and follower.snapshot is before


def test_experts_that_were_deleted_to_the_last_are_gone(follower: Follower, registry: Registry, tmp_path: Path) -> None:
    follower.sync()
    for name in registry.names():
        registry.delete(name)
        assert follower.sync()
    assert known(follower) == (set(), {"sums"})
    registry.delete_mixture("sums")
    assert follower.sync() and known(follower) == (set(), set())
    assert not follower.sync()


def test_a_registry_that_was_emptied_by_hand_says_how_to_say_so(follower: Follower, tmp_path: Path) -> None:
    follower.sync()
    for path in (tmp_path / "experts").iterdir():
        shutil.rmtree(path)
    with pytest.raises(ResourceError, match=MARKER):
        follower.sync()
    (tmp_path / "experts" / MARKER).touch()
    assert follower.sync() and known(follower) == (set(), set())


def test_a_registry_that_was_never_there_is_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot look into"):
        Follower(Registry(tmp_path / "nowhere"), BASE, LAYOUT, join).sync()
    (tmp_path / "nowhere").mkdir()
    assert not Follower(Registry(tmp_path / "nowhere"), BASE, LAYOUT, join).sync()


class Refusing(fs.FileSystemHandler):  # type: ignore[misc]
    """A local file system in which some paths raise, for as long as they stand in `refused`."""

    def __init__(self) -> None:
        self.local = fs.LocalFileSystem()
        self.refused: dict[str, Exception] = {}

    def _check(self, path: str) -> None:
        for part, error in self.refused.items():
            if path.rstrip("/").endswith(part):
                raise error

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        for path in paths:
            self._check(path)
        return list(self.local.get_file_info(paths))

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        """A recursive listing fails as a whole, as that of the operating system does."""
        self._check(selector.base_dir)
        infos = self.local.get_file_info(selector)
        if selector.recursive:
            for info in infos:
                if info.type == fs.FileType.Directory:
                    self._check(info.path)
        return list(infos)

    def open_input_stream(self, path: str) -> Any:
        self._check(path)
        return self.local.open_input_stream(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.local, name)

    def get_type_name(self) -> str:
        return "refusing"

    def normalize_path(self, path: str) -> str:
        return path

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = None
    move = copy_file = open_input_file = open_output_stream = open_append_stream = None


@pytest.fixture
def refusing(registry: Registry, follower: Follower) -> Refusing:
    """The follower's registry, now behind a file system that can refuse."""
    handler = Refusing()
    follower.registry = Registry(registry.store.root)
    follower.registry.store = Store(registry.store.root, fs.PyFileSystem(handler))
    return handler


def test_a_foreign_folder_that_cannot_be_listed_is_told_of_and_nothing_else(
    follower: Follower, refusing: Refusing, tmp_path: Path
) -> None:
    (tmp_path / "experts" / "lost+found").mkdir()
    refusing.refused["lost+found"] = PermissionError(13, "Permission denied")
    assert follower.sync()
    assert known(follower) == ({"math", "code"}, {"sums"}) and not follower.snapshot.problems
    assert list(follower.snapshot.odd) == ["lost+found"] and "Permission denied" in follower.snapshot.odd["lost+found"]
    save(Registry(tmp_path / "experts"), "pick")
    assert follower.sync() and known(follower)[0] == {"math", "code", "pick"}
    assert not follower.sync()
    refusing.refused.clear()
    assert follower.sync() and not follower.snapshot.odd


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("math", PermissionError(13, "no")),
        ("math/v0002", TimeoutError("slow")),
        ("math/v0002/manifest.json", RuntimeError("of a kind of its own")),
        ("math/v0002/expert.safetensors", PermissionError(13, "no")),
    ],
)
def test_an_expert_that_cannot_be_read_just_now_is_served_as_it_was_and_read_later(
    path: str, error: Exception, follower: Follower, refusing: Refusing, tmp_path: Path
) -> None:
    assert follower.sync()
    before = follower.snapshot.tensors["math"]
    save(Registry(tmp_path / "experts"), "math", 1.75)
    refusing.refused[path] = error
    assert follower.sync() and not follower.sync()
    assert follower.snapshot.tensors["math"] is before and known(follower) == ({"math", "code"}, {"sums"})
    assert str(error) in "".join(follower.snapshot.odd.values()) and not follower.snapshot.problems
    refusing.refused.clear()
    assert follower.sync() and not follower.snapshot.odd
    assert float(follower.snapshot.tensors["math"][0]) == 1.75


def test_a_file_system_s_own_errors_are_a_registry_that_cannot_be_listed(
    follower: Follower, refusing: Refusing
) -> None:
    assert follower.sync()
    refusing.refused["experts"] = RuntimeError("of a kind of its own")
    with pytest.raises(ResourceError, match="of a kind of its own"):
        follower.sync()
    assert known(follower) == ({"math", "code"}, {"sums"})


def test_an_expert_that_could_never_be_read_is_a_problem_by_name(
    follower: Follower, refusing: Refusing, tmp_path: Path
) -> None:
    refusing.refused["math/v0001/manifest.json"] = PermissionError(13, "Permission denied")
    refusing.refused["sums.json"] = PermissionError(13, "Permission denied")
    assert follower.sync()
    assert known(follower) == ({"code"}, set())
    assert "Permission denied" in follower.snapshot.problems["math"]
    assert list(follower.snapshot.odd) == ["_mixtures/sums.json"]
    refusing.refused.clear()
    assert follower.sync() and known(follower) == ({"math", "code"}, {"sums"})
    assert not follower.snapshot.problems and not follower.snapshot.odd


@pytest.mark.parametrize("file", ["manifest.json", "expert.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_what_stands_in_the_place_of_a_file_harms_that_expert_alone(
    kind: str, file: str, follower: Follower, tmp_path: Path
) -> None:
    path = tmp_path / "experts" / "math" / "v0001" / file
    path.unlink()
    path.mkdir() if kind == "folder" else path.symlink_to(tmp_path / "nowhere")
    assert follower.sync()
    assert known(follower) == ({"code"}, {"sums"})
    if (file, kind) != ("manifest.json", "dangling link"):  # a version without a manifest is not finished
        assert "math" in follower.snapshot.problems["math"]


def test_a_damaged_expert_keeps_its_manifest_which_says_what_it_is_for(follower: Follower, tmp_path: Path) -> None:
    (tmp_path / "experts" / "math" / "v0001" / "expert.safetensors").write_bytes(b"\xff" * 99)
    assert follower.sync()
    assert "damaged" in follower.snapshot.problems["math"] and set(follower.snapshot.manifests) == {"math", "code"}


@pytest.mark.parametrize("name", ["Math", "math copy"])
def test_a_folder_whose_name_no_expert_can_have_is_told_of_and_left_out(
    name: str, follower: Follower, registry: Registry, tmp_path: Path
) -> None:
    shutil.copytree(tmp_path / "experts" / "math", tmp_path / "experts" / name)
    assert follower.sync()
    assert known(follower)[0] == {"math", "code"} and set(follower.snapshot.manifests) == {"math", "code"}
    assert not follower.snapshot.problems and "cannot name an expert" in follower.snapshot.odd[name]
    assert registry.names() == ("code", "math") and len(registry.list()) == 2
    shutil.rmtree(tmp_path / "experts" / name)
    assert follower.sync() and not follower.snapshot.odd


def test_a_damaged_mixture_is_no_problem_of_an_expert_of_its_name(follower: Follower, registry: Registry) -> None:
    registry.store.write_text("_mixtures/math.json", "{}")
    registry.store.write_text("_mixtures/Not a name.json", "{}")
    assert follower.sync()
    assert known(follower) == ({"math", "code"}, {"sums"}) and not follower.snapshot.problems
    assert set(follower.snapshot.odd) == {"_mixtures/math.json", "_mixtures/Not a name.json"}


def test_numbers_far_too_large_are_a_problem(follower: Follower, registry: Registry) -> None:
    save(registry, "huge", 2e3)
    assert follower.sync()
    assert "|z| is at most 1000" in follower.snapshot.problems["huge"]


def test_a_link_to_a_folder_above_itself_is_not_followed_for_ever(follower: Follower, tmp_path: Path) -> None:
    (tmp_path / "experts" / "again").symlink_to(tmp_path / "experts")
    assert follower.sync() and known(follower) == ({"math", "code"}, {"sums"})
