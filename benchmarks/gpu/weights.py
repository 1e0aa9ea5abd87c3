"""A model of some shape with random weights and factors, written in a minute: speed depends on shapes alone.

The factors are no decomposition of the weights, which would take an hour; every layer's files are links to the first
one's, so that they take the disk of one layer.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.core.shape import BenchShape, write_tokenizer
from t2ray.adapters.factors import MANIFEST, Factors, Manifest, Target
from t2ray.models.weights import open_weights

LLAMA_8B = BenchShape(layers=32, width=4096, inner=14_336, heads=32, vocabulary=32_000, rows=64, prompt=256, new=128)
DTYPE = torch.bfloat16


def write(shape: BenchShape, folder: Path) -> tuple[Path, Factors]:
    """The folder of the model, in bfloat16, and its factors."""
    model, factors = folder / "model", folder / "factors"
    model.mkdir(parents=True)
    factors.mkdir()
    draw = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary + 1, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16", eos_token_id=shape.vocabulary,
        bos_token_id=None, pad_token_id=0, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(model)
    write_tokenizer(shape, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": shape.vocabulary}))
    files: dict[str, str] = {}
    targets: list[Target] = []
    for layer in range(shape.layers):
        matrices = {name: torch.randn(size, generator=draw).mul_(0.02).to(DTYPE) for name, size in _matrices(shape)}
        norms = {name: torch.ones(shape.width, dtype=DTYPE) for name in ("input_layernorm", "post_attention_layernorm")}
        tensors = {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in (matrices | norms).items()}
        files |= _save(tensors, model / f"model-{layer:03}.safetensors")
        for name, (m, n) in _matrices(shape):
            target = Target(name=f"model.layers.{layer}.{name}", layer=layer, m=m, n=n, rank=min(m, n))
            targets.append(target)
            _factors(target, factors, f"model.layers.0.{name}", draw)
    ends = {
        "model.embed_tokens.weight": torch.randn(shape.vocabulary + 1, shape.width, generator=draw)
        .mul_(0.02)
        .to(DTYPE),
        "lm_head.weight": torch.randn(shape.vocabulary + 1, shape.width, generator=draw).mul_(0.02).to(DTYPE),
        "model.norm.weight": torch.ones(shape.width, dtype=DTYPE),
    }
    files |= _save(ends, model / "model-ends.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    manifest = Manifest(
        base_digest=open_weights(model).digest, svd_dtype="float32", dtype="bfloat16", targets=tuple(targets),
        model=str(model), errors={target.name: (0.0, 0.0) for target in targets},
    )  # fmt: skip
    (factors / MANIFEST).write_text(manifest.model_dump_json())
    return model, Factors.open(factors)


def _matrices(shape: BenchShape) -> list[tuple[str, tuple[int, int]]]:
    return list(shape.matrices().items())


def _save(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, str]:
    save_file(tensors, path, {"format": "pt"})
    return dict.fromkeys(tensors, path.name)


def _factors(target: Target, folder: Path, first: str, draw: torch.Generator) -> None:
    path = folder / f"{target.name}.safetensors"
    if target.name != first:
        os.link(folder / f"{first}.safetensors", path)
        return
    scale = target.rank**-0.5
    tensors = {
        "U": torch.randn(target.m, target.rank, generator=draw).mul_(scale).to(DTYPE),
        "s": torch.rand(target.rank, generator=draw),
        "Vh": torch.randn(target.rank, target.n, generator=draw).mul_(scale).to(DTYPE),
    }
    save_file(tensors, path, {"errors": "[0.0, 0.0]"})
