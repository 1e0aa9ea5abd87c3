"""`/v1/responses` as OpenAI's newest client uses it."""

from __future__ import annotations

import json
from typing import Any

import needs
import openai
import pydantic
import pytest
from fake_backend import FakeBackend
from test_api import of, with_client

from t2ray.core import GenerationError

TOOL: Any = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def test_a_text_is_answered_and_says_how_it_was_made() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        answer = await client.responses.create(
            model="t2ray",
            input="what is 17+25",
            instructions="Be short.",
            max_output_tokens=5,
            temperature=0,
            store=False,
            include=["reasoning.encrypted_content"],
        )
        assert answer.output_text.startswith("math:1 answers")
        assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
        assert answer.usage and answer.usage.output_tokens == 5 and answer.usage.total_tokens == 10
        assert of(answer)["mixture"] == {"math": 1.0} and answer.id.startswith("resp_")
        prompt, _, sampling = backend.calls[-1]
        assert [(turn.role, turn.content) for turn in prompt] == [("system", "Be short."), ("user", "what is 17+25")]
        assert (sampling.max_tokens, sampling.temperature, sampling.to_end) == (5, 0, False)
        whole = await client.responses.create(model="t2ray:base", input="hello")
        assert whole.status == "completed" and whole.output[0].type == "message"

    with_client(work)


def test_a_stream_has_the_events_of_the_whole_answer() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        asked: dict[str, Any] = {"model": "t2ray:math", "input": "1+2"}
        whole = await client.responses.create(**asked)
        events = [event async for event in await client.responses.create(**asked, stream=True)]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events if event.type != "response.output_text.delta"]
        assert kinds == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert (
            "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
        )
        assert events[-1].response.output_text == whole.output_text
        assert events[-1].response.usage == whole.usage
        async with client.responses.stream(**asked) as stream:  # the client's own accumulation
            assert (await stream.get_final_response()).output_text == whole.output_text

    with_client(work)


def test_calls_and_their_results_are_items() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        backend.tools, backend.says = "hermes", ("I add. ", CALL[:20], CALL[20:])
        asked: dict[str, Any] = {"model": "t2ray:math", "input": "1+2", "tools": [TOOL]}
        answer = await client.responses.create(**asked)
        text, call = answer.output
        assert text.type == "message" and call.type == "function_call" and json.loads(call.arguments) == {"a": 1}
        async with client.responses.stream(**asked) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        assert [item.type for item in final.output] == ["message", "function_call"] and final.status == "completed"
        assert "response.function_call_arguments.done" in [event.type for event in events]

        backend.says = ("3",)
        items: Any = [
            {"role": "user", "content": [{"type": "input_text", "text": "1+2"}]},
            *[item.model_dump(exclude_none=True) for item in answer.output],
            {"type": "function_call_output", "call_id": call.call_id, "output": "3"},
        ]
        done = await client.responses.create(model="t2ray:math", input=items, tools=[TOOL], tool_choice="none")
        assert done.output_text == "3"
        prompt = backend.calls[-1][0]
        assert [turn.role for turn in prompt] == ["user", "assistant", "tool"]
        assert (
            prompt[1].content == "I add. " and json.loads(prompt[1].calls)[0]["id"] == call.call_id == prompt[2].call_id
        )

    with_client(work)


def test_a_form_is_parsed_by_the_client() -> None:
    needs.extra("llguidance", "structured")

    class Sum(pydantic.BaseModel):
        value: int

    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        backend.says = ('{"value": 42}',)
        answer = await client.responses.parse(model="t2ray", input="17+25", text_format=Sum)
        assert answer.output_parsed == Sum(value=42) and '"value"' in (backend.calls[-1][2].grammar or "")

    with_client(work)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
        ({"input": [{"type": "function_call_output", "output": "3"}]}, "input[0].call_id"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "text.format"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"max_output_tokens": 900, "input": "a " * 3500}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ],
)
def test_what_cannot_be_is_refused_by_this_body_s_names(asked: dict[str, Any], param: str) -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(**{"model": "t2ray", "input": "a"} | asked)
        assert refused.value.param == param
        assert "max_completion" not in str(refused.value) and "messages" not in str(refused.value)

    with_client(work)


def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        backend.failures["stream"], backend.break_after = GenerationError("the replica died"), 2
        with pytest.raises(openai.APIError, match="the replica died"):
            async for _ in await client.responses.create(model="t2ray:math", input="1+2", stream=True):
                pass

    with_client(work)
