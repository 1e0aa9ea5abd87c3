"""Reasoning of a thinking model, apart from its answer: in the text as it grows, and over HTTP."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import needs
import openai
import pytest
from fake_backend import FakeBackend
from test_api import ASK, with_client
from test_api_tools import CALL, TOOLS

from t2ray.api.reasoning import ReasoningReader, ThoughtCounter
from t2ray.core import Token


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\nHm.\n\nSo 3.\n</think>\n\nIt is 3.\n", "Hm.\n\nSo 3.", "It is 3.\n"),
        ("\n<think>Hm</think>3", "Hm", "3"),
        ("<think>\n\n</think>\n\n3", "", "3"),
        ("<think>\nHm, a <b> </thin", "Hm, a <b> </thin", ""),
        ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
        ("[THINK]a</think>b[/THINK]c", "a</think>b", "c"),
        ("[THIN", "", "[THIN"),
        ("It is <think>3</think>", "", "It is <think>3</think>"),
        ("\n\nIt is 3", "", "\n\nIt is 3"),
        ("<thin", "", "<thin"),
        ("", "", ""),
    ],
)
def test_reasoning_is_told_from_the_answer_however_the_text_comes(
    text: str, reasoning: str, answer: str, size: int
) -> None:
    reader = ReasoningReader(True)
    pieces = [text[i : i + size] for i in range(0, len(text), size)] or [""]
    found = [reader.push(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    assert ["".join(parts) for parts in zip(*found, strict=True)] == [reasoning, answer]
    assert ReasoningReader(False).push(text, last=True) == ("", text)


@pytest.mark.parametrize(
    ("texts", "thinking", "count"),
    [
        (["<th", "ink>", "Hm", "</", "think>", "\n\n", "3"], False, 5),
        (["Hm", "</think>", "3"], True, 2),
        (["<think>", "Hm", "so"], False, 3),
        (["<think>", "a", "</think>b"], False, 3),
        (["It is ", "<think>", "3", "</think>"], False, 0),
        (["<thin", "k", " 3"], False, 0),
        ([], True, 0),
    ],
)
def test_the_tokens_of_the_reasoning_and_its_tags_are_counted(texts: list[str], thinking: bool, count: int) -> None:
    tokens = [Token(id=i, text=text, logprob=0.0) for i, text in enumerate(texts)]
    assert ThoughtCounter(True).push(tokens, thinking=thinking) == count
    grown = ThoughtCounter(True)
    for i, token in enumerate(tokens):
        grown.push([token], thinking=thinking and not i)
    assert grown.count == count
    assert ThoughtCounter(False).push(tokens, thinking=thinking) == 0


@pytest.mark.parametrize("opens", [False, True])
def test_reasoning_has_a_field_of_its_own_whole_and_in_a_stream_and_goes_back(opens: bool) -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        backend.thinks, backend.opens, backend.tools = True, opens, "hermes"
        backend.says = tuple(("" if opens else "<think>\n") + "Hm, so 3.\n</think>\n\nIt is 3. " + CALL)
        ask: dict[str, Any] = {"model": "t2ray:math", "messages": ASK, "tools": TOOLS}
        whole = await client.chat.completions.create(**ask)
        said: Any = whole.choices[0].message
        assert (said.reasoning_content, said.content) == ("Hm, so 3.", "It is 3. ")
        assert whole.usage and whole.usage.completion_tokens_details
        thoughts = whole.usage.completion_tokens_details.reasoning_tokens
        assert thoughts == len(("" if opens else "<think>\n") + "Hm, so 3.\n</think>")  # each letter is a token here
        assert [call.function.name for call in said.tool_calls] == ["add"]
        counted: Any = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = [chunk async for chunk in await client.chat.completions.create(**ask, **counted)]
        assert last.usage == whole.usage
        deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm, so 3."
        assert "".join(delta.content or "" for delta in deltas) == "It is 3. "
        assert deltas[0].role == "assistant" and chunks[-1].choices[0].finish_reason == "tool_calls"

        again = [*ASK, said.model_dump(), {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "3"}]
        await client.chat.completions.create(**ask | {"messages": again})
        assert [turn.reasoning for turn in backend.calls[-1][0]][-2:] == ["Hm, so 3.", ""]

        backend.thinks = False
        (choice,) = (await client.chat.completions.create(**ask)).choices
        assert "</think>" in (choice.message.content or "")

    with_client(work)


def test_what_is_held_to_a_form_and_what_continues_a_text_is_no_reasoning() -> None:
    needs.extra("llguidance", "structured")

    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        backend.thinks = backend.opens = True
        backend.says = ('{"a": 1}',)
        form: Any = {"type": "json_object"}
        held = await client.chat.completions.create(model="t2ray", messages=ASK, response_format=form)
        assert held.choices[0].message.content == '{"a": 1}'
        assert (await client.completions.create(model="t2ray:math", prompt="a")).choices[0].text == '{"a": 1}'

    with_client(work)


def test_responses_have_an_item_of_reasoning_that_clients_send_back() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        backend.thinks, backend.says = True, ("<think>", "Hm.", "</think>", "3")
        ask: dict[str, Any] = {"model": "t2ray:math", "input": "1+2"}
        answer = await client.responses.create(**ask)
        assert [item.type for item in answer.output] == ["reasoning", "message"] and answer.output_text == "3"
        async with client.responses.stream(**ask) as events:
            kinds = [event.type async for event in events if event.type.startswith("response.reasoning")]
            streamed = await events.get_final_response()
        assert kinds == ["response.reasoning_text.delta", "response.reasoning_text.done"]
        told = [[part["text"] for part in item["content"]] for item in streamed.model_dump()["output"]]
        assert told == [["Hm."], ["3"]] == [[part.text for part in item.content] for item in answer.output]  # type: ignore[union-attr]
        turns: list[Any] = [{"role": "user", "content": "1+2"}, *(item.model_dump() for item in answer.output)]
        await client.responses.create(**ask | {"input": [*turns, {"role": "user", "content": "and 4?"}]})
        sent = [(turn.role, turn.content, turn.reasoning) for turn in backend.calls[-1][0]]
        assert sent == [("user", "1+2", ""), ("assistant", "3", "Hm."), ("user", "and 4?", "")]

    with_client(work)


def test_what_a_request_says_to_the_chat_template_reaches_the_engine_and_is_checked() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        told = {"enable_thinking": False, "style": "brief"}
        extra: dict[str, Any] = {"chat_template_kwargs": told}
        await client.chat.completions.create(model="t2ray:math", messages=ASK, extra_body=extra)
        *turns, last = backend.calls[-1][0]
        assert last.role == "template" and json.loads(last.content) == told
        assert [turn.role for turn in turns] == ["user"]
        for wrong in ({"a": {"b": 1}}, [1], {f"k{i}": 1 for i in range(33)}):
            with pytest.raises(openai.BadRequestError, match="chat_template_kwargs"):
                await client.chat.completions.create(
                    model="t2ray:math", messages=ASK, extra_body={"chat_template_kwargs": wrong}
                )
        plain = {"model": "t2ray:math", "prompt": "a", "chat_template_kwargs": told}
        async with httpx.AsyncClient() as bare:
            refused = await bare.post(f"{client.base_url}completions", json=plain)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "chat_template_kwargs"

    with_client(work)
