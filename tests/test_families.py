"""Architectures end to end, from tiny random configurations: what t2ray computes is what the model itself computes."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from t2ray.adapters.factors import decompose
from t2ray.adapters.model import Model, load_model
from t2ray.config.serve import EngineConfig
from t2ray.core import Mixture, ModelError, SamplingParams
from t2ray.engine.offline import OfflineEngine
from t2ray.engine.online import OnlineEngine
from t2ray.engine.probe import compare, expected
from t2ray.models.chat import Chat
from t2ray.models.families import Family

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 261, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
HEADS = {"head_dim": 16}

# Architecture -> what its configuration has besides.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "mistral": HEADS,
    "qwen2": {},
    "qwen3": HEADS,
    "gemma": HEADS,
    "gemma2": HEADS | {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": HEADS | {"query_pre_attn_scalar": 16},
    "phi": {},
    "phi3": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 256},
    "falcon": {"num_kv_heads": 4},
    "stablelm": {},
    "olmo2": {},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.3},
    "cohere2": HEADS | {"logit_scale": 0.2},
    "starcoder2": {},
    "nemotron": HEADS,
    "smollm3": {},
    "glm4": HEADS,
    "exaone4": HEADS,
}


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Loaded models by architecture, made when a test asks for one."""
    return _Models(tiny_llama, tmp_path_factory.mktemp("families"))


class _Models(dict[str, Model]):
    def __init__(self, tokenizer: Path, out: Path) -> None:
        super().__init__()
        self.tokenizer, self.out = tokenizer, out

    def __missing__(self, name: str) -> Model:
        folder = write(name, FAMILIES[name], self.tokenizer, self.out / name)
        decompose(str(folder), self.out / f"{name}-factors")
        self[name] = load_model(str(folder), self.out / f"{name}-factors", device="cpu")
        return self[name]


def write(name: str, own: dict[str, Any], tokenizer: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of an architecture with the tokenizer of another folder."""
    settings = {key: value for key, value in {**SMALL, **own}.items()}
    config = CONFIG_MAPPING[name](**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / file).exists():
            shutil.copy(tokenizer / file, folder)
    return folder


def plain(model: Model) -> Any:
    return AutoModelForCausalLM.from_pretrained(model.hf.config._name_or_path).eval()


def merged(model: Model, z_K: Tensor) -> Any:
    """The model of transformers alone, its matrices replaced by `U diag(s z) V^T`, worked out anew by torch's SVD."""
    hf = plain(model)
    modules = dict(hf.named_modules())
    for target, z_r in model.adapter.split(z_K).items():
        weight_MN = modules[target].weight.data
        u, s, vh = torch.linalg.svd(weight_MN.double(), full_matrices=False)
        weight_MN.copy_(u @ torch.diag(s * z_r.double()) @ vh)
    return hf


def ids_of(model: Model, rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(5, 260, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_losss_logits_are_the_models(models: dict[str, Model], name: str) -> None:
    model, ids_BT = models[name], ids_of(models[name])
    with torch.no_grad():
        ours = model.logits(model.hidden(ids_BT, torch.ones_like(ids_BT)))
        torch.testing.assert_close(ours, plain(model)(input_ids=ids_BT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_z_is_the_model_with_its_singular_values_scaled(models: dict[str, Model], name: str) -> None:
    """Alone and beside another row, against a model that knows nothing of t2ray."""
    model, ids_BT = models[name], ids_of(models[name])
    draw = torch.Generator().manual_seed(2)
    z_RK = 1 + 0.1 * torch.randn(2, model.adapter.size, generator=draw)
    with torch.no_grad():
        with model.adapter.rows(z_RK, torch.arange(2)):
            together = model.logits(model.hidden(ids_BT, torch.ones_like(ids_BT)))
        for row, z_K in enumerate(z_RK):
            expected = merged(model, z_K)(input_ids=ids_BT[row : row + 1]).logits
            torch.testing.assert_close(together[row : row + 1], expected, rtol=2e-3, atol=2e-3)
            with model.adapter.folded(z_K):
                folded = model.logits(model.hidden(ids_BT[row : row + 1], torch.ones_like(ids_BT[:1])))
            torch.testing.assert_close(folded, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_a_mixed_batch_are_those_of_the_merged_model(models: dict[str, Model], name: str) -> None:
    model = models[name]
    z_K = 1 + 0.1 * torch.randn(model.adapter.size, generator=torch.Generator().manual_seed(3))
    engine = OfflineEngine(model)
    engine.set_experts({"math": z_K})
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    prompts = ["17+25", "a longer prompt than that"]
    mixtures = [Mixture.base(), Mixture.parse("math")]

    async def ask() -> list[Any]:
        return await asyncio.gather(*(engine.generate(p, m, sampling) for p in prompts for m in mixtures))

    answers = asyncio.run(ask())
    references = {str(Mixture.base()): plain(model), "math:1": merged(model, z_K)}
    for answer in answers:
        reference, ids = references[str(answer.mixture)], list(answer.prompt_ids)
        for token in answer.tokens:  # greedy, without a cache
            with torch.no_grad():
                logprob_V = reference(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert float(logprob_V[token.id]) == pytest.approx(token.logprob, abs=2e-3)
            assert float(logprob_V.max()) - float(logprob_V[token.id]) < 2e-3
            ids.append(token.id)


def test_what_a_model_does_after_its_head_is_in_no_table_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Granite whose scale nobody knew would be trained on wrong logits."""
    folder = write("granite", FAMILIES["granite"], tiny_llama, tmp_path / "granite")
    decompose(str(folder), tmp_path / "factors")
    monkeypatch.setattr("t2ray.models.families._AFTER_HEAD", {})
    with pytest.raises(ModelError, match="GraniteForCausalLM: the loss's logits differ by .* does not support"):
        load_model(str(folder), tmp_path / "factors", device="cpu")


def test_a_layer_that_the_model_never_calls_is_told(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    decompose(str(tiny_llama), tmp_path / "factors")
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x)
    with pytest.raises(ModelError, match=r"passes by model.layers.0.mlp.\w+_proj and 5 more adapted layers"):
        load_model(str(tiny_llama), tmp_path / "factors", device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_z_of_1_is_the_base_model_bit_for_bit_also_beside_other_rows(
    tiny_llama: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = write("llama", HEADS, tiny_llama, tmp_path / "half", dtype)
    decompose(str(folder), tmp_path / "factors")
    model = load_model(str(folder), tmp_path / "factors", device="cpu")
    ids_BT = ids_of(model)
    z_RK = torch.stack([model.adapter.neutral, 1 + 0.1 * torch.randn(model.adapter.size)])
    with torch.no_grad():
        base = model.hidden(ids_BT, torch.ones_like(ids_BT))
        with model.adapter.rows(z_RK, torch.arange(2)):
            mixed = model.hidden(ids_BT, torch.ones_like(ids_BT))
    assert torch.equal(base[0], mixed[0]) and not torch.equal(base[1], mixed[1])


def test_in_half_precision_a_small_change_of_z_is_not_lost(tiny_llama: Path, tmp_path: Path) -> None:
    """|z - 1| = 0.001, of which a folded bfloat16 weight keeps half; and so no mixture is folded."""
    folder = write("llama", HEADS, tiny_llama, tmp_path / "half", torch.bfloat16)
    decompose(str(folder), tmp_path / "factors")
    model = load_model(str(folder), tmp_path / "factors", device="cpu")
    layer = model.adapter.layers[0]  # type: ignore[attr-defined]
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(1, 512, layer.weight.shape[1], generator=draw).to(torch.bfloat16)
    z_K = 1 + 0.001 * torch.sign(torch.randn(model.adapter.size, generator=draw))
    u, s, vh = torch.linalg.svd(layer.weight.double(), full_matrices=False)
    expected = x.double() @ (u @ torch.diag(s * (z_K[layer.span].double() - 1)) @ vh).T
    with torch.no_grad(), model.adapter.rows(z_K[None]):
        found = layer(x).double() - x.double() @ layer.weight.double().T
    # the sum is rounded to bfloat16 once; many outputs together show that the change is in it
    share = float((found * expected).sum() / (expected * expected).sum())
    assert share == pytest.approx(1.0, abs=0.1)
    assert model.adapter.tokens_to_fold() > 10**9


def test_a_gain_finds_its_rows_in_every_leading_shape(tiny_llama: Path, tmp_path: Path) -> None:
    """(B, T, N), (B * T, N), (B, 1, T, N) and packed (1, T, N): shared experts and latent attention have them."""
    decompose(str(tiny_llama), tmp_path / "factors")
    model = load_model(str(tiny_llama), tmp_path / "factors", device="cpu")
    layer = model.adapter.layers[0]  # type: ignore[attr-defined]
    x_BTN = torch.randn(3, 4, layer.weight.shape[1])
    z_RK = 1 + 0.3 * torch.randn(3, model.adapter.size)
    with torch.no_grad(), model.adapter.rows(z_RK, torch.arange(3)):
        expected = layer(x_BTN)
        flat, four = layer(x_BTN.flatten(0, 1)), layer(x_BTN[:, None])
        with pytest.raises(AssertionError, match="no whole number"):
            layer(x_BTN.flatten(0, 1)[:10])
    torch.testing.assert_close(flat, expected.flatten(0, 1))
    torch.testing.assert_close(four[:, 0], expected)
    with torch.no_grad(), model.adapter.rows(z_RK, torch.arange(3).repeat_interleave(4)):
        torch.testing.assert_close(layer(x_BTN.flatten(0, 1)[None])[0], expected.flatten(0, 1))


def test_an_architecture_without_a_limit_has_a_context_of_its_own() -> None:
    config = CONFIG_MAPPING["mpt"](d_model=64, n_layers=1, n_heads=4, vocab_size=64, max_seq_len=96)
    with torch.device("meta"):
        assert Family(AutoModelForCausalLM.from_config(config)).context == 96


# -------------------------------------------------------------------------------------------------------------- serving


def served(model: Model) -> None:
    """Starts an online engine as an endpoint does: with a probe."""

    async def start() -> None:
        wanted = await expected(model)
        engine = OnlineEngine(model, EngineConfig(kv_tokens=1024, batch_tokens=64, batch_rows=8))
        engine.start()
        try:
            await compare(engine, model, wanted)
        finally:
            engine.stop()

    asyncio.run(start())


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "granite", "cohere"])
def test_the_online_engine_computes_what_the_offline_one_does_also_with_eager_attention(
    models: dict[str, Model], name: str
) -> None:
    """Gemma 2 attends eagerly: its scorings need another attention than the paged one of its steps."""
    served(models[name])


@pytest.mark.parametrize("name", ["gptj", "falcon", "stablelm"])
def test_a_model_that_cannot_be_batched_continuously_is_refused_before_it_answers(
    models: dict[str, Model], name: str
) -> None:
    with pytest.raises(ModelError, match="For.*continuous batching.*can be trained and evaluated, and not be served"):
        served(models[name])


def test_an_engine_that_computes_something_else_is_refused(models: dict[str, Model]) -> None:
    model = models["llama"]

    async def wrong() -> None:
        engine = OfflineEngine(model)
        wanted = await expected(model)
        scores = tuple(score - 1 for score in wanted.scores)
        await compare(engine, model, replace(wanted, scores=scores))

    with pytest.raises(ModelError, match="computes other answers than the model .*differ by 1"):
        asyncio.run(wrong())


# ------------------------------------------------------------------------------------------------------- ends of turns


def test_a_label_ends_as_the_template_ends_a_turn_and_not_by_the_first_end_token(tiny_llama: Path) -> None:
    """Llama 3 lists the end of a document first."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    end, document = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.convert_tokens_to_ids("<|pad|>")
    chat = Chat(tokenizer, [document, end])
    assert chat.encode_answer("math")[-1] == end and chat.eos_ids == (document, end)
    assert Chat(tokenizer, [document]).eos_ids == (document, end)  # an answer may end there, too
    tokenizer.chat_template = "{{ raise_exception('no such conversation') }}"
    assert Chat(tokenizer, [document, end]).encode_answer("math")[-1] == document
