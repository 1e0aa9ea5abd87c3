"""Functions that an answer may call: how a request offers them, holds the answer to a call, and finds calls in text.

| format of the chat template | a call, as the model writes it |
| --- | --- |
| `hermes` (Qwen, SmolLM2 and others) | `<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>` |
| `llama` (3.1 and later) | `{"name": "add", "parameters": {"a": 1}}` |
| none | `{"name": "add", "arguments": {"a": 1}}`, if the request asks for a call and so holds the answer to it |
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from t2ray.api.formats import FunctionBody, NamedTool, offer
from t2ray.api.limits import invalid
from t2ray.api.schema import ChatRequest, CompletionRequest
from t2ray.core import Message
from t2ray.engine.grammar import following

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function that a model asks to be called: `ToolCall(id="call-1", name="add", arguments='{"a": 1}')`."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What an answer may call: the functions, how calls are written (`tagged`, the `key` of the arguments), how many.

    With `forced` it is calls and nothing else.
    """

    offered: str
    functions: tuple[FunctionBody, ...]
    tagged: bool
    key: str
    forced: bool
    several: bool

    @property
    def message(self) -> Message:
        """What tells the chat template of them."""
        return Message(role="tools", content=self.offered)

    def grammar(self, answer: str | None) -> str | None:
        """The grammar of the request's answer: `answer` is its text's, and calls are an alternative or the only way."""
        if not self.forced and answer is None:
            return None
        rules = []
        for i, function in enumerate(self.functions):
            schema = function.parameters or {"type": "object", "additionalProperties": False}
            head = json.dumps(f'{{"name": "{function.name}", "{self.key}": ')
            rules.append(f'call_{i}: {head} arguments_{i} "}}"\narguments_{i}: {following(schema)}')
        one = " | ".join(f"call_{i}" for i in range(len(self.functions)))
        rules.append(f'one: "{BEGIN}" "\\n" any "\\n" "{END}"' if self.tagged else "one: any")
        rules.append(f"any: {one}")
        rules.append('calls: one ("\\n" one)*' if self.several and self.tagged else "calls: one")
        if self.forced or answer is None:
            return "\n".join(["start: calls", *rules])
        return "\n".join(["start: calls | text", answer.replace("start:", "text:", 1), *rules])


def tools_of(body: ChatRequest | CompletionRequest, style: str | None) -> Tools | None:
    """Returns what a request's answer may call; None if nothing.

    Args:
        style: how the model's chat template writes calls (`Chat.tools`).

    Raises:
        Refusal: 400, the model may choose whether to call something, and its template cannot tell it of tools.
    """
    if not isinstance(body, ChatRequest) or not body.tools or body.tool_choice == "none":
        return None
    choice = body.tool_choice
    forced = choice == "required" or isinstance(choice, NamedTool)
    if style is None and not forced:
        raise invalid(
            "this model's chat template defines no tools in a way that is known here (Hermes's, Llama 3's), so that it "
            "cannot choose one; name one by 'tool_choice' or say 'required' to hold the answer to a call, or 'none'",
            "tools",
            "unsupported_parameter",
        )
    named = choice.function.name if isinstance(choice, NamedTool) else None
    return Tools(
        offered=offer(body.tools),
        functions=tuple(tool.function for tool in body.tools if named in (None, tool.function.name)),
        tagged=style == "hermes",
        key="parameters" if style == "llama" else "arguments",
        forced=forced,
        several=named is None and body.parallel_tool_calls is not False,
    )


class CallReader:
    """Finds calls in a text that grows. What is no call goes on as text; nothing is lost."""

    def __init__(self, tools: Tools | None) -> None:
        self._tools = tools
        self._held = ""
        self._began = False

    def push(self, text: str, *, last: bool = False) -> tuple[str, tuple[ToolCall, ...]]:
        """Returns the text that can be shown and the calls that are whole, after some more text."""
        tools = self._tools
        if tools is None:
            return text, ()
        self._held += text
        return self._tagged(last) if tools.tagged else self._bare(tools, last)

    def _tagged(self, last: bool) -> tuple[str, tuple[ToolCall, ...]]:
        shown, calls = "", list[ToolCall]()
        while True:
            before, begin, inside = self._held.partition(BEGIN)
            if not begin:
                keep = 0 if last else _beginning(self._held, BEGIN)
                shown += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                break
            inside, end, after = inside.partition(END)
            if not end and not last:
                shown, self._held = shown + before, self._held[len(before) :]
                break
            found = _calls(inside)
            shown += before + ("" if found else begin + inside + end)
            calls += found
            self._held = after
        self._began = self._began or bool(calls)
        return ("" if self._began and shown.isspace() else shown), tuple(calls)

    def _bare(self, tools: Tools, last: bool) -> tuple[str, tuple[ToolCall, ...]]:
        """A whole answer is a call or none is: what begins as one is held until the end."""
        if not last and (self._held.lstrip()[:1] in ("", "{") and not self._began):
            return "", ()
        text, self._held, whole = self._held, "", not self._began
        self._began = True
        found = _calls(text) if whole else []
        names = {function.name for function in tools.functions}
        if found and all(call.name in names for call in found):
            return "", tuple(found)
        return text, ()


def _beginning(text: str, sign: str) -> int:
    """The length of the longest end of `text` that begins `sign`."""
    return next((n for n in range(min(len(sign) - 1, len(text)), 0, -1) if sign.startswith(text[-n:])), 0)


def _calls(text: str) -> list[ToolCall]:
    """The calls that a JSON text writes, one or a list of them; none if it is anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return []
    calls = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return []
        arguments: Any = item.get("arguments", item.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", name=item["name"], arguments=text))
    return calls
