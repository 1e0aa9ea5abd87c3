"""Answers of a real tokenizer that strips leading spaces: what the API shows of a text that goes on, token by token."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest
import torch
from small import load_as
from transformers import AutoTokenizer

from t2ray.adapters.factors import decompose
from t2ray.adapters.model import Model, load_model
from t2ray.api.shapes import ChatShape, TextShape
from t2ray.api.tools import Said
from t2ray.config.serve import EngineConfig
from t2ray.core import Completion, Mixture, SamplingParams, Token, user
from t2ray.engine.offline import OfflineEngine
from t2ray.engine.online import OnlineEngine
from t2ray.engine.text import TextStream
from t2ray.models.chat import Chat

ONCE = "Once upon"
TEXTS = (" a time", "a time", "  two spaces", "é日🙂 x", " ", "\n\nend", "日", " 🙂", "x\t<0x41>")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """stories260K: a SentencePiece tokenizer of 512 tokens, with bytes for what it has no token for."""
    source, factors = str(needs.real("models/stories260K")), tmp_path_factory.mktemp("stories")
    decompose(source, factors)
    return load_model(source, factors, device="cpu")


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[OnlineEngine]:
    engine = OnlineEngine(model, EngineConfig(kv_tokens=1024, batch_tokens=128))
    engine.start()
    yield engine
    engine.stop()


def answered(engine: OnlineEngine | OfflineEngine, sampling: SamplingParams) -> Completion:
    return asyncio.run(engine.generate(ONCE, Mixture.base(), sampling))


def test_a_text_goes_on_with_the_space_that_its_first_token_has(model: Model, engine: OnlineEngine) -> None:
    greedy = SamplingParams(max_tokens=12)
    answer = answered(engine, greedy)
    assert answer.text.startswith(" a time, there was")
    assert answered(OfflineEngine(model), greedy).text == answer.text
    cut = SamplingParams(max_tokens=12, stop=(" a",))
    assert answered(engine, cut).text == answered(OfflineEngine(model), cut).text == ""
    turn = asyncio.run(engine.generate(user(ONCE), Mixture.base(), greedy))
    assert turn.text == answer.text[1:]


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_add_up_to_the_text_and_their_bytes_to_its_bytes(tiny_llama: Path, text: str, continues: bool) -> None:
    stories = AutoTokenizer.from_pretrained(needs.real("models/stories260K"))
    for tokenizer in (AutoTokenizer.from_pretrained(tiny_llama), stories):
        chat = Chat(tokenizer, [2])
        ids = tokenizer(f"a{text}", add_special_tokens=False)["input_ids"][len(chat.before) :]
        stream, tokens, whole = TextStream(chat, (), continues=continues), [], ""
        for id in ids:
            whole += stream.push(id)
            tokens.append(Token(id=id, text=stream.added, logprob=-1.0, raw=chat.token(id)[1]))
        whole += stream.finish()
        assert whole == chat.decode(ids, continues=continues)
        assert whole.strip() == text.strip()
        answer = Completion(
            prompt_ids=(), tokens=tuple(tokens), text=whole, finish_reason="length", mixture=Mixture.base()
        )
        columns = TextShape().choice(0, Said(text=answer.text), answer.tokens, "length", None).logprobs
        assert columns is not None and "".join(columns.tokens) == whole
        for offset, token in zip(columns.text_offset, columns.tokens, strict=True):
            assert whole[offset : offset + len(token)] == token
        logprobs = ChatShape().choice(0, Said(text=answer.text), answer.tokens, "length", None).logprobs
        assert logprobs is not None
        assert bytes(byte for row in logprobs.content for byte in row.bytes).decode() == whole


def test_there_are_as_many_alternatives_as_were_asked_for(engine: OnlineEngine) -> None:
    """Of 512 tokens, the bytes of broken characters look alike, and so do letters and their bytes."""
    chat = engine.chat
    tokens = tuple(Token(id=i, text=chat.token(i)[0], logprob=-1.0, raw=chat.token(i)[1]) for i in range(512))
    answer = Completion(
        prompt_ids=(), tokens=(Token(id=0, text="", logprob=-1.0, top=tokens),), text="", finish_reason="length",
        mixture=Mixture.base(),
    )  # fmt: skip
    columns = TextShape().choice(0, Said(text=answer.text), answer.tokens, "length", None).logprobs
    assert columns is not None and len(columns.top_logprobs[0]) == 512
    assert {"bytes:\\xe6", " time", "</s>"} <= columns.top_logprobs[0].keys()
    answer = answered(engine, SamplingParams(max_tokens=3, top_logprobs=5))
    assert [len(token.top) for token in answer.tokens] == [5] * 3
    assert answer.tokens[0].top[0].text == answer.tokens[0].text == " a"


def test_the_end_token_adds_nothing_to_the_text(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_as(torch.float32, tiny_llama, tmp_path)
    engine = OnlineEngine(model, EngineConfig(kv_tokens=1024, batch_tokens=128))
    engine.start()
    try:
        many = [SamplingParams(max_tokens=60, temperature=1.0, seed=seed) for seed in range(8)]
        answers = [asyncio.run(engine.generate("ab", Mixture.base(), sampling)) for sampling in many]
    finally:
        engine.stop()
    assert any(answer.finish_reason == "stop" for answer in answers)
    for answer in answers:
        assert "".join(token.text for token in answer.tokens) == answer.text
