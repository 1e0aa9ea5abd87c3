"""Answers that follow a grammar, in both engines: rows of several mixtures and grammars share a batch."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from small import load_as, random_z
from waiting import GUARD_S

from t2ray.adapters.model import Model
from t2ray.config.serve import EngineConfig
from t2ray.core import ConfigError, Mixture, SamplingParams, joined, user
from t2ray.engine.grammar import check, following
from t2ray.engine.offline import OfflineEngine
from t2ray.engine.online import OnlineEngine
from t2ray.engine.protocol import Engine

NUMBER = {"type": "integer", "minimum": 100, "maximum": 999}
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bo"]}, "age": NUMBER},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHOICE = 'start: "yes" | "no"'
FITS: dict[str | None, Callable[[str], bool]] = {
    None: lambda text: True,
    CHOICE: lambda text: text in ("yes", "no"),
    f"start: {following(NUMBER)}": lambda text: 100 <= json.loads(text) <= 999,
    f"start: {following(PERSON)}": lambda text: (
        (value := json.loads(text)).keys() == {"name", "age"} and value["name"] in ("Ann", "Bo")
    ),
}
MIXTURES = [Mixture.parse(text) for text in ("math", "base", "math:0.5,code:-0.5")]


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    loaded = load_as(torch.float32, tiny_llama, tmp_path_factory.mktemp("grammar"))
    loaded.adapter.bank = {"math": random_z(loaded.adapter.size, 1), "code": random_z(loaded.adapter.size, 2)}
    return loaded


@pytest.fixture(autouse=True)
def _library() -> None:
    needs.extra("llguidance", "structured")


@asynccontextmanager
async def running(kind: str, model: Model) -> AsyncIterator[Engine]:
    engine: Engine = OfflineEngine(model) if kind == "offline" else OnlineEngine(model, EngineConfig(kv_tokens=4096))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def sampling(grammar: str | None, **more: Any) -> SamplingParams:
    tokens = 96 if grammar else 12
    return SamplingParams(**{"max_tokens": tokens, "temperature": 1.0, "seed": 5, "grammar": grammar} | more)


@pytest.mark.parametrize("kind", ["offline", "online"])
def test_every_row_follows_its_own_grammar_and_one_without_notices_nothing(kind: str, model: Model) -> None:
    jobs = [(mixture, grammar) for mixture in MIXTURES for grammar in FITS]

    async def main() -> None:
        async with running(kind, model) as engine:
            calls = [engine.generate(user("who?"), mixture, sampling(grammar)) for mixture, grammar in jobs]
            answers = await asyncio.gather(*calls)
            plain = [engine.generate(user("who?"), mixture, sampling(None)) for mixture in MIXTURES]
            alone = dict(zip(MIXTURES, await asyncio.gather(*plain), strict=True))
            for (mixture, grammar), answer in zip(jobs, answers, strict=True):
                assert FITS[grammar](answer.text), (grammar, answer.text)
                if grammar is None:
                    assert answer.token_ids == alone[mixture].token_ids
                else:
                    assert answer.finish_reason == "stop" and answer.token_ids[-1] in model.chat.eos_ids
            whole = answers[jobs.index((MIXTURES[0], f"start: {following(PERSON)}"))]
            stream = engine.stream(user("who?"), MIXTURES[0], sampling(f"start: {following(PERSON)}"))
            pieces = [piece async for piece in stream]
            assert joined(pieces).text == whole.text and joined(pieces).finish_reason == "stop"

    asyncio.run(asyncio.wait_for(main(), GUARD_S))


@pytest.mark.parametrize("kind", ["offline", "online"])
def test_a_grammar_holds_also_a_greedy_answer_with_biases_and_one_that_is_cut(kind: str, model: Model) -> None:
    async def main() -> None:
        async with running(kind, model) as engine:
            letters = [id for id in range(5, 90)]
            pushed = sampling(CHOICE, temperature=0.0, logit_bias=tuple((id, 100.0) for id in letters if id % 3))
            answer = await engine.generate(user("a"), MIXTURES[0], pushed)
            assert answer.text in ("yes", "no")
            assert all(logprob <= 0 for logprob in answer.logprobs)
            cut = await engine.generate(user("a"), MIXTURES[0], sampling(f"start: {following(PERSON)}", max_tokens=4))
            assert cut.finish_reason == "length" and cut.text.startswith("{")
            on = await engine.generate(user("a"), MIXTURES[0], sampling(CHOICE, ignore_eos=True, max_tokens=12))
            assert on.text in ("yes", "no") and len(on.tokens) == 12  # behind the answer, end tokens alone

    asyncio.run(asyncio.wait_for(main(), GUARD_S))


def test_a_grammar_that_shows_only_later_that_nothing_follows_it_fails_its_own_row(model: Model) -> None:
    endless = f"start: {following({'$ref': '#'})}"
    check(endless)

    async def main() -> None:
        async with running("online", model) as engine:
            calls = [engine.generate(user("a"), MIXTURES[0], sampling(grammar)) for grammar in (endless, CHOICE)]
            failed, answer = await asyncio.gather(*calls, return_exceptions=True)
            assert isinstance(failed, ConfigError) and "\n" not in str(failed) and "<" not in str(failed)
            assert not isinstance(answer, BaseException) and answer.text in ("yes", "no")

    asyncio.run(asyncio.wait_for(main(), GUARD_S))


@pytest.mark.parametrize(
    "grammar",
    [
        "nonsense",
        f"start: {following({'type': 'nonsense'})}",
        f"start: {following({'type': 'integer', 'minimum': 5, 'maximum': 3})}",
        f"start: {following({'type': 'array', 'uniqueItems': True})}",
        f"start: {following({'$ref': 'https://example.org/schema'})}",
        f"start: {following({'$ref': 'file:///etc/passwd'})}",
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused_in_one_line(grammar: str, model: Model) -> None:
    with pytest.raises(ConfigError, match="cannot be followed") as refused:
        check(grammar)
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="cannot be followed"):
        asyncio.run(OfflineEngine(model).generate(user("a"), Mixture.base(), sampling(grammar)))


def test_json_is_written_as_python_and_templates_write_it() -> None:
    assert check(f"start: {following({'type': 'boolean'})}") is None
    import llguidance

    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, f"start: {following({'type': 'array', 'items': NUMBER})}")
    assert matcher.consume_tokens(list(json.dumps([123, 456]).encode())) and matcher.is_accepting()
    matcher.reset()
    assert [matcher.validate_tokens(list(text)) for text in (b"[ 1", b"[\n", b"[123,4")] == [1, 1, 5]


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    check.cache_clear()
    with pytest.raises(ConfigError, match=r"t2ray\[structured\]"):
        check(CHOICE)
    with pytest.raises(ConfigError, match=r"t2ray\[structured\]"):
        asyncio.run(OfflineEngine(model).generate(user("a"), Mixture.base(), sampling(CHOICE)))
    assert asyncio.run(OfflineEngine(model).generate(user("a"), Mixture.base(), sampling(None, max_tokens=2))).tokens
