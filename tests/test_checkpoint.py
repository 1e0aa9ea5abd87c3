"""Checkpoints: whole or absent, the two newest kept, damaged ones left out, another configuration's refused; AdamW goes
on bit for bit.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from pyarrow import fs
from safetensors.torch import save_file

from t2ray.core import ResourceError, RunError
from t2ray.store import Store
from t2ray.training.checkpoint import FOLDER, Checkpoint, Progress, latest, moments, restore_moments

K = 500


def checkpoint(step: int) -> Checkpoint:
    tensors = {name: torch.full((K,), float(step)) for name in ("p_K", "best_z_K", "exp_avg", "exp_avg_sq")}
    return Checkpoint(progress=Progress(step=step, best_step=1, best_accuracy=0.1 + step / 3), tensors=tensors)


@pytest.fixture(params=["local", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path) if request.param == "local" else Store("bucket/run", fs._MockFileSystem())


@contextmanager
def full_disk(size: int = 1000) -> Iterator[None]:
    """No file may grow beyond `size` bytes; Python ignores the signal, so that writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_is_read_as_it_was_written(store: Store) -> None:
    assert latest(store, "abc") is None
    checkpoint(7).save(store, "abc")
    read = latest(store, "abc")
    assert read is not None and read.progress == checkpoint(7).progress
    assert {name: tensor.tolist() for name, tensor in read.tensors.items()} == {
        name: tensor.tolist() for name, tensor in checkpoint(7).tensors.items()
    }


def test_the_newest_counts_and_the_two_newest_are_kept(store: Store) -> None:
    for step in (2, 4, 900, 1000, 123456):
        checkpoint(step).save(store, "abc")
    assert store.names(FOLDER) == ["step_001000.safetensors", "step_123456.safetensors"]
    read = latest(store, "abc")
    assert read is not None and read.progress.step == 123456


def test_another_configurations_checkpoint_is_refused(store: Store) -> None:
    checkpoint(7).save(store, "abc")
    with pytest.raises(RunError, match="step_000007.safetensors belongs to another configuration"):
        latest(store, "abd")


def flip(path: Path) -> None:
    """Changes the lowest bit of the last byte, which is a tensor's."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def spoil(path: Path, how: str) -> None:
    if how == "a folder":
        path.unlink()
        (path / "inner").mkdir(parents=True)
    elif how == "not finite":  # as an earlier version wrote it, without a digest
        tensors = dict(checkpoint(4).tensors, p_K=torch.full((K,), float("nan")))
        save_file(tensors, path, {"progress": json.dumps(asdict(Progress(step=4))), "config": "abc"})
    elif how == "another step's":
        shutil.copy(path.with_name("step_000002.safetensors"), path)
    elif how == "flipped":
        flip(path)
    elif how == "its configuration flipped":
        path.write_bytes(path.read_bytes().replace(b'"config":"abc"', b'"config":"abd"'))
    else:
        path.write_bytes(path.read_bytes()[: 0 if how == "empty" else -100])


DAMAGES = ["cut", "empty", "flipped", "its configuration flipped", "not finite", "a folder", "another step's"]


@pytest.mark.parametrize("how", DAMAGES)
def test_of_a_damaged_newest_checkpoint_the_one_before_is_taken(how: str, tmp_path: Path) -> None:
    store, told = Store(tmp_path), list[str]()
    for step in (2, 4):
        checkpoint(step).save(store, "abc")
    spoil(tmp_path / FOLDER / "step_000004.safetensors", how)
    read = latest(store, "abc", told.append)
    assert read is not None and read.progress == checkpoint(2).progress
    (line,) = told
    assert line.startswith("checkpoints/step_000004.safetensors is damaged: ")
    checkpoint(4).save(store, "abc")  # the run comes to that step again
    read = latest(store, "abc")
    assert read is not None and read.progress.step == 4


def test_where_no_checkpoint_is_sound_there_is_none(store: Store) -> None:
    store.write_bytes(f"{FOLDER}/step_000002.safetensors", b"")
    told: list[str] = []
    assert latest(store, "abc", told.append) is None and len(told) == 1


def test_other_files_in_the_folder_are_neither_read_nor_deleted(store: Store) -> None:
    others = ["step_000009.safetensors.orig", "step_9.safetensors", "step_0000009.safetensors", "zzz", "a.safetensors"]
    for name in others:
        store.write_bytes(f"{FOLDER}/{name}", b"mine")
    for step in (2, 4, 6):
        checkpoint(step).save(store, "abc")
    assert set(store.names(FOLDER)) == {*others, "step_000004.safetensors", "step_000006.safetensors"}
    read = latest(store, "abc")
    assert read is not None and read.progress.step == 6


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It has no digest."""
    (tmp_path / FOLDER).mkdir()
    metadata = {"progress": json.dumps(asdict(checkpoint(4).progress)), "config": "abc"}
    save_file(checkpoint(4).tensors, tmp_path / FOLDER / "step_000004.safetensors", metadata)
    read = latest(Store(tmp_path), "abc")
    assert read is not None and read.progress == checkpoint(4).progress


def test_what_is_not_finite_is_not_written(store: Store) -> None:
    checkpoint(2).save(store, "abc")
    broken = replace(checkpoint(4), tensors=checkpoint(4).tensors | {"exp_avg_sq": torch.full((K,), float("inf"))})
    with pytest.raises(RunError, match="step 4: exp_avg_sq is not finite"):
        broken.save(store, "abc")
    assert store.names(FOLDER) == ["step_000002.safetensors"]


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path: Path) -> None:
    store = Store(tmp_path)
    checkpoint(2).save(store, "abc")
    (tmp_path / FOLDER / ".step_000004.safetensors.0123.tmp").write_bytes(b"half")
    read = latest(store, "abc")
    assert read is not None and read.progress.step == 2


def test_on_a_full_disk_the_checkpoints_before_survive(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (2, 4):
        checkpoint(step).save(store, "abc")
    with full_disk(), pytest.raises(ResourceError, match="free some space"):
        checkpoint(6).save(store, "abc")
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == [
        "step_000002.safetensors",
        "step_000004.safetensors",
    ]
    read = latest(store, "abc")
    assert read is not None and read.tensors["p_K"].tolist() == [4.0] * K


def test_a_restored_optimiser_goes_on_bit_for_bit() -> None:
    gradients = torch.randn(6, K, generator=torch.Generator().manual_seed(0))

    def steps(p_K: torch.Tensor, optimiser: torch.optim.AdamW, rows: torch.Tensor) -> None:
        for row in rows:
            p_K.grad = row.clone()
            optimiser.step()

    def fresh(values: torch.Tensor) -> tuple[torch.Tensor, torch.optim.AdamW]:
        p_K = values.clone().requires_grad_()
        return p_K, torch.optim.AdamW([p_K], lr=0.1, weight_decay=0.0)

    whole, whole_optimiser = fresh(torch.ones(K))
    steps(whole, whole_optimiser, gradients)
    first, first_optimiser = fresh(torch.ones(K))
    steps(first, first_optimiser, gradients[:4])
    saved: Mapping[str, torch.Tensor] = {
        name: tensor.clone() for name, tensor in moments(first_optimiser, first).items()
    }
    second, second_optimiser = fresh(first.detach())
    restore_moments(second_optimiser, second, dict(saved), 4)
    steps(second, second_optimiser, gradients[4:])
    assert torch.equal(second, whole)


def test_before_the_first_step_the_moments_are_zero() -> None:
    p_K = torch.ones(3, requires_grad=True)
    optimiser = torch.optim.AdamW([p_K])
    assert all(torch.equal(tensor, torch.zeros(3)) for tensor in moments(optimiser, p_K).values())
