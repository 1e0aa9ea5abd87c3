"""A memory plan counts what the code stores: against models that are loaded, and the published sizes of two Llamas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small import rollout
from torch.autograd.graph import saved_tensors_hooks

from t2ray.adapters.factors import decompose
from t2ray.adapters.model import load_model
from t2ray.cli.main import main
from t2ray.core import ConfigError, ModelError, ResourceError
from t2ray.engine.batches import MAX_ROWS
from t2ray.engine.cache import roomy_cache
from t2ray.models.weights import Weights
from t2ray.runs.memory import GIB, GpuMemory, least_gpus, serving, shape_of, training
from t2ray.training.loss import backward

ROOT = Path(__file__).parents[1]
LLAMA_8B, LLAMA_70B = (str(ROOT / "docs" / "configs" / f"llama-3-{size}.json") for size in ("8b", "70b"))


def whole(loads: list[GpuMemory], name: str) -> int:
    return int(sum(getattr(load, name) for load in loads))


def plan_70b(gpus: int, layers: str | None = None) -> list[GpuMemory]:
    return training(shape_of(LLAMA_70B, layers=layers), gpus, micro_batch=8, tokens=1024, rows=128)


def test_the_published_sizes_come_out_of_config_json_alone() -> None:
    small, large = shape_of(LLAMA_8B), shape_of(LLAMA_70B)
    assert (small.parameters, large.parameters) == (8_030_261_248, 70_553_706_496)
    # a layer's seven ranks: q, o: 4096, k, v: 1024, gate, up, down: 4096
    assert small.K == 32 * (2 * 4096 + 2 * 1024 + 3 * 4096)
    loads = serving(small, 1, kv_tokens=1000, rows=1, experts=1)
    assert whole(loads, "weights") == 2 * small.parameters
    assert whole(loads, "kv") == 1000 * 32 * 2 * 8 * 128 * 2  # layers, k and v, heads, width, bytes
    assert whole(loads, "factors") == 2 * 32 * (2 * 8192 * 4096 + 2 * 5120 * 1024 + 3 * (4096 + 14336) * 4096)


def test_a_plan_from_config_json_is_that_of_the_model_itself(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    shape = shape_of(str(tmp_path))
    weights = Weights(tiny_llama)
    assert shape.parameters == sum(torch.Size(s).numel() for s in weights.shapes.values())
    factors = decompose(str(tiny_llama), tmp_path / "factors")
    model = load_model(str(tiny_llama), tmp_path / "factors", device="cpu")
    assert (shape.K, list(shape.targets)) == (factors.K, list(factors.layout))
    (load,) = training(shape, 1, micro_batch=2, tokens=20, rows=3)
    assert load.factors == sum(t.nbytes for layer in model.adapter.layers for t in (layer.U_Mr, layer.Vh_rN))
    assert load.folded == sum(layer.weight.nbytes for layer in model.adapter.layers)
    cache = roomy_cache(model.hf.config, 20)
    model.hf(input_ids=torch.full((3, 20), 9), past_key_values=cache)
    assert load.kv == sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("layers", [None, "1"])
def test_the_activations_are_what_a_gradient_keeps(layers: str | None, tiny_llama: Path, tmp_path: Path) -> None:
    decompose(str(tiny_llama), tmp_path / "factors", layers=layers)
    model = load_model(str(tiny_llama), tmp_path / "factors", device="cpu")
    z_1K = torch.ones(1, model.adapter.size, requires_grad=True)
    z_1K.grad = torch.zeros_like(z_1K)
    parameters = {p.data_ptr() for p in (*model.hf.parameters(), *model.hf.buffers(), z_1K)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = [rollout(range(5, 45), range(5, 105)) for _ in range(4)]
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        backward(model, z_1K, batch, [1.0] * 4, lam=0.1, temperature=1.0, batch=4)
    (load,) = training(shape_of(str(tiny_llama), layers=layers), 1, micro_batch=4, tokens=140, rows=4)
    logits = 4 * 100 * model.hf.config.vocab_size * 4
    measured = sum(kept.values())
    assert load.activations * 0.75 < measured < load.activations * 1.25 + 6 * logits


def test_layers_are_spread_and_nothing_is_lost() -> None:
    alone = plan_70b(1)
    for gpus in (2, 3, 7, 80):
        loads = plan_70b(gpus)
        assert len(loads) == gpus
        for name in ("weights", "factors", "folded", "activations", "kv"):
            assert whole(loads, name) == whole(alone, name)
        if gpus <= 7:
            assert max(load.total for load in loads) < 1.15 * sum(load.total for load in loads) / gpus


def test_half_of_the_layers_take_less_and_more_than_there_is_is_refused() -> None:
    memory = 80 * GIB
    every = least_gpus(plan_70b, memory, "training")
    half = least_gpus(lambda gpus: plan_70b(gpus, "40-79"), memory, "training")
    assert half < every
    with pytest.raises(ResourceError, match="training does not fit on 64 GPUs of 1 GiB: the fullest would hold"):
        least_gpus(plan_70b, GIB, "training")
    with pytest.raises(ConfigError, match="gpus is 81; a model of 80 layers spreads over 1 to 80"):
        plan_70b(81)


def test_the_command_prints_both_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "plan.json"
    assert main(["plan", LLAMA_8B, "--micro-batch", "4", "--json", str(report)]) == 0
    said = capsys.readouterr().out
    assert "8,030,261,248 parameters in 32 layers; 224 matrices with 720,896 singular values" in said
    assert "training fits on 1 GPU of 80 GiB" in said and "serving fits on 1 GPU" in said
    figures = json.loads(report.read_text())
    assert figures["bytes"]["training"][0]["weights"] == 2 * figures["parameters"]
    assert main(["plan", LLAMA_70B, "--gpus", "2"]) == 0
    assert "training does not fit on 2 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/config.json"], "no configuration of a model that transformers knows"),
        ([LLAMA_8B, "--layers", "40"], "layers '40': the model has no targets in layer 40"),
        ([LLAMA_8B, "--targets", "*.nope"], "matches no matrix"),
        ([LLAMA_8B, "--tokens", "0"], "--tokens is 0; it must be at least 1"),
        ([LLAMA_8B, "--gpu-memory", "0"], "--gpu-memory is 0"),
        ([LLAMA_8B, "--json", "no/such/plan.json"], "there is no folder"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_configuration_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ModelError, match="no-such-model"):
        shape_of(str(tmp_path))


def test_domains_on_one_model_add_their_z_and_the_rows_that_one_batch_takes() -> None:
    shape = shape_of(LLAMA_8B)
    (one,), (two,), (many,) = (
        training(shape, 1, micro_batch=2, tokens=200, rows=200, domains=domains) for domains in (1, 2, 9)
    )
    assert (two.weights, two.factors, two.activations) == (one.weights, one.factors, one.activations)
    assert two.kv == 2 * one.kv and many.kv == one.kv * MAX_ROWS // 200  # more rows are another batch
    assert many.z == 9 * one.z
    long = [training(shape, 1, micro_batch=2, tokens=1024, rows=128, domains=n)[0].kv for n in (1, 2)]
    assert long[0] == long[1]  # 131,072 tokens fill a batch
