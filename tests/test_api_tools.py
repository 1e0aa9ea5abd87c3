"""`response_format` and `tools` as OpenAI's client sends them, and calls as models write them."""

from __future__ import annotations

import json
import sys
from typing import Any

import needs
import openai
import pydantic
import pytest
from fake_backend import FakeBackend
from test_api import ASK, with_client

from t2ray.api.schema import ChatRequest
from t2ray.api.tools import CallReader, Tools, tools_of
from t2ray.engine.grammar import check

ADD = {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/number"}}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "adds",
            "strict": True,
            "parameters": {"type": "object", "properties": ADD, "$defs": {"number": {"type": "integer"}}},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
SAY: Any = {
    "type": "function",
    "function": {"name": "say", "parameters": {"type": "object", "properties": {"text": {"type": "string"}}}},
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def tools(style: str | None = "hermes", **more: Any) -> Tools:
    body = {"model": "t2ray", "messages": [{"role": "user", "content": "1+2"}], "tools": TOOLS} | more
    found = tools_of(ChatRequest.model_validate(body), style)
    assert found is not None
    return found


def read(text: str, tools: Tools, size: int) -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls that are found in `text`, given in pieces of `size` characters."""
    reader, shown, calls = CallReader(tools), "", []
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for i, piece in enumerate(pieces):
        more, found = reader.push(piece, last=i == len(pieces) - 1)
        shown += more
        calls += [(call.name, json.loads(call.arguments)) for call in found]
    return shown, calls


SUM = ("add", {"a": 1, "b": 2})


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("style", "text", "shown", "calls"),
    [
        ("hermes", CALL, "", [SUM]),
        ("hermes", f"Let me see: {CALL}", "Let me see: ", [SUM]),
        ("hermes", f"{CALL}\n{CALL}\n", "", [SUM, SUM]),
        ("hermes", CALL.removesuffix("\n</tool_call>"), "", [SUM]),  # models forget the end
        ("hermes", '<tool_call>[{"name": "add", "arguments": {"a": 1, "b": 2}}, {"name": "now"}]</tool_call>', "",
         [SUM, ("now", {})]),
        ("hermes", "a < b <tool> <tool_cal", "a < b <tool> <tool_cal", []),
        ("hermes", "<tool_call>no JSON</tool_call> and more", "<tool_call>no JSON</tool_call> and more", []),
        ("hermes", '<tool_call>{"name": "add", "argu', '<tool_call>{"name": "add", "argu', []),
        ("hermes", '{"name": "add", "arguments": {}}', '{"name": "add", "arguments": {}}', []),
        ("llama", '{"name": "add", "parameters": {"a": 1, "b": 2}}', "", [SUM]),
        ("llama", ' \n{"name": "add", "arguments": {"a": 1, "b": 2}}', "", [SUM]),
        ("llama", '{"name": "delete", "parameters": {}}', '{"name": "delete", "parameters": {}}', []),
        ("llama", '{"sum": 3}', '{"sum": 3}', []),
        ("llama", 'It is {"name": "add", "parameters": {}}', 'It is {"name": "add", "parameters": {}}', []),
        ("python", "[add(a=1, b=2)]", "", [SUM]),
        ("python", "\n[add(a=1, b=2), now()]\n", "", [SUM, ("now", {})]),
        ("python", "[add(a=[1, -2.5, true], b={'x': (None, 'é\\n')})]", "",
         [("add", {"a": [1, -2.5, True], "b": {"x": [None, "é\n"]}})]),
        ("python", "[1] says so", "[1] says so", []),
        ("python", "[]", "[]", []),
        ("python", "[delete(a=1)]", "[delete(a=1)]", []),
        ("python", "[add(1, 2)]", "[add(1, 2)]", []),
        ("python", "[add(**{'a': 1})]", "[add(**{'a': 1})]", []),
        ("python", "[add(a=open('/etc/passwd'))]", "[add(a=open('/etc/passwd'))]", []),
        ("python", "[add(a=1e999)]", "[add(a=1e999)]", []),
        ("python", "[" * 999, "[" * 999, []),
        ("python", "I would [add(a=1)]", "I would [add(a=1)]", []),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}}, {"name": "now"}]', "",
         [SUM, ("now", {})]),
        ("mistral", 'Yes.[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]now[CALL_ID]a1B2c3D4e[ARGS]{}', "Yes.",
         [SUM, ("now", {})]),
        ("mistral", '[TOOL_CALLS]add{"a": 1, "b": 2}', "", [SUM]),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": ', '[TOOL_CALLS]add[ARGS]{"a": ', []),
        ("mistral", "a [TOOL] is [TOOL_CAL", "a [TOOL] is [TOOL_CAL", []),
        ("mistral", '[{"name": "add", "arguments": {}}]', '[{"name": "add", "arguments": {}}]', []),
        ("xml", "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n"
         "</function>\n</tool_call>", "", [SUM]),
        ("xml", "Well: <tool_call><function=now></function><function=add><parameter=a>1<parameter=b>2</tool_call>",
         "Well: ", [("now", {}), SUM]),
        ("xml", '<tool_call><function=say><parameter=text>\n\n1 < 2\n\n</parameter><parameter=loud>True</parameter>'
         '<parameter=to>["a"]</parameter></function></tool_call>', "",
         [("say", {"text": "\n1 < 2\n", "loud": True, "to": ["a"]})]),
        ("xml", "<tool_call>add 1 2</tool_call>", "<tool_call>add 1 2</tool_call>", []),
        ("xml", "<tool_call><function=add>1, 2</function></tool_call>",
         "<tool_call><function=add>1, 2</function></tool_call>", []),
    ],
)  # fmt: skip
def test_calls_are_found_however_the_text_comes_and_nothing_else_is_lost(
    style: str, text: str, shown: str, calls: list[Any], size: int
) -> None:
    assert read(text, tools(style, tools=[*TOOLS, SAY]), size) == (shown, calls)


def test_mistral_gets_ids_that_its_templates_take() -> None:
    _, (call,) = CallReader(tools("mistral")).push('[TOOL_CALLS]add[ARGS]{"a": 1}', last=True)
    assert len(call.id) == 9 and call.id.isalnum()


@pytest.mark.parametrize("style", ["hermes", "llama", "python", "mistral", "xml", None])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_the_grammar_of_a_demanded_call_takes_calls_that_are_then_found_and_no_other_text(
    style: str | None, choice: Any
) -> None:
    llguidance = needs.extra("llguidance", "structured")

    held = tools(style, tool_choice=choice)
    grammar = held.grammar(None)
    assert grammar is not None
    check(grammar)
    key = "parameters" if style == "llama" else "arguments"
    call = f'{{"name": "add", "{key}": {{"a": 1, "b": 2}}}}'
    text = f"<tool_call>\n{call}\n</tool_call>" if style == "hermes" else call
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
    assert matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()
    assert read(text, held, 5) == ("", [SUM])
    for wrong in ("It is 3.", text.replace('"add"', '"delete"'), text.replace("1", '"one"'), text.replace("2", "[]")):
        fresh = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0)
        assert fresh.validate_tokens(list(wrong.encode())) < len(wrong)
    now = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0)
    other = text.replace('"add"', '"now"').replace('{"a": 1, "b": 2}', "{}")
    assert (now.validate_tokens(list(other.encode())) == len(other)) == (choice == "required")


def test_a_form_beside_tools_leaves_both_ways_open() -> None:
    llguidance = needs.extra("llguidance", "structured")

    grammar = tools().grammar('start: "yes" | "no"')
    assert grammar is not None
    for text in ("yes", CALL):
        matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
        assert matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


def test_a_call_comes_whole_and_in_a_stream_and_its_result_goes_back() -> None:
    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        backend.tools, backend.says = "hermes", tuple(f"Let me see. {CALL}")
        ask: dict[str, Any] = {"model": "t2ray:math", "messages": ASK, "tools": TOOLS}
        answer = await client.chat.completions.create(**ask)
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see. "
        (call,) = choice.message.tool_calls or []
        assert call.type == "function" and json.loads(call.function.arguments) == {"a": 1, "b": 2}
        chunks = [chunk async for chunk in await client.chat.completions.create(**ask, stream=True)]
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(delta.content or "" for delta in deltas) == "Let me see. "
        (streamed,) = [call for delta in deltas for call in delta.tool_calls or []]
        assert (streamed.index, streamed.function and streamed.function.name) == (0, "add")
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        offered = backend.calls[0][0][0]
        assert offered.role == "tools" and [tool["function"]["name"] for tool in json.loads(offered.content)] == [
            "add",
            "now",
        ]
        assert "strict" not in offered.content

        backend.says = ("3",)
        result = {"role": "tool", "tool_call_id": call.id, "content": "3"}
        again = [*ASK, choice.message.model_dump(exclude_none=True), result]
        done = await client.chat.completions.create(**ask | {"messages": again, "tool_choice": "none"})
        assert done.choices[0].message.content == "3" and done.choices[0].message.tool_calls is None
        turns = backend.calls[-1][0]
        assert [turn.role for turn in turns] == ["user", "assistant", "tool"]
        assert json.loads(turns[1].calls)[0]["id"] == turns[2].call_id == call.id

    with_client(work)


def test_a_form_reaches_the_engine_as_a_grammar_and_the_client_s_own_parser_reads_the_answer() -> None:
    needs.extra("llguidance", "structured")

    class Sum(pydantic.BaseModel):
        value: int

    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        backend.says = ('{"value": 42}',)
        parsed = await client.chat.completions.parse(model="t2ray", messages=ASK, response_format=Sum)
        assert parsed.choices[0].message.parsed == Sum(value=42)
        assert '"value"' in (backend.calls[-1][2].grammar or "")
        for form, held in (("json_object", True), ("text", False)):
            await client.chat.completions.create(model="t2ray", messages=ASK, response_format={"type": form})  # type: ignore[misc]
            assert (backend.calls[-1][2].grammar is not None) == held
        await client.completions.create(
            model="t2ray", prompt="a", extra_body={"response_format": {"type": "json_object"}}
        )
        assert backend.calls[-1][2].grammar is not None

    with_client(work)


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"tools": TOOLS}, "tools", "defines no tools"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools", "one name"),
        ({"tool_choice": "required"}, "tool_choice", "needs 'tools'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "no tool"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs it"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
         "response_format", "Unimplemented keys"),
        ({"messages": [{"role": "tool", "content": "3"}]}, "messages[0].tool_call_id", "missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "a", "arguments": ""}}]}]},
         "messages[0].tool_calls", "is for the role 'assistant'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(asked: dict[str, Any], param: str, said: str) -> None:
    if said == "Unimplemented keys":
        needs.extra("llguidance", "structured")

    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        with pytest.raises(openai.BadRequestError, match=said) as refused:
            await client.chat.completions.create(**{"model": "t2ray", "messages": ASK} | asked)
        assert refused.value.param == param
        assert backend.calls == []

    with_client(work)


def test_without_the_library_a_form_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    check.cache_clear()

    async def work(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
        with pytest.raises(openai.BadRequestError, match=r"t2ray\[structured\]"):
            await client.chat.completions.create(model="t2ray", messages=ASK, response_format={"type": "json_object"})

    with_client(work)
