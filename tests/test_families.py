"""Architectures end to end, from tiny random configurations: what t2ray computes is what the model itself computes."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, SMALL, WITH_IMAGES, tokenized, write
from pictures import picture
from safetensors.torch import load_file, save_file
from seeing import SEEING, write_seeing
from small import rollout, together
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from t2ray.adapters.factors import decompose
from t2ray.adapters.model import Model, load_model
from t2ray.config.serve import EngineConfig
from t2ray.core import (
    Completion,
    ConfigError,
    ContextExceeded,
    Example,
    Image,
    Mixture,
    ModelError,
    SamplingParams,
    user,
)
from t2ray.engine.offline import OfflineEngine
from t2ray.engine.protocol import Engine
from t2ray.engine.serving import compare, sample, serving_engine
from t2ray.experts.registry import Registry
from t2ray.grades import Grade, Rollout
from t2ray.models import families as layouts
from t2ray.models.chat import Chat
from t2ray.models.families import Family
from t2ray.models.load import load_chat
from t2ray.models.processor import side_by_side
from t2ray.models.skeleton import model_class, skeleton
from t2ray.models.targets import Selection, matrix, select_targets
from t2ray.prompts import pictured
from t2ray.runs.memory import shape_of
from t2ray.training.loss import backward

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BASE, MATH = Mixture.base(), Mixture.parse("math")
PROMPTS = ("17+25", "a longer prompt than that")
LABELS = ("yes", "no!!")


def plain(model: Model) -> Any:
    folder = model.hf.config._name_or_path
    return model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder).eval().requires_grad_(False)


def merged(model: Model, z_K: Tensor) -> Any:
    """The model of transformers alone, its matrices replaced by `U diag(s z) V^T`, worked out anew by torch's SVD."""
    hf, z = plain(model), model.adapter.split(z_K)
    for target in model.adapter.layout:
        weight_MN, _ = matrix(hf, target)
        u, s, vh = torch.linalg.svd(weight_MN.double(), full_matrices=False)
        weight_MN.copy_(u @ torch.diag(s * z[target.name].double()) @ vh)
    return hf


def random_z(model: Model, rows: int) -> Tensor:
    return 1 + 0.1 * torch.randn(rows, model.adapter.size, generator=torch.Generator().manual_seed(2))


def ids_of(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(6, 260, (rows, length), generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def logits(model: Model, ids_BT: Tensor) -> Tensor:
    return model.logits(model.hidden(ids_BT, torch.ones_like(ids_BT)))


def reference_logprobs(hf: Any, ids: tuple[int, ...], answer: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Of an answer's tokens, and of the likeliest in their places; all at once, without a cache."""
    logprob_TV = hf(input_ids=torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
    return logprob_TV.gather(-1, torch.tensor(answer)[:, None])[:, 0], logprob_TV.max(-1).values


async def answers(engine: Engine) -> tuple[list[Completion], list[tuple[float, ...]]]:
    """Of all prompts with both mixtures, asked together."""
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    asked = [(prompt, mixture) for prompt in PROMPTS for mixture in (BASE, MATH)]
    texts = await asyncio.gather(*(engine.generate(*pair, sampling) for pair in asked))
    return texts, await asyncio.gather(*(engine.score(prompt, LABELS, mixture) for prompt, mixture in asked))


def check_answers(model: Model, found: tuple[list[Completion], list[tuple[float, ...]]], references: list[Any]) -> None:
    """That they are greedy answers and scores of the models they should be of, base and merged in turn."""
    for i, (answer, scores) in enumerate(zip(*found, strict=True)):
        hf = references[i % 2]
        chosen, best = reference_logprobs(hf, answer.prompt_ids, answer.token_ids)
        close(torch.tensor(answer.logprobs), chosen)
        close(chosen, best)
        for label, score in zip(LABELS, scores, strict=True):
            chosen, _ = reference_logprobs(hf, answer.prompt_ids, model.chat.encode_answer(label))
            assert score == pytest.approx(float(chosen.sum()), abs=5e-3)


def trained(model: Model) -> Tensor:
    """Two steps of the loss from z = 1."""
    z_1K = torch.ones(1, model.adapter.size, requires_grad=True)
    optimizer = torch.optim.AdamW([z_1K], lr=0.01, weight_decay=0.0)
    batch = [rollout(row[:4], row[4:]) for row in ids_of().tolist()]
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        z_1K.grad = torch.zeros_like(z_1K)
        terms = backward(model, z_1K, batch, [1.0, -0.5], lam=0.1, temperature=1.0, batch=2)
        optimizer.step()
        assert terms.loss == terms.loss
    return z_1K.detach()[0]


def check_shared_prompts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a prompt which is read once, for the loss and for samples of it, is as one that every row reads."""
    batch = [rollout(row[:n], row[4:]) for row in ids_of().tolist() for n in (4, 4, 2, 2)]

    def computed() -> tuple[Tensor, Tensor]:
        z_1K = random_z(model, 1)[:1].requires_grad_()
        backward(model, z_1K, batch, [1.0, -0.5] * 4, lam=0.1, temperature=1.0, batch=8)
        assert z_1K.grad is not None
        sampling = SamplingParams(max_tokens=4, ignore_eos=True)
        engine = OfflineEngine(model)
        answers = together(*(engine.generate(prompt, BASE, sampling) for prompt in PROMPTS for _ in range(2)))
        return z_1K.grad, torch.tensor([answer.logprobs for answer in answers])

    plain = computed()
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "PASS", {"cpu": (0.0, 0)})
        shared = computed()
    scale = float(plain[0].abs().max())
    close(shared[0] / scale, plain[0] / scale)
    close(shared[1], plain[1])


async def served(model: Model, z_K: Tensor, ask: Any = answers) -> tuple[str, Any]:
    """How a model is served, and what an endpoint answers."""
    engine = await serving_engine(model, EngineConfig(kv_tokens=1024, batch_tokens=64, batch_rows=8))
    try:
        engine.set_experts({"math": z_K})
        return "in batches" if isinstance(engine, OfflineEngine) else "continuously", await ask(engine)
    finally:
        engine.stop()


ROWS: dict[str, str] = {}
"""The lines of docs/models.md, as the tests find them."""


@pytest.mark.parametrize("name", [*FAMILIES, *WITH_IMAGES])
def test_a_family_works_from_end_to_end(
    name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plan, factors, probe, loss, training, registry, mixed batches and scores, served: against the model itself."""
    folder = write(name, tiny_llama, tmp_path / "model")
    planned = shape_of(str(folder))
    factors = decompose(str(folder), tmp_path / "factors")
    assert factors.layout == planned.targets and factors.manifest.left_out == planned.selection.left_out
    model = load_model(str(folder), tmp_path / "factors", device="cpu")
    base, ids_BT, z_2K = plain(model), ids_of(), random_z(model, 2)
    mixed = merged(model, z_2K[1])
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids_BT), base(input_ids=ids_BT).logits, rtol=1e-4, atol=1e-4)
        with model.adapter.rows(z_2K, torch.arange(2)):
            together = logits(model, ids_BT)
        with model.adapter.folded(z_2K[1]):
            folded = logits(model, ids_BT[1:])
        expected = mixed(input_ids=ids_BT[1:]).logits
    close(together[1:], expected)
    close(folded, expected)

    z_K = trained(model)
    still = [target for target, z_r in model.adapter.split(z_K).items() if bool((z_r == 1).all())]
    assert not still, f"two steps do not move {still}"
    if model.family.shares_prefixes:
        check_shared_prompts(model, monkeypatch)
    registry = Registry(tmp_path / "experts")
    registry.save("math", model.adapter.split(z_K), base_digest=model.base_digest)
    loaded = registry.load("math", base_digest=model.base_digest, layout=model.adapter.layout)
    assert torch.equal(model.adapter.join(loaded.z), z_K)

    offline = OfflineEngine(model)
    offline.set_experts({"math": z_2K[1]})
    check_answers(model, asyncio.run(answers(offline)), [base, mixed])
    way, found = asyncio.run(served(model, z_2K[1]))
    check_answers(model, found, [base, mixed])
    known = FAMILIES[name][0] if name in FAMILIES else WITH_IMAGES[name][0]
    stages = "all" if model.family.shares_prefixes else "all but prompts once"
    stages += ", pictures" if name in SEEING else ", texts alone" if name in WITH_IMAGES else ""
    ROWS[name] = f"| {known} | `{name}` | {stages} | {way} | {adapted(name, planned.selection, tmp_path)} |"


def adapted(name: str, selection: Selection, folder: Path) -> str:
    """Which share is adapted of the sizes that transformers gives the architecture, and what is not."""
    if not selection.left_out:
        return "100 % | nothing"
    CONFIG_MAPPING[name]().save_pretrained(folder / "usual")
    usual = shape_of(str(folder / "usual"))
    share = f"{100 * usual.selection.share:.3g} % of {usual.parameters / 1e9:.0f} B"
    return f"{share} | {', '.join(f'`{kind}`' for kind in selection.left_out)}"


def test_the_page_of_models_is_what_the_families_showed() -> None:
    """`T2RAY_WRITE_DOCS=1 pytest tests/test_families.py` writes it."""
    if ROWS.keys() != FAMILIES.keys() | WITH_IMAGES.keys():
        pytest.skip("only some families were tested")
    begin, end = "| --- | --- | --- | --- | --- | --- |\n", "\n\n"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    page = before + begin + "\n".join(ROWS[name] for name in (*FAMILIES, *WITH_IMAGES)) + end + rest.partition(end)[2]
    if os.environ.get("T2RAY_WRITE_DOCS"):
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page, "docs/models.md is stale; see this test's docstring"


# ------------------------------------------------------------------------------------------------------------- pictures

SMALL_ONE, WIDE_ONE = picture(20, 16, 1), picture(48, 24, 2, "JPEG")
SEEN = (user(("what?", SMALL_ONE)), user("17+25"), user((WIDE_ONE, "and ", SMALL_ONE, "this?")))


def alone(model: Model, hf: Any, messages: Any, answer: tuple[int, ...]) -> Tensor:
    """The logits, (T, V), of the model of transformers for one conversation and its answer, in no batch."""
    ids = (*model.chat.ids(messages), *answer)
    seen = side_by_side([model.chat.seen(messages)], [0], len(ids)) if pictured(messages) else {}
    logits: Tensor = hf(input_ids=torch.tensor([ids]), **seen).logits[0]
    return logits


def check_seen(model: Model, found: tuple[list[Completion], list[tuple[float, ...]]], references: list[Any]) -> None:
    """`check_answers`, where a model sees: of each conversation with both mixtures, in turn."""
    asked = [messages for messages in SEEN for _ in range(2)]
    for i, (messages, answer, scores) in enumerate(zip(asked, *found, strict=True)):
        hf, start = references[i % 2], len(answer.prompt_ids) - 1
        logprob_TV = alone(model, hf, messages, answer.token_ids)[start:-1].float().log_softmax(-1)
        chosen = logprob_TV.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        close(torch.tensor(answer.logprobs), chosen)
        if pictured(messages):  # the mark of a picture is never an answer
            logprob_TV[:, [*model.chat.processor.places]] = -torch.inf
            close(chosen, logprob_TV.max(-1).values)
        for label, score in zip(LABELS, scores, strict=True):
            ids = model.chat.encode_answer(label)
            logprob_TV = alone(model, hf, messages, ids)[start:-1].float().log_softmax(-1)
            expected = float(logprob_TV.gather(-1, torch.tensor(ids)[:, None]).sum())
            assert score == pytest.approx(expected, abs=5e-3)


async def seen_answers(engine: Engine) -> tuple[list[Completion], list[tuple[float, ...]]]:
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    asked = [(messages, mixture) for messages in SEEN for mixture in (BASE, MATH)]
    found = await asyncio.gather(*(engine.generate(*pair, sampling) for pair in asked))
    return found, await asyncio.gather(*(engine.score(messages, LABELS, mixture) for messages, mixture in asked))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n in ("llava_next", "qwen2_vl", "smolvlm"))) for n in SEEING]
)
def test_a_family_sees(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Loss, training, mixed batches of other pictures and other z, scores, served: against the model itself, alone."""
    folder = write_seeing(name, tiny_llama, tmp_path / "model")
    decompose(str(folder), tmp_path / "factors")
    model = load_model(str(folder), tmp_path / "factors", device="cpu")
    base, z_2K = plain(model), random_z(model, 2)
    mixed = merged(model, z_2K[1])
    places = model.chat.processor.places
    assert [sum(id in places for id in model.chat.ids(messages)) > 0 for messages in SEEN] == [True, False, True]

    rows = [[*model.chat.ids(messages), 70, 71] for messages in SEEN]
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad(), model.adapter.rows(z_2K, torch.tensor([1, 0, 1])):
        seen = model.seen([pictured(messages) for messages in SEEN], [0, 0, 0], longest)
        together = model.logits(model.hidden(ids_BT, mask_BT, seen))
    for i in (0, 2):
        close(together[i, : len(rows[i])], alone(model, mixed, SEEN[i], (70, 71)))

    offline = OfflineEngine(model)
    offline.set_experts({"math": z_2K[1]})
    found = asyncio.run(seen_answers(offline))
    check_seen(model, found, [base, mixed])
    z_1K = torch.ones(1, model.adapter.size, requires_grad=True)
    examples = [Example(id="x", messages=messages, row={}) for messages in SEEN]
    batch = [
        Rollout(example=example, completion=answer, grade=Grade.of(1.0))
        for example, answer in zip(examples, found[0][::2], strict=True)
    ]
    terms = backward(model, z_1K, batch, [1.0, -0.5, 0.5], lam=0.1, temperature=1.0, batch=3)
    expected = [-a * sum(r.completion.logprobs) / 3 for a, r in zip([1.0, -0.5, 0.5], batch, strict=True)]
    assert terms.loss == pytest.approx(sum(expected), abs=5e-3) and terms.kl == pytest.approx(0.0, abs=1e-4)
    gradient = model.adapter.split(z_1K.grad[0])
    assert all(bool(part.any()) for part in gradient.values())

    way, answered = asyncio.run(served(model, z_2K[1], seen_answers))
    check_seen(model, answered, [base, mixed])
    assert [a.token_ids for a in answered[0]] == [a.token_ids for a in found[0]]


def test_what_a_batch_saw_does_not_move_the_tokens_of_the_next(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen's models keep where pictures stood, for a next call that goes on; prompts that are read apart are such."""
    folder = write_seeing("qwen2_vl", tiny_llama, tmp_path / "model")
    decompose(str(folder), tmp_path / "factors")
    model = load_model(str(folder), tmp_path / "factors", device="cpu")
    engine, sampling = OfflineEngine(model), SamplingParams(max_tokens=4, ignore_eos=True)
    engine.set_experts({"math": random_z(model, 1)[0]})
    monkeypatch.setattr(layouts, "PASS", {"cpu": (0.0, 0)})
    monkeypatch.setattr("t2ray.engine.batches.READ_TOKENS", 4)

    def texts() -> Tensor:
        found = together(*(engine.generate(prompt, BASE, sampling) for prompt in PROMPTS for _ in range(3)))
        (read,) = together(engine.read(PROMPTS[1], BASE, 0))
        return torch.tensor([*(p for answer in found for p in answer.logprobs), *(t.logprob for t in read[1:])])

    before = texts()
    asyncio.run(seen_answers(engine))
    torch.testing.assert_close(texts(), before, rtol=1e-4, atol=1e-4)


def test_what_a_model_cannot_see_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    folder = write_seeing("llava", tiny_llama, tmp_path / "model")
    chat = load_chat(folder)[0]
    for messages, message in (
        (user((Image(data=b"GIF89a, or so"), "what?")), "a picture of 13 bytes is no PNG, JPEG, WEBP, GIF file"),
        (user((Image(data=SMALL_ONE.data[:-60]), "what?")), "a picture: its PNG file is broken"),
        (user((Image(path=str(tmp_path / "no.png")), "what?")), "no.png: there is no such file"),
        (user((SMALL_ONE, "two <image>s?")), "says '<image>', the model's mark of a picture"),
        (user("two <image>s?"), "says '<image>', the model's mark of a picture"),
        ((261, 70), "says '<image>', the model's mark of a picture"),
    ):
        with pytest.raises(ConfigError, match=message):
            chat.ids(messages)
    with pytest.raises(ConfigError, match="takes no pictures: it has no part that sees"):
        load_chat(tiny_llama)[0].ids(SEEN[0])
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match="takes no pictures: .*; send text alone"):
        load_chat(folder)[0].ids(SEEN[0])
    assert load_chat(folder)[0].ids("17+25") == chat.ids("17+25")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match="takes no pictures: its folder has no preprocessor_config.json"):
        load_chat(folder)[0].ids(SEEN[0])


def test_a_model_that_sees_otherwise_in_a_batch_is_shown_no_pictures(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one would whose pictures are filled up in a way of its own; its text is as before."""
    folder = write_seeing("llava", tiny_llama, tmp_path / "model")
    decompose(str(folder), tmp_path / "factors")
    known = side_by_side

    def mixed_up(rows: Any, *args: Any) -> Any:
        return {name: value.flip(0) for name, value in known(rows, *args).items()}

    monkeypatch.setattr("t2ray.adapters.model.side_by_side", mixed_up)
    model = load_model(str(folder), tmp_path / "factors", device="cpu")
    with pytest.raises(ConfigError, match="takes no pictures: Llava.*: the logits beside other pictures differ by"):
        model.chat.ids(SEEN[0])
    assert len(asyncio.run(OfflineEngine(model).generate("17", BASE, SamplingParams(max_tokens=2))).tokens) > 0


def test_a_template_that_reads_parts_alone_gets_texts_as_parts(tiny_llama: Path, tmp_path: Path) -> None:
    """It would leave out a text, without a word."""
    folder = write_seeing("llava", tiny_llama, tmp_path / "model")
    chat, tokenizer = load_chat(folder)[0], AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content | selectattr('type', 'equalto', 'text') %}"
        "{{ p.text }}{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert Chat(tokenizer, chat.eos_ids).ids(user("17+25")) == chat.ids(user("17+25"))


# ------------------------------------------------------------------------------------------------------- names, experts


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text"])
def test_every_moe_experts_matrix_has_a_z_of_its_own_routed_by_token(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Beside another row = alone = folded = a model with those matrices; a step moves those that tokens went to."""
    folder = write(name, tiny_llama, tmp_path / "model")
    assert not any(target.expert is not None for target in select_targets(skeleton(str(folder))).targets)
    factors = decompose(str(folder), tmp_path / "factors", targets=["*.experts.*"])
    stacks = {target.parameter for target in factors.layout if target.expert is not None}
    assert len(factors.layout) >= 4 * len(stacks) > 0
    model = load_model(str(folder), tmp_path / "factors", device="cpu")
    base, ids_BT, z_2K = plain(model), ids_of(length=12), random_z(model, 2)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids_BT), base(input_ids=ids_BT).logits, rtol=1e-4, atol=1e-4)
        with model.adapter.rows(z_2K, torch.arange(2)):
            together = logits(model, ids_BT)
        for i in range(2):
            hf = merged(model, z_2K[i])
            close(together[i : i + 1], hf(input_ids=ids_BT[i : i + 1]).logits)
            with model.adapter.folded(z_2K[i]):
                close(logits(model, ids_BT[i : i + 1]), hf(input_ids=ids_BT[i : i + 1]).logits)
    way, found = asyncio.run(served(model, z_2K[1]))
    check_answers(model, found, [base, hf])
    moved = {target for target, z_r in model.adapter.split(trained(model)).items() if bool((z_r != 1).any())}
    assert sum(".experts." in target for target in moved) >= 4


def test_a_checkpoint_without_the_prefix_has_the_same_factors(tiny_llama: Path, tmp_path: Path) -> None:
    """GPT-2 lies on the hub as `h.0.attn.c_attn.weight`, with its inputs before its outputs."""
    folder = write("gpt2", tiny_llama, tmp_path / "model")
    named = load_file(folder / "model.safetensors")
    bare = tokenized(tiny_llama, write("gpt2", tiny_llama, tmp_path / "bare"))
    save_file({name.removeprefix("transformer."): t for name, t in named.items()}, bare / "model.safetensors")
    ours, hubs = decompose(str(folder), tmp_path / "f"), decompose(str(bare), tmp_path / "g")
    assert ours.layout == hubs.layout and ours.base_digest != hubs.base_digest
    attn = ours.layout[0]
    assert (attn.name, attn.m, attn.n) == ("transformer.h.0.attn.c_attn", 96, 32)
    for target in ours.layout:
        for a, b in zip(ours.load(target.name), hubs.load(target.name), strict=True):
            assert torch.equal(a, b)


def test_a_model_without_attention_is_one_line_before_anything_is_computed(tiny_llama: Path, tmp_path: Path) -> None:
    config = CONFIG_MAPPING["mamba"](hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="MambaForCausalLM has no attention"):
        decompose(str(tmp_path / "model"), tmp_path / "factors")


def test_a_row_does_not_depend_on_the_length_of_its_neighbours_with_long_rope(tiny_llama: Path, tmp_path: Path) -> None:
    """transformers takes other frequencies for all rows where one is long; the context ends before that."""
    rope = {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    folder = write("phi3", tiny_llama, tmp_path / "model", rope_parameters=rope, original_max_position_embeddings=32)
    decompose(str(folder), tmp_path / "factors")
    model = load_model(str(folder), tmp_path / "factors", device="cpu")
    engine, sampling = OfflineEngine(model), SamplingParams(max_tokens=4, ignore_eos=True)
    assert model.context == 32
    with pytest.raises(ContextExceeded):
        asyncio.run(engine.generate("x" * 30, BASE, sampling))
    short, long = ids_of(1, 8), ids_of(1, 80)
    expected = plain(model)(input_ids=short).logits
    with torch.no_grad():
        logits(model, long)
        torch.testing.assert_close(logits(model, short), expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- probe


def test_what_a_model_does_after_its_head_is_in_no_table_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Granite whose scale nobody knew would be trained on wrong logits."""
    folder = write("granite", tiny_llama, tmp_path / "granite")
    decompose(str(folder), tmp_path / "factors")
    monkeypatch.setattr("t2ray.models.families._AFTER_HEAD", {})
    with pytest.raises(ModelError, match="GraniteForCausalLM: the loss's logits differ by .* does not support"):
        load_model(str(folder), tmp_path / "factors", device="cpu")


def test_an_architecture_with_a_cache_of_its_own_is_refused_at_load(tiny_llama: Path, tmp_path: Path) -> None:
    settings = {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2}
    hf = AutoModelForCausalLM.from_config(CONFIG_MAPPING["minimax"](**SMALL | settings))
    hf.save_pretrained(tmp_path / "model")
    tokenized(tiny_llama, tmp_path / "model")
    decompose(str(tmp_path / "model"), tmp_path / "factors")
    with pytest.raises(ModelError, match="^MiniMaxForCausalLM: its forward fails as t2ray calls it .*cache of its own"):
        load_model(str(tmp_path / "model"), tmp_path / "factors", device="cpu")


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
    folder = write("llama", tiny_llama, tmp_path / "half", dtype)
    decompose(str(folder), tmp_path / "factors")
    model = load_model(str(folder), tmp_path / "factors", device="cpu")
    ids_BT = ids_of()
    z_RK = torch.stack([model.adapter.neutral, 1 + 0.1 * torch.randn(model.adapter.size)])
    with torch.no_grad():
        base = model.hidden(ids_BT, torch.ones_like(ids_BT))
        with model.adapter.rows(z_RK, torch.arange(2)):
            mixed = model.hidden(ids_BT, torch.ones_like(ids_BT))
    assert torch.equal(base[0], mixed[0]) and not torch.equal(base[1], mixed[1])


def test_in_half_precision_a_small_change_of_z_is_not_lost(tiny_llama: Path, tmp_path: Path) -> None:
    """|z - 1| = 0.001, of which a folded bfloat16 weight keeps half; and so no mixture is folded."""
    folder = write("llama", tiny_llama, tmp_path / "half", torch.bfloat16)
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


def test_an_engine_that_computes_something_else_does_not_serve(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decompose(str(tiny_llama), tmp_path / "factors")
    model = load_model(str(tiny_llama), tmp_path / "factors", device="cpu")

    async def start() -> Engine:
        engine = OfflineEngine(model)
        wanted = await sample(engine)
        scores = tuple(score - 1 for score in wanted.scores)
        with pytest.raises(ModelError, match="computes other answers than the model .*differ by 1"):
            await compare(engine, model, replace(wanted, scores=scores))
        monkeypatch.setattr("t2ray.engine.serving.TOLERANCE", (-1.0, -1.0))
        config = EngineConfig(kv_tokens=1024, batch_tokens=64, batch_rows=8, tensor_parallel=2)
        return await serving_engine(model, config)

    assert isinstance(asyncio.run(start()), OfflineEngine)
    assert "engine.tensor_parallel: 2 changes nothing: transformers computes" in caplog.text
    assert "computes other answers" in caplog.text and "batches of whole answers instead" in caplog.text


def test_calls_that_come_while_a_batch_runs_make_the_next_and_the_loop_goes_on(
    tiny_llama: Path, tmp_path: Path
) -> None:
    decompose(str(tiny_llama), tmp_path / "factors")
    model = load_model(str(tiny_llama), tmp_path / "factors", device="cpu")
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)

    async def ask() -> tuple[list[Completion], int]:
        with ThreadPoolExecutor(1) as pool:
            engine = OfflineEngine(model, pool=pool)
            first = asyncio.ensure_future(engine.generate("17+25", BASE, sampling))
            while not engine.stats.running:
                await asyncio.sleep(0)
            others = [engine.generate(f"prompt {i}", BASE, sampling) for i in range(3)]
            return await asyncio.gather(first, *others), engine.stats.steps

    found, batches = asyncio.run(ask())
    alone = asyncio.run(OfflineEngine(model).generate("prompt 2", BASE, sampling))
    assert batches == 2 and found[3].token_ids == alone.token_ids


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
