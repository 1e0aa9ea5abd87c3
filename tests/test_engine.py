"""The engine: what shares a batch changes no answer; sampling, ends and scores are what a plain forward pass says."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import load_as, random_z, together
from torch import Tensor

from t2ray.adapters.model import Model
from t2ray.core import Completion, ConfigError, Mixture, SamplingParams, UnknownExpert, user
from t2ray.engine import batches
from t2ray.engine.offline import OfflineEngine
from t2ray.engine.sampling import RowSampler

MIXTURES = [Mixture.parse(text) for text in ("base", "math", "code", "math:0.6,code:0.4", "base", "math")]
PROMPTS = ["2+2", "tell me something long about nothing", "a", "why?", "b b b", "return n"]
GREEDY = [SamplingParams(max_tokens=n) for n in (6, 12, 3, 9, 12, 1)]
SAMPLED = [SamplingParams(max_tokens=p.max_tokens, temperature=1.0, seed=i) for i, p in enumerate(GREEDY)]
LABELS = ("math", "code", "x", "others than these")


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_as(torch.float32, tiny_llama, tmp_path_factory.mktemp("engine"))


@pytest.fixture
def model(loaded: Model) -> Iterator[Model]:
    loaded.adapter.bank = {"math": random_z(loaded.adapter.size, 1), "code": random_z(loaded.adapter.size, 2)}
    yield loaded
    loaded.adapter.bank = {}


def generate(model: Model, jobs: Any, **limits: int) -> list[Completion]:
    engine = OfflineEngine(model, **limits)
    return together(*(engine.generate(user(prompt), mixture, sampling) for prompt, mixture, sampling in jobs))


def jobs(sampling: list[SamplingParams]) -> list[tuple[str, Mixture, SamplingParams]]:
    return list(zip(PROMPTS, MIXTURES, sampling, strict=True))


def logprobs(model: Model, mixture: Mixture, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """Of each token of `answer`, by one forward pass without a cache or padding, (N,)."""
    with torch.no_grad(), model.adapter.rows(model.adapter.mix(mixture)[None]):
        logits = model.hf(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


# ----------------------------------------------------------------------------------------------------------- invariance


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_mixed_batch_gives_each_row_what_it_gets_alone(model: Model, sampling: list[SamplingParams]) -> None:
    mixed = generate(model, jobs(sampling))
    alone = [generate(model, [job])[0] for job in jobs(sampling)]
    assert [c.token_ids for c in mixed] == [c.token_ids for c in alone]
    assert [c.text for c in mixed] == [c.text for c in alone]
    for a, b in zip(mixed, alone, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert (a.mixture, a.prompt_ids, a.finish_reason) == (b.mixture, b.prompt_ids, b.finish_reason)


def test_mixtures_and_seeds_do_make_a_difference(model: Model) -> None:
    """Else the invariances would hold of an engine that ignores both."""
    texts = [c.text for c in generate(model, [("why?", m, GREEDY[1]) for m in dict.fromkeys(MIXTURES)])]
    assert len(set(texts)) == 4
    seeds = [SamplingParams(max_tokens=12, temperature=1.0, seed=s) for s in range(8)]
    assert len({c.text for c in generate(model, [("why?", Mixture.base(), s) for s in seeds])}) == 8


def test_one_seed_gives_one_text_whatever_else_is_in_the_batch(model: Model) -> None:
    fixed = ("why?", Mixture.parse("math"), SamplingParams(max_tokens=10, temperature=0.9, top_p=0.95, seed=3))
    others = [(f"other {i}", MIXTURES[i], SamplingParams(max_tokens=30, temperature=0.5 * i, seed=i)) for i in range(5)]
    first, *_ = generate(model, [fixed])
    for rest in ([others[0]], others, [fixed, *others[2:]]):
        assert generate(model, [fixed, *rest])[0].token_ids == first.token_ids
        assert generate(model, [*rest, fixed])[-1].token_ids == first.token_ids


@pytest.mark.parametrize("limits", [{"max_batch_rows": 2}, {"max_batch_rows": 1}, {"max_batch_tokens": 40}])
def test_splitting_a_batch_changes_nothing(model: Model, limits: dict[str, int]) -> None:
    whole, split = generate(model, jobs(SAMPLED)), generate(model, jobs(SAMPLED), **limits)
    assert [c.token_ids for c in split] == [c.token_ids for c in whole]
    scores = [score(model, PROMPTS, LABELS, MIXTURES, **some) for some in ({}, limits)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)


def test_calls_that_are_awaited_together_share_batches_within_the_limits(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    plain = model.hf.generate
    monkeypatch.setattr(model.hf, "generate", lambda ids, **kw: (sizes.append(len(ids)), plain(ids, **kw))[1])
    generate(model, jobs(GREEDY))
    generate(model, jobs(GREEDY), max_batch_rows=4)
    assert sizes == [6, 4, 2]


def test_folding_or_not_gives_the_same_tokens(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [(prompt, Mixture.parse("math"), sampling) for prompt, sampling in zip(PROMPTS, SAMPLED, strict=True)]
    model.adapter.bank["math"] = random_z(model.adapter.size, 9)  # one that no test before has folded
    monkeypatch.setattr(model.adapter, "tokens_to_fold", lambda: 10**9)
    factored = generate(model, batch)
    assert not model.adapter.is_folded(model.adapter.mix(Mixture.parse("math")))
    monkeypatch.setattr(model.adapter, "tokens_to_fold", lambda: 0)
    folded = generate(model, batch)
    assert model.adapter.is_folded(model.adapter.mix(Mixture.parse("math")))
    assert [c.token_ids for c in folded] == [c.token_ids for c in factored]


def test_experts_that_are_added_change_no_answer_bit_for_bit(model: Model) -> None:
    before = generate(model, jobs(SAMPLED)), score(model, PROMPTS, LABELS, MIXTURES)
    model.adapter.bank |= {f"new-{i}": random_z(model.adapter.size, 50 + i) for i in range(5)}
    assert (generate(model, jobs(SAMPLED)), score(model, PROMPTS, LABELS, MIXTURES)) == before


def test_nothing_is_recorded_for_a_gradient(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    plain = model.hf.forward
    monkeypatch.setattr(
        model.hf, "forward", lambda *a, **kw: (seen.append(torch.is_grad_enabled()), plain(*a, **kw))[1]
    )
    model.adapter.bank["math"].requires_grad_()
    generate(model, jobs(GREEDY)[:2])
    score(model, PROMPTS[:2], LABELS, MIXTURES[:2])
    assert seen and not any(seen)


# ------------------------------------------------------------------------------------------------------ values and ends


def test_logprobs_are_those_of_a_plain_forward_pass(model: Model) -> None:
    hot = [SamplingParams(max_tokens=10, temperature=t, top_p=p, seed=5) for t, p in ((0, 1), (1, 1), (3.0, 0.7))]
    for done in generate(model, [("why?", mixture, s) for mixture in MIXTURES[:4] for s in hot]):
        expected = logprobs(model, done.mixture, done.prompt_ids, done.token_ids)
        assert done.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_greedy_takes_the_likeliest_token(model: Model) -> None:
    for done in generate(model, jobs(GREEDY)):
        with torch.no_grad(), model.adapter.rows(model.adapter.mix(done.mixture)[None]):
            logits = model.hf(input_ids=torch.tensor([done.prompt_ids + done.token_ids])).logits[0]
        assert tuple(logits[len(done.prompt_ids) - 1 : -1].argmax(-1).tolist()) == done.token_ids


def test_each_row_ends_at_its_own_limit_or_its_end_token(model: Model) -> None:
    """Hot enough that some answers end by themselves, and that some hold the padding token as any other."""
    batch = [
        ("why?", MIXTURES[i % 4], SamplingParams(max_tokens=8 + i % 40, temperature=9.0, seed=i)) for i in range(64)
    ]
    done = generate(model, batch)
    eos, pad = model.chat.eos_ids[0], model.chat.pad_id
    for completion, (_, _, sampling) in zip(done, batch, strict=True):
        assert eos not in completion.token_ids[:-1]
        ended = completion.token_ids[-1] == eos
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.token_ids) == sampling.max_tokens
    assert {c.finish_reason for c in done} == {"stop", "length"}
    assert any(pad in c.token_ids[:-1] for c in done)


def test_each_row_ends_at_its_own_stop_texts(model: Model) -> None:
    free = generate(model, [(p, m, SamplingParams(max_tokens=12)) for p, m in zip(PROMPTS, MIXTURES, strict=True)])
    stops = [(c.text[4:6], "never, ever") if i % 2 else () for i, c in enumerate(free)]
    batch = [
        (prompt, mixture, SamplingParams(max_tokens=12, stop=stop))
        for prompt, mixture, stop in zip(PROMPTS, MIXTURES, stops, strict=True)
    ]
    for done, whole, stop in zip(generate(model, batch), free, stops, strict=True):
        if not stop:
            assert done == whole
            continue
        assert done.finish_reason == "stop"
        assert done.text == whole.text[: whole.text.index(stop[0])]
        n = len(done.token_ids)
        assert done.token_ids == whole.token_ids[:n] and len(done.logprobs) == n
        assert stop[0] in model.chat.decode(done.token_ids)  # the last token completes the text, none before it does
        assert stop[0] not in model.chat.decode(done.token_ids[:-1])


def test_a_stop_adds_no_token_where_padding_is_the_end_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's tokenizers have no padding token: the end token fills a row after its stop, unsampled."""
    monkeypatch.setattr(model.chat, "pad_id", model.chat.eos_ids[0])
    whole, other = generate(model, [(prompt, Mixture.base(), GREEDY[1]) for prompt in PROMPTS[:2]])
    stop = SamplingParams(max_tokens=12, stop=(whole.text[3],))
    done, _ = generate(model, [(PROMPTS[0], Mixture.base(), stop), (PROMPTS[1], Mixture.base(), GREEDY[1])])
    assert done.token_ids == whole.token_ids[: len(done.token_ids)] and model.chat.eos_ids[0] not in done.token_ids
    assert done.finish_reason == "stop" and done.text == whole.text[: whole.text.index(whole.text[3])]


def test_what_does_not_fit_is_refused_and_fails_its_own_caller_alone(model: Model) -> None:
    engine = OfflineEngine(model)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(
            engine.generate(user("x" * 600), Mixture.base(), GREEDY[0]),
            engine.generate(user("why?"), Mixture.parse("mth"), GREEDY[0]),
            engine.score(user("x" * 508), ("a", "bcd"), Mixture.base()),
            engine.generate(user("why?"), Mixture.parse("math"), GREEDY[0]),
            return_exceptions=True,
        )

    with pytest.raises(ConfigError, match="it has no tokens"):
        asyncio.run(engine.generate("", Mixture.base(), GREEDY[0]))
    long, unknown, label, done = asyncio.run(all_of_them())
    assert isinstance(long, ConfigError) and isinstance(unknown, UnknownExpert) and isinstance(label, ConfigError)
    assert str(long) == (
        "a prompt of 603 tokens and 6 for the answer exceed the model's context of 512; "
        "shorten the prompt or lower max_tokens"
    )
    assert done.token_ids == generate(model, [("why?", Mixture.parse("math"), GREEDY[0])])[0].token_ids
    assert engine.fits(user("x" * 503), 6) and not engine.fits(user("x" * 504), 6)


# ------------------------------------------------------------------------------------------------------------- sampling

LOGITS = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()


def drawn(sampling: SamplingParams, rows: int = 4000) -> list[float]:
    """The share of each token of `LOGITS` in `rows` first tokens, seeds 0, 1, ..."""
    params = [replace(sampling, seed=i, max_tokens=1) for i in range(rows)]
    scores = RowSampler(params, torch.device("cpu"))(torch.zeros(rows, 1, dtype=torch.long), LOGITS.repeat(rows, 1))
    assert int(scores.isfinite().sum()) == rows  # one token a row
    counts = Counter(scores.argmax(-1).tolist())
    return [counts[token] / rows for token in range(4)]


@pytest.mark.parametrize(
    ("temperature", "others", "expected"),
    [
        (1.0, {}, [0.5, 0.25, 0.125, 0.125]),
        (0.5, {}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),  # p^2, normalised
        (1.0, {"top_p": 0.75}, [2 / 3, 1 / 3, 0.0, 0.0]),  # the two that reach 0.75
        (1.0, {"top_p": 0.8}, [4 / 7, 2 / 7, 1 / 7, 0.0]),  # the third reaches beyond 0.8
        (1.0, {"top_p": 0.5}, [1.0, 0.0, 0.0, 0.0]),
        (1.0, {"top_p": 1e-60}, [1.0, 0.0, 0.0, 0.0]),  # the likeliest stays
        (0.5, {"top_p": 0.8}, [0.8, 0.2, 0.0, 0.0]),  # the temperature first
        (0.0, {}, [1.0, 0.0, 0.0, 0.0]),
        (1.0, {"top_k": 2}, [2 / 3, 1 / 3, 0.0, 0.0]),
        (1.0, {"top_k": 9}, [0.5, 0.25, 0.125, 0.125]),
        (1.0, {"min_p": 0.3}, [2 / 3, 1 / 3, 0.0, 0.0]),  # at least 0.15
        (0.5, {"min_p": 0.3}, [1.0, 0.0, 0.0, 0.0]),  # of p^2: at least 0.218
        (1.0, {"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0.0, 0.0]),  # of the three, two reach 6/7
        (1.0, {"logit_bias": ((3, math.log(4)), (1, -100.0))}, [4 / 9, 0.0, 1 / 9, 4 / 9]),
        (0.0, {"logit_bias": ((2, 5.0),)}, [0.0, 0.0, 1.0, 0.0]),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(
    temperature: float, others: dict[str, Any], expected: list[float]
) -> None:
    rows = 4000
    shares = drawn(SamplingParams(temperature=temperature, **others), rows)
    assert [share for share, p in zip(shares, expected, strict=True) if p == 0] == [0.0] * expected.count(0.0)
    chi2 = sum(rows * (share - p) ** 2 / p for share, p in zip(shares, expected, strict=True) if p)
    assert chi2 < 16.3  # 3 degrees of freedom: a right sampler passes 999 of 1000 seeds, and the seeds are fixed


def test_a_uniform_number_at_either_end_never_picks_an_impossible_token() -> None:
    sampler = RowSampler([SamplingParams(temperature=1.0, seed=0, max_tokens=1)] * 2, torch.device("cpu"))
    sampler.uniform_BT = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    logits = torch.tensor([-math.inf, 0.0, 0.0, -math.inf]).repeat(2, 1)
    assert sampler(torch.zeros(2, 1, dtype=torch.long), logits).argmax(-1).tolist() == [1, 2]


def test_penalties_are_by_the_tokens_of_the_answer_alone_and_not_in_its_logprobs() -> None:
    params = [SamplingParams(frequency_penalty=0.5), SamplingParams(presence_penalty=1.0), SamplingParams()]
    sampler = RowSampler(params, torch.device("cpu"))
    logits = torch.tensor([1.2, 1.0, 0.0, 0.0]).repeat(3, 1)
    ids, chosen = torch.zeros(3, 5, dtype=torch.long), []  # a prompt full of the likeliest token
    for _ in range(4):
        chosen.append(sampler(ids, logits).argmax(-1))
        ids = torch.cat([ids, chosen[-1][:, None]], 1)
    # once 0 is in the answer, it has 1.2 - 0.5 and then 1.2 - 1.0; present or not is all that the second row counts
    assert torch.stack(chosen, 1).tolist() == [[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    logprob = torch.stack(sampler.logprobs, 1)
    assert torch.allclose(logprob, logits.log_softmax(-1).gather(-1, torch.stack(chosen, 1)))


def test_recorded_logprobs_are_at_temperature_one() -> None:
    sampler = RowSampler([SamplingParams(temperature=5.0, top_p=0.5, seed=0, max_tokens=1)], torch.device("cpu"))
    token = int(sampler(torch.zeros(1, 1, dtype=torch.long), LOGITS[None]).argmax())
    assert float(sampler.logprobs[0]) == pytest.approx(float(LOGITS[token]))


# -------------------------------------------------------------------------------------------------------------- scoring


def score(
    model: Model, prompts: list[str], labels: tuple[str, ...], mixtures: list[Mixture], **limits: int
) -> list[float]:
    """All scores, flat."""
    engine = OfflineEngine(model, **limits)
    rows = together(*(engine.score(user(p), labels, m) for p, m in zip(prompts, mixtures, strict=True)))
    return [value for row in rows for value in row]


@pytest.mark.parametrize("labels", [LABELS, ("a", "b", "c"), ("only one",)], ids=["long", "short", "one"])
def test_a_score_is_the_log_likelihood_by_a_plain_forward_pass(model: Model, labels: tuple[str, ...]) -> None:
    expected = [
        float(logprobs(model, mixture, model.chat.encode(user(prompt)), model.chat.encode_answer(label)).sum())
        for prompt, mixture in zip(PROMPTS, MIXTURES, strict=True)
        for label in labels
    ]
    assert score(model, PROMPTS, labels, MIXTURES) == pytest.approx(expected, abs=1e-3)


def test_a_prompt_that_is_read_has_the_log_likelihoods_by_a_plain_forward_pass(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, engine = "why? é 42 " * 3, OfflineEngine(model)
    ids = model.chat.encode_text(text)
    (whole,) = together(engine.read(text, Mixture.parse("math"), 3))
    assert "".join(token.text for token in whole) == text and [token.id for token in whole] == list(ids)
    assert math.isnan(whole[0].logprob) and whole[0].top == ()
    monkeypatch.setattr(model.chat.tokenizer, "chat_template", None)  # else a label ends with the end of the turn
    ((score,),) = together(engine.score(ids[:1], (text[1:],), Mixture.parse("math")))
    assert sum(token.logprob for token in whole[1:]) == pytest.approx(score, abs=1e-3)
    assert all(len(token.top) == 3 and token.top[0].logprob >= token.logprob for token in whole[1:])
    monkeypatch.setattr(batches, "READ_TOKENS", 7)
    pieces, base = together(engine.read(ids, Mixture.parse("math"), 3), engine.read(ids, Mixture.base(), 0))
    assert [token.logprob for token in pieces[1:]] == pytest.approx([token.logprob for token in whole[1:]], abs=1e-4)
    assert [token.logprob for token in base[1:]] != pytest.approx([token.logprob for token in whole[1:]], abs=1e-2)


@pytest.mark.parametrize("ends", [["", "", "", "", ""], ["a", "bc", "", "a", "def"]], ids=["equal", "differing"])
def test_what_prompts_begin_with_in_common_is_still_each_mixtures_own(model: Model, ends: list[str]) -> None:
    prompts, mixtures = [f"what all of the prompts begin with {end}" for end in ends], MIXTURES[:5]
    expected = [
        float(logprobs(model, mixture, model.chat.encode(user(prompt)), model.chat.encode_answer(label)).sum())
        for prompt, mixture in zip(prompts, mixtures, strict=True)
        for label in LABELS
    ]
    assert score(model, prompts, LABELS, mixtures) == pytest.approx(expected, abs=1e-3)
    alike = score(model, prompts, LABELS, [mixtures[1]] * 5)
    assert alike[4:8] == pytest.approx(expected[4:8], abs=1e-3)


def test_labels_of_one_token_need_no_second_pass(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a chat template an answer has no end token: single letters are read off the prompt's last logits."""
    monkeypatch.setattr(model.chat.tokenizer, "chat_template", None)
    passes: list[int] = []
    plain = model.hf.forward
    monkeypatch.setattr(model.hf, "forward", lambda *a, **kw: (passes.append(1), plain(*a, **kw))[1])
    values = score(model, PROMPTS, ("A", "B"), MIXTURES)
    assert len(passes) == 1
    expected = [
        float(logprobs(model, mixture, model.chat.encode(user(prompt)), model.chat.encode_answer(label)).sum())
        for prompt, mixture in zip(PROMPTS, MIXTURES, strict=True)
        for label in ("A", "B")
    ]
    assert values == pytest.approx(expected, abs=1e-4)


def test_a_label_scores_the_same_beside_others_and_alone(model: Model) -> None:
    mixtures = MIXTURES[:4]
    batch = score(model, PROMPTS[:4], LABELS, mixtures)
    for i, (prompt, mixture) in enumerate(zip(PROMPTS[:4], mixtures, strict=True)):
        for j, label in enumerate(LABELS):
            assert score(model, [prompt], (label,), [mixture]) == pytest.approx([batch[4 * i + j]], abs=1e-3)


def test_generations_and_scorings_may_be_awaited_together(model: Model) -> None:
    engine = OfflineEngine(model)
    done, scores, more = together(
        engine.generate(user("why?"), MIXTURES[1], GREEDY[0]),
        engine.score(user("why?"), LABELS, MIXTURES[2]),
        engine.score(user("a"), ("x",), MIXTURES[1]),
    )
    assert done.token_ids == generate(model, [("why?", MIXTURES[1], GREEDY[0])])[0].token_ids
    assert scores == pytest.approx(score(model, ["why?"], LABELS, [MIXTURES[2]]), abs=1e-3)
    assert more == pytest.approx(score(model, ["a"], ("x",), [MIXTURES[1]]), abs=1e-3)
