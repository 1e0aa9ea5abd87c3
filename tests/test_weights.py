"""Reading a model folder: one tensor at a time, one digest whatever the sharding, one line for each broken folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from t2ray.core import ModelError
from t2ray.models.weights import INDEX, Weights, open_weights, resolve


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(300, 100, generator=generator),  # more than 16 samples of 4 KiB
        "model.layers.0.mlp.up_proj.weight": torch.randn(8, 4, generator=generator).bfloat16(),
        "model.norm.weight": torch.ones(4),
    }


def save(folder: Path, *shards: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
        return folder
    names = [f"model-{i}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name)
    where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


def test_every_tensor_is_read_as_it_was_saved(tmp_path: Path) -> None:
    weights = Weights(save(tmp_path / "m", tensors()))
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in tensors().items()}
    for name, tensor in tensors().items():
        assert weights.read(name).dtype == tensor.dtype
        assert torch.equal(weights.read(name), tensor)


def test_digest_does_not_depend_on_sharding(tmp_path: Path) -> None:
    whole = tensors()
    shards = [{name: tensor} for name, tensor in whole.items()]
    assert Weights(save(tmp_path / "one", whole)).digest == Weights(save(tmp_path / "many", *shards)).digest


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype"])
def test_digest_depends_on(change: str, tmp_path: Path) -> None:
    other = tensors()
    if change == "value":
        other["model.norm.weight"] = other["model.norm.weight"] * 2
    elif change == "name":
        other["model.last_norm.weight"] = other.pop("model.norm.weight")
    elif change == "shape":
        other["model.norm.weight"] = other["model.norm.weight"][None]
    else:
        other["model.norm.weight"] = torch.ones(4).view(torch.int32)
    assert Weights(save(tmp_path / "a", tensors())).digest != Weights(save(tmp_path / "b", other)).digest


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        Weights(tmp_path)


@pytest.mark.parametrize("keep", [4, 60, 0.5, -1])
def test_truncated_shard_is_refused_by_name(keep: float, tmp_path: Path) -> None:
    shard = save(tmp_path / "m", tensors()) / "model.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    with pytest.raises(ModelError, match=r"model\.safetensors is (truncated|not a safetensors file)"):
        Weights(tmp_path / "m")


def test_bytes_that_are_no_header_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((9).to_bytes(8, "little") + b'{"a": [1]' + b"x" * 50)
    with pytest.raises(ModelError, match="header is malformed"):
        Weights(tmp_path)


def test_index_that_names_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", *({name: tensor} for name, tensor in tensors().items()))
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"'model-1\.safetensors', which is not in the folder"):
        Weights(folder)


def test_malformed_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(ModelError, match="not a safetensors index"):
        Weights(tmp_path)


def test_references_resolve_to_folders(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("tiny").name == "model"


@pytest.mark.parametrize("ref", ["nobody/no-such-model", "no such model", "./missing", "/missing/folder", "a/b/c"])
def test_missing_model_says_how_to_use_a_local_folder(ref: str) -> None:
    with pytest.raises(ModelError, match="folder") as caught:
        resolve(ref)
    assert ref in str(caught.value) and "\n" not in str(caught.value)


def test_weights_are_opened_once_until_a_file_changes(tmp_path: Path) -> None:
    write = partial(save_file, filename=tmp_path / "model.safetensors")
    write({"a.weight": torch.zeros(2, 3)})
    first = open_weights(tmp_path)
    assert open_weights(str(tmp_path)) is first
    write({"a.weight": torch.ones(2, 3), "b.weight": torch.ones(1)})
    again = open_weights(tmp_path)
    assert again is not first and again.digest != first.digest and list(again.shapes) == ["a.weight", "b.weight"]


def test_a_folder_of_gguf_files_is_told_how_to_be_dequantised(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"quantised; dequantise them once .*gguf_file='model-q4.gguf'"):
        Weights(tmp_path)
