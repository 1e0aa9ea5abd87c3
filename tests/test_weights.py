"""Reading a model folder: one tensor at a time, one digest whatever the sharding, one line for each broken folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import needs
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from t2ray.core import ModelError
from t2ray.models.load import load_chat
from t2ray.models.weights import INDEX, Weights, open_weights, resolve
from t2ray.runs.memory import shape_of


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


@pytest.fixture
def as_gguf(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny Llama as a GGUF file whose matrices are whole; what is made of it stands below `tmp_path`/cache."""
    gguf = needs.extra("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "quantised").mkdir()
    path = tmp_path / "quantised" / "llama.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(config["vocab_size"])))
    writer.add_token_scores([0.0] * config["vocab_size"])
    special = set(tokenizer.all_special_ids)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if i in special else kinds.NORMAL for i in range(config["vocab_size"])])
    writer.add_token_merges([])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    weights = Weights(tiny_llama)
    for name in weights.shapes:
        tensor = weights.read(name)
        for part, heads in ("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads"):
            if part in name:  # llama.cpp turns pairs of neighbours, transformers the two halves of a head
                tensor = tensor.unflatten(0, (config[heads], 2, -1)).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_dequantised_once_and_has_the_models_weights(
    as_gguf: Path, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = resolve(str(as_gguf))
    assert f"{as_gguf} is quantised; its dequantised weights (bfloat16) go to {folder}" in capfd.readouterr().err
    made, plain = Weights(folder), Weights(tiny_llama)
    assert made.shapes.keys() == plain.shapes.keys()
    assert all(torch.equal(made.read(name), plain.read(name).bfloat16()) for name in plain.shapes)
    assert load_chat(folder)[0].ids("17+25") == load_chat(tiny_llama)[0].ids("17+25")
    before = folder.stat().st_mtime_ns
    assert resolve(str(as_gguf.parent)) == folder and folder.stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert [target.name for target in shape_of(str(as_gguf)).targets] == [
        target.name for target in shape_of(str(tiny_llama)).targets
    ]


def test_a_gguf_file_that_cannot_be_read_leaves_nothing(as_gguf: Path, tmp_path: Path) -> None:
    as_gguf.write_bytes(as_gguf.read_bytes()[:1000])
    with pytest.raises(
        ModelError, match=r"llama\.gguf: transformers cannot read this GGUF file: .*before quantisation"
    ):
        resolve(str(as_gguf))
    assert not list((tmp_path / "cache" / "t2ray" / "gguf").iterdir())
    (as_gguf.parent / "other.gguf").touch()
    with pytest.raises(ModelError, match=r"has 2 GGUF files; name one of them, such as .*llama\.gguf"):
        resolve(str(as_gguf.parent))
