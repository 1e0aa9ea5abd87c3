"""What is exported says what t2ray says: to transformers as a plain model, to PEFT as the nearest LoRA."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small import load_as, plain, random_z, together, token_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from t2ray.adapters.model import Model
from t2ray.cli.main import main
from t2ray.core import ConfigError, Mixture, ResourceError, SamplingParams, user
from t2ray.engine.offline import OfflineEngine
from t2ray.experts.export import RECORD, Source, export_merged, export_peft
from t2ray.experts.registry import SHIPPED, Registry

MIXTURE = Mixture.parse("a:0.7,b:-0.4")
# peft 0.21 asks transformers 5.23 under the old name of a class.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = load_as(torch.float32, tiny_llama, tmp_path_factory.mktemp("export"))
    model.adapter.set_experts({"a": random_z(model.adapter.size, 1), "b": random_z(model.adapter.size, 2)})
    return model


@pytest.fixture
def source(model: Model) -> Source:
    return Source(model=model, base=model.hf.config._name_or_path, mixture=MIXTURE, experts=())


def greedy(model: Model, mixture: Mixture, prompts: list[str]) -> list[tuple[int, ...]]:
    engine, sampling = OfflineEngine(model), SamplingParams(max_tokens=24)
    return [c.token_ids for c in together(*(engine.generate(user(text), mixture, sampling) for text in prompts))]


def greedy_of(folder: Path, prompts: list[str]) -> list[tuple[int, ...]]:
    """As somebody else would ask: transformers alone, with what the folder holds."""
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = []
    for text in prompts:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = hf.generate(**ids, do_sample=False, max_new_tokens=24)
        answers.append(tuple(out[0, ids["input_ids"].shape[1] :].tolist()))
    return answers


def logits(hf: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = hf(input_ids=ids_BT).logits
    return found


def of_rows(model: Model, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), model.adapter.rows(model.adapter.mix(MIXTURE)[None]):
        return model.logits(model.hidden(ids_BT, torch.ones_like(ids_BT)))


def test_a_merged_model_answers_as_t2ray_does(source: Source, tmp_path: Path) -> None:
    errors = export_merged(source, tmp_path / "out")
    prompts = ["17+25", "What?", "reverse abc"]
    ours = greedy(source.model, MIXTURE, prompts)
    assert greedy_of(tmp_path / "out", prompts) == ours != greedy(source.model, Mixture.base(), prompts)
    assert max(errors.values()) < 1e-5
    ids_BT = token_rows(source.model, 2, 12)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(hf, ids_BT), of_rows(source.model, ids_BT), atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_merged_base_is_the_base_bit_for_bit_and_the_model_is_left_as_it_was(model: Model, tmp_path: Path) -> None:
    base = Path(model.hf.config._name_or_path)
    for mixture in (MIXTURE, Mixture.base()):
        export_merged(
            Source(model=model, base=str(base), mixture=mixture, experts=()), tmp_path / str(len(str(mixture)))
        )
    ours, theirs = load_file(base / "model.safetensors"), load_file(tmp_path / "4" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_merged_model_ends_its_answers_where_t2ray_does_and_has_no_penalty_of_the_base(
    model: Model, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model.hf.config._name_or_path, base)
    (base / "generation_config.json").write_text('{"eos_token_id": 0, "repetition_penalty": 5.0}')
    export_merged(Source(model=model, base=str(base), mixture=MIXTURE, experts=()), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {"eos_token_id": list(model.chat.eos_ids), "pad_token_id": model.chat.pad_id}


def test_rounding_to_bfloat16_is_said(source: Source, tmp_path: Path) -> None:
    errors = export_merged(source, tmp_path / "out", torch.bfloat16)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert hf.dtype == torch.bfloat16
    ours, theirs = plain(source.model).state_dict(), hf.state_dict()
    for target, left_MR, right_RN in source.changes:
        change, name = left_MR @ right_RN, f"{target.name}.weight"
        stored = theirs[name].float() - ours[name]
        missed = float((stored - change).norm() / change.norm())
        assert 1e-4 < missed == pytest.approx(errors[target.name], rel=1e-3)
    assert json.loads((tmp_path / "out" / RECORD).read_text())["relative_errors"] == errors


def test_a_lora_of_full_rank_is_the_mixture(source: Source, tmp_path: Path) -> None:
    errors = export_peft(source, tmp_path / "out", 1000)
    assert max(errors.values()) == 0.0
    lora = PeftModel.from_pretrained(plain(source.model), tmp_path / "out")
    ids_BT = token_rows(source.model, 2, 12)
    assert torch.allclose(logits(lora, ids_BT), of_rows(source.model, ids_BT), atol=1e-4)
    assert lora.peft_config["default"].r == 32


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_a_lora_of_low_rank_is_the_best_there_is(source: Source, tmp_path: Path, rank: int) -> None:
    """Eckart and Young: no product of that rank misses less than the singular values from the rank on."""
    errors = export_peft(source, tmp_path / "out", rank)
    lora = PeftModel.from_pretrained(plain(source.model), tmp_path / "out")
    for target, left_MR, right_RN in source.changes:
        change = (left_MR @ right_RN).double()
        s = torch.linalg.svdvals(change)
        assert errors[target.name] == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-5)
        layer = lora.get_submodule(f"base_model.model.{target.name}")
        stored = layer.get_delta_weight("default").double()
        assert float((change - stored).norm() / change.norm()) == pytest.approx(errors[target.name], abs=1e-5)
    assert json.loads((tmp_path / "out" / RECORD).read_text())["relative_errors"] == errors


def test_the_card_and_the_record_name_the_experts_with_version_accuracy_and_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--base", "tiny", "--mixture", "math:0.7", "--as", "peft", "--rank", "4", "--out", "o"]) == 0
    math = Registry(SHIPPED).manifest("math")
    measured = " | ".join(f"{100 * math.metrics[key]:.1f} %" for key in ("base_accuracy", "accuracy"))
    card, record = Path("o/README.md").read_text(), json.loads(Path("o", RECORD).read_text())
    for part in ('base_model: "tiny"', math.base_digest, "| math | 1 | 0.7 |", measured, str(math.digest)):
        assert part in card
    assert record["experts"] == {"math": {"version": 1, "digest": math.digest}}
    assert (record["mixture"], record["base_digest"]) == ({"math": [0.7]}, math.base_digest)


@pytest.mark.parametrize(
    "export", [lambda source, out: export_merged(source, out), lambda source, out: export_peft(source, out, 4)]
)
def test_a_disk_that_is_full_leaves_nothing_behind(
    source: Source, tmp_path: Path, export: Callable[[Source, Path], Mapping[str, float]]
) -> None:
    (tmp_path / "out").mkdir()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(ResourceError, match="cannot write"):
            export(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mixture math --as peft --out o", "--as peft needs --rank"),
        ("--mixture math --as peft --rank 0 --out o", "--rank 0 .* is at least 1"),
        ("--mixture math --as merged --rank 4 --out o", "--rank 4 goes with --as peft alone"),
        ("--mixture math --as peft --rank 4 --dtype float16 --out o", "--dtype float16 goes with --as merged alone"),
        ("--mixture mth --as merged --out o", "no expert 'mth'.*did you mean 'math'"),
        ("--mixture math:x --as merged --out o", "'x' is not a number"),
        ("--mixture fewshot/none --as merged --out o", "no mixture 'none'"),
        ("--mixture math --as merged --out s3://bucket/o", "goes into a local folder"),
        ("--mixture math --as merged --out full", "full exists and is not an empty folder"),
        ("--mixture math --as merged --out o --base nowhere/at/all", "no such folder"),
    ],
)
def test_a_refusal_is_one_line_before_anything_is_decomposed(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/x").touch()
    more = ["--experts", str(SHIPPED)] if "nowhere" in words else []
    assert main(["export", *words.split(), *more]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and re.search(message, line), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_the_reference_codes_file_becomes_the_weights_of_its_formula(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`U diag(s sigmoid(p)) V^T sum(s) / sum(s sigmoid(p))`, from SVDs of this test's own; the attention stays."""
    monkeypatch.chdir(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    draw = torch.Generator().manual_seed(0)
    p = {name: torch.randn(min(w.shape), generator=draw) for name, w in base.items() if "mlp" in name}
    torch.save(p, "learnable_params.pt")
    model = ["--base", str(tiny_llama), "--experts", "experts"]
    assert main(["experts", "import", "--from", "sakana", "learnable_params.pt", *model, "--name", "theirs"]) == 0
    assert main(["export", *model, "--mixture", "theirs", "--as", "merged", "--out", "out"]) == 0
    found = AutoModelForCausalLM.from_pretrained("out").state_dict()
    for name, weight in base.items():
        expected = weight
        if name in p:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            z = torch.sigmoid(p[name])
            expected = (u * (s * z)) @ vh * (s.sum() / (s * z).sum())
        assert float((found[name] - expected).norm() / expected.norm()) < 1e-5, name


def test_a_mixture_that_changes_nothing_is_no_lora(model: Model, tmp_path: Path) -> None:
    base = Source(model=model, base="tiny", mixture=Mixture.base(), experts=())
    with pytest.raises(ConfigError, match="changes nothing"):
        export_peft(base, tmp_path / "out", 4)
    assert not list(tmp_path.iterdir())
