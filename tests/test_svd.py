"""Decomposition: the factors reproduce the weights, a folder is finished or resumes, and other folders are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import needs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from t2ray.adapters import factors as svd
from t2ray.adapters.factors import Factors, Target, decompose, decompose_matrix, select_targets
from t2ray.adapters.spectrum import variance
from t2ray.core import ConfigError, ModelError
from t2ray.models.checkpoint import open_checkpoint
from t2ray.models.targets import adapted, parse_layers
from t2ray.models.weights import Weights, open_weights

KINDS = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (40, 16),
    "mlp.up_proj": (40, 16),
    "mlp.down_proj": (16, 40),
}


def tensors(dtype: torch.dtype = torch.float32, layers: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    named = {"model.embed_tokens.weight": random(50, 16), "lm_head.weight": random(50, 16)}
    for layer in range(layers):
        for kind, shape in KINDS.items():
            named[f"model.layers.{layer}.{kind}.weight"] = random(*shape)
        named[f"model.layers.{layer}.input_layernorm.weight"] = random(16)
        named[f"model.layers.{layer}.self_attn.q_proj.bias"] = random(16)
    return named


def config(layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip


def llama(layers: int = 2) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(config(layers))


def make(folder: Path, named: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    save_file(named, folder / "model.safetensors")
    config().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return make(tmp_path / "model", tensors())


# ------------------------------------------------------------------------------------------------------------- targets


def test_default_targets_are_the_projections_in_the_order_of_the_model() -> None:
    chosen = select_targets(llama(layers=11))
    assert [target.name for target in chosen.targets] == [
        f"model.layers.{layer}.{kind}" for layer in range(11) for kind in KINDS
    ]
    assert (chosen.share, chosen.left_out) == (1.0, ())


def test_a_target_has_layer_shape_and_rank() -> None:
    (down,) = select_targets(llama(4), ["*.3.mlp.down_proj"]).targets
    assert down == Target(name="model.layers.3.mlp.down_proj", layer=3, m=16, n=40, rank=16)
    assert down.parameter == "model.layers.3.mlp.down_proj.weight"


def test_embeddings_head_and_norms_are_never_targets() -> None:
    assert select_targets(llama(), ["*"]) == select_targets(llama())


def test_what_is_left_out_is_told_with_its_share() -> None:
    chosen = select_targets(llama(), ["*.q_proj", "*.down_proj"], "0")
    assert set(chosen.left_out) == set(KINDS)  # in one layer or in both
    sizes = {kind: m * n for kind, (m, n) in KINDS.items()}
    share = (sizes["self_attn.q_proj"] + sizes["mlp.down_proj"]) / (2 * sum(sizes.values()))
    assert chosen.share == pytest.approx(share)
    assert adapted(0.11, ["mlp.experts.down_proj"], ()) == (
        "adapted: 11 % of the decoder layers' weights; left out: mlp.experts.down_proj (choose by targets and layers)"
    )
    assert adapted(1.0, [], ()) == "adapted: 100 % of the decoder layers' weights"


def test_patterns_and_layers_choose_together() -> None:
    chosen = select_targets(llama(4), ["*.mlp.*", "*.q_proj.weight"], "0,2-3").targets
    assert {target.layer for target in chosen} == {0, 2, 3}
    assert [target.name.rpartition(".")[2] for target in chosen[:4]] == ["q_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(chosen) == 12


@pytest.mark.parametrize(
    ("patterns", "layers", "says"),
    [
        (["*.mlp.*", "*.moe.*"], None, r"'\*\.moe\.\*' matches no matrix.*'model\.layers\.0\.self_attn\.q_proj'"),
        (["lm_head"], None, "'lm_head' matches no matrix"),
        (None, "0-2", "no targets in layer 2.*layers 0 to 1"),
        (None, "first", "'first' is neither a number nor a range"),
        (None, "3-1", "'3-1' is neither"),
        (None, "", "'' is neither"),
    ],
)
def test_what_matches_nothing_is_refused_with_examples(
    patterns: list[str] | None, layers: str | None, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        select_targets(llama(), patterns, layers)


def test_layer_ranges_are_inclusive() -> None:
    assert parse_layers("0-3, 8") == {0, 1, 2, 3, 8}


# -------------------------------------------------------------------------------------------------------------- matrix


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 24), n=st.integers(1, 24), rank=st.integers(0, 24), seed=st.integers(0, 99))
def test_factors_reproduce_any_matrix(m: int, n: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)  # rank 0: all zero
    u, s, vh, error = decompose_matrix(w, torch.float64)
    eye = torch.eye(min(m, n), dtype=torch.float64)
    torch.testing.assert_close((u * s) @ vh, w.double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(u.T @ u, eye)
    torch.testing.assert_close(vh @ vh.T, eye)
    assert (s >= 0).all() and (s[:-1] >= s[1:]).all()
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    assert error < 1e-12


def test_error_is_the_relative_frobenius_distance() -> None:
    w = torch.randn(1100, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # more than one block
    u, s, vh, _ = decompose_matrix(w, torch.float64)
    s = s.clone()
    s[-1] = 0  # Eckart-Young: what is missing is the last singular value
    missing = torch.linalg.svdvals(w)[-1]
    assert svd.relative_error(w, u, s, vh) == pytest.approx(float(missing / torch.linalg.matrix_norm(w)))


# -------------------------------------------------------------------------------------------------------------- folder


def test_factors_reproduce_the_model(model: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    decompose(model, tmp_path / "f", progress=lambda *step: seen.append(step))
    weights, factors = Weights(model), Factors.open(tmp_path / "f")
    assert [done for done, _, _ in seen] == list(range(1, 15)) and seen[-1][1:] == (14, factors.layout[-1].name)
    assert factors.base_digest == weights.digest
    assert factors.K == 2 * (16 + 8 + 8 + 16 + 16 + 16 + 16)
    for target in factors.layout:
        u, s, vh = factors.load(target.name)
        assert (u.shape, s.shape, vh.shape) == ((target.m, target.rank), (target.rank,), (target.rank, target.n))
        torch.testing.assert_close((u * s) @ vh, weights.read(f"{target.name}.weight"), atol=1e-5, rtol=0)
        assert max(factors.manifest.errors[target.name]) < 1e-5


def test_stored_dtype_is_the_models_and_only_its_own_error_is_refused(tmp_path: Path) -> None:
    model = make(tmp_path / "model", tensors(torch.bfloat16))
    factors = decompose(model, tmp_path / "f")
    u, s, vh = factors.load(factors.layout[0].name)
    assert (u.dtype, s.dtype, vh.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    for computed, stored in factors.manifest.errors.values():
        assert computed < 1e-5 < stored < 1e-2
    wide = decompose(model, tmp_path / "wide", svd_dtype="float64", dtype="float64")
    assert all(max(errors) < 1e-13 for errors in wide.manifest.errors.values())
    assert wide.load(wide.layout[0].name)[1].dtype == torch.float64


def test_equal_models_have_equal_files(model: str, tmp_path: Path) -> None:
    for out in "fg":
        decompose(model, tmp_path / out)
    files = sorted(path.name for path in (tmp_path / "f").iterdir())
    assert len(files) == 14 + 2
    assert all((tmp_path / "f" / name).read_bytes() == (tmp_path / "g" / name).read_bytes() for name in files)


def test_a_run_that_was_cut_off_resumes_and_a_finished_one_is_left_alone(model: str, tmp_path: Path) -> None:
    out, names = tmp_path / "f", []

    def interrupt(done: int, total: int, name: str) -> None:
        names.append(name)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decompose(model, out, progress=interrupt)
    with pytest.raises(ModelError, match="no finished factors"):
        Factors.open(out)
    finished = {name: (out / f"{name}.safetensors").stat().st_mtime_ns for name in names}
    decompose(model, out, progress=lambda done, total, name: names.append(name))
    assert len(names) == len(set(names)) == 14
    assert finished == {name: (out / f"{name}.safetensors").stat().st_mtime_ns for name in finished}
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    decompose(model, out, progress=lambda done, total, name: names.append(name))
    assert len(names) == 14
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "bfloat16"}, r"dtype \(there 'float32', asked 'bfloat16'\)"),
        ({"svd_dtype": "float64"}, "svd_dtype"),
        ({"targets": ["*.mlp.*"]}, r"targets \(there 14 matrices, asked 6 matrices\)"),
        ({"layers": "1"}, "targets"),
    ],
)
def test_a_folder_made_otherwise_is_refused_with_what_differs(
    change: dict[str, object], says: str, model: str, tmp_path: Path
) -> None:
    decompose(model, tmp_path / "f")
    with pytest.raises(ConfigError, match=says):
        decompose(model, tmp_path / "f", **change)  # type: ignore[arg-type]


def test_a_folder_of_another_model_is_refused(model: str, tmp_path: Path) -> None:
    decompose(model, tmp_path / "f")
    other = make(tmp_path / "other", tensors(seed=1))
    with pytest.raises(ConfigError, match="base_digest"):
        decompose(other, tmp_path / "f")
    with pytest.raises(ModelError, match=f"{Weights(model).digest}.*{Weights(other).digest}"):
        Factors.open(tmp_path / "f", Weights(other).digest)


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(model: str) -> None:
    before = sorted(Path(model).iterdir())
    with pytest.raises(ConfigError, match="no factors"):
        decompose(model, model)
    assert sorted(Path(model).iterdir()) == before
    with pytest.raises(ConfigError, match="file system"):
        decompose(model, "s3://bucket/factors")


def test_a_folder_with_a_foreign_plan_is_refused(model: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"schema_version": 2}))
    with pytest.raises(ConfigError, match=r"plan\.json is not a plan"):
        decompose(model, tmp_path)


def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    named = tensors()
    named["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj holds values that are not finite"):
        decompose(make(tmp_path / "model", named), tmp_path / "f")


def test_weights_of_another_shape_than_the_configuration_says_are_refused_before_anything_is_computed(
    tmp_path: Path,
) -> None:
    named = tensors() | {"model.layers.1.mlp.up_proj.weight": torch.zeros(8, 16)}
    with pytest.raises(ModelError, match=r"up_proj has the shape \(8, 16\), and its config.json says \(40, 16\)"):
        decompose(make(tmp_path / "model", named), tmp_path / "f")
    del named["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"no weight for model\.layers\.1\.mlp\.up_proj of LlamaForCausalLM"):
        decompose(make(tmp_path / "other", named), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    named = tensors() | {"model.layers.0.mlp.up_proj.weight": torch.zeros(40, 16, dtype=torch.int8)}
    with pytest.raises(ModelError, match="stored as I8"):
        decompose(make(tmp_path / "model", named), tmp_path / "f")


def test_factors_that_miss_their_weight_are_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svd, "TOLERANCE", 1e-12)
    with pytest.raises(ModelError, match=r"q_proj: the factors miss the weight by .*float64"):
        decompose(model, tmp_path / "f")
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["plan.json"]


def test_damaged_factors_are_refused_by_file(model: str, tmp_path: Path) -> None:
    factors = decompose(model, tmp_path / "f")
    path = tmp_path / "f" / f"{factors.layout[0].name}.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ModelError, match=r"q_proj\.safetensors cannot be read"):
        factors.load(factors.layout[0].name)
    path.unlink()
    with pytest.raises(ModelError, match=r"q_proj\.safetensors cannot be read"):
        factors.load(factors.layout[0].name)
    (tmp_path / "f" / "manifest.json").write_text("{}")
    with pytest.raises(ModelError, match="not a manifest"):
        Factors.open(tmp_path / "f")


SHARE = """
import sys
from t2ray.adapters.factors import Factors
factors = Factors.open(sys.argv[1])
kept = [factors.load(target.name) for target in factors.layout]
total = sum(float(tensor.sum()) for tensors in kept for tensor in tensors)  # touch every page
print("ready", flush=True)
sys.stdin.readline()
mapped, shared = False, 0
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0]:
        mapped = line.rstrip().endswith(".safetensors")
    elif mapped and line.startswith(("Shared_Clean", "Private_Clean", "Private_Dirty")):
        kind, kib = line.split(":")
        print(kind, kib.split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason=needs.SMAPS)
def test_processes_share_the_pages_of_the_factors(model: str, tmp_path: Path) -> None:
    decompose(model, tmp_path / "f")
    command = [sys.executable, "-c", SHARE, str(tmp_path / "f")]
    readers = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(2)]
    for reader in readers:
        assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
    first, second = readers
    kib = dict.fromkeys(("Shared_Clean", "Private_Clean", "Private_Dirty"), 0)
    for line in first.communicate("\n")[0].splitlines():  # while the second still holds them
        kind, size = line.split()
        kib[kind] += int(size)
    second.communicate("\n")
    assert kib["Private_Clean"] == kib["Private_Dirty"] == 0
    assert kib["Shared_Clean"] > 0


def test_writing_to_factors_leaves_the_file(model: str, tmp_path: Path) -> None:
    factors = decompose(model, tmp_path / "f")
    name = factors.layout[0].name
    path = tmp_path / "f" / f"{name}.safetensors"
    before = path.read_bytes()
    u, _, _ = factors.load(name)
    assert str(path) in Path("/proc/self/maps").read_text()
    u.zero_()
    assert path.read_bytes() == before
    assert factors.load(name)[0].any()


def test_a_real_llama_is_decomposed_whole(tmp_path: Path) -> None:
    source = needs.real("models/stories260K")
    factors, weights = decompose(str(source), tmp_path / "f"), load_file(source / "model.safetensors")
    assert len(factors.layout) == 35
    assert {target.layer for target in factors.layout} == set(range(5))
    for target in factors.layout:
        u, s, vh = factors.load(target.name)
        torch.testing.assert_close((u * s) @ vh, weights[f"{target.name}.weight"], atol=1e-5, rtol=0)


def test_a_truncated_copy_of_a_real_llama_is_refused(tmp_path: Path) -> None:
    source = needs.real("models/stories260K") / "model.safetensors"
    shutil.copyfile(source, tmp_path / "model.safetensors")
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(700_000)
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated: 700000 bytes"):
        decompose(str(tmp_path), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_the_variance_of_a_kind_is_the_mean_over_its_matrices_of_their_squared_singular_values(
    model: str, tmp_path: Path
) -> None:
    factors = decompose(model, tmp_path / "f")
    found = variance(factors)
    assert {*found} == {target.name.rpartition(".")[2] for target in factors.layout}
    shares = []
    for target in factors.layout:
        if target.name.endswith("q_proj"):
            squares = torch.linalg.svdvals(open_checkpoint(open_weights(model).folder).matrix(target).double()) ** 2
            shares.append([float(squares[:r].sum() / squares.sum()) for r, _ in found["q_proj"]])
    assert [share for _, share in found["q_proj"]] == pytest.approx(
        [sum(c) / len(c) for c in zip(*shares, strict=True)]
    )
    for curve in found.values():
        ranks, last = [rank for rank, _ in curve], curve[-1]
        assert ranks[:3] == [1, 2, 4] and last[1] == pytest.approx(1.0) and last[0] == max(ranks)
