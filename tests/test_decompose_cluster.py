"""Decomposition over Ray tasks: the same files as in one process, and errors that keep their type."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from t2ray.adapters.factors import decompose
from t2ray.cluster.train.decompose import decompose_on_ray
from t2ray.core import ModelError

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def make(folder: Path, last: float = 1.0) -> str:
    generator = torch.Generator().manual_seed(0)
    named = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(24, 16, generator=generator) for i in range(6)}
    named["model.layers.5.mlp.up_proj.weight"][0, 0] = last
    folder.mkdir()
    save_file(named, folder / "model.safetensors")
    LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=4, vocab_size=50
    ).save_pretrained(folder)
    return str(folder)


def test_the_files_are_those_of_one_process(tmp_path: Path) -> None:
    model, seen = make(tmp_path / "model"), []
    decompose(model, tmp_path / "one", targets=["*.up_proj"])
    factors = decompose_on_ray(
        model, tmp_path / "ray", workers=2, targets=["*.up_proj"], progress=lambda *step: seen.append(step[:2])
    )
    assert seen == [(done, 6) for done in range(1, 7)]
    assert [target.layer for target in factors.layout] == list(range(6))
    for path in sorted((tmp_path / "one").glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(load_file(tmp_path / "ray" / path.name)[name], tensor, atol=1e-5, rtol=0)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "ray").iterdir()}
    decompose_on_ray(model, tmp_path / "ray", workers=2, targets=["*.up_proj"])
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "ray").iterdir()}


def test_an_error_keeps_its_type_and_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.layers\.5\.mlp\.up_proj holds values") as caught:
        decompose_on_ray(make(tmp_path / "model", float("inf")), tmp_path / "f", workers=2, targets=["*.up_proj"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "f" / "manifest.json").exists()
