"""Functions that an answer may call: how a request offers them, holds the answer to a call, and finds calls in text.

| style of the chat template | a call, as the model writes it |
| --- | --- |
| `hermes` (Qwen and others) | `<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>` |
| `xml` (Qwen3-Coder) | `<tool_call><function=add><parameter=a>1</parameter></function></tool_call>` |
| `mistral` | `[TOOL_CALLS]` and then calls, to the end of the answer |
| `llama` (3.1 and later) | `{"name": "add", "parameters": {"a": 1}}` |
| `python` (Llama 3.2 and 4) | `[add(a=1)]` |
| none | `{"name": "add", "arguments": {"a": 1}}`, if the request asks for a call and so holds the answer to it |

An answer that is held to a form writes its calls as with none, but for `hermes` and `llama`. Not here: what stands
inside of a call (`calls.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from t2ray.api.calls import MISTRAL, ToolCall, json_calls, mistral_calls, python_calls, xml_calls
from t2ray.api.formats import FunctionBody, NamedTool, offer
from t2ray.api.limits import invalid
from t2ray.api.reasoning import ReasoningReader, beginning
from t2ray.api.schema import ChatRequest, CompletionRequest
from t2ray.core import Message
from t2ray.engine.grammar import following
from t2ray.grades import THINK

BEGIN, END = "<tool_call>", "</tool_call>"
SIGNS = {"hermes": (BEGIN, END), "xml": (BEGIN, END), "mistral": (MISTRAL, "")}
"""What stands before and after calls; without signs, calls are the whole answer or none are in it."""

HELD = ("hermes", "llama")
"""Styles in which a grammar writes calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What an answer says, or a piece of it: its reasoning, its text, and whole calls."""

    text: str
    reasoning: str = ""
    calls: Sequence[ToolCall] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What an answer may call: the functions, the style of calls (None for bare JSON), and whether `several`.

    With `forced` it is calls and nothing else.
    """

    offered: str
    functions: tuple[FunctionBody, ...]
    style: str | None
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
            key = "parameters" if self.style == "llama" else "arguments"
            head = json.dumps(f'{{"name": "{function.name}", "{key}": ')
            rules.append(f'call_{i}: {head} arguments_{i} "}}"\narguments_{i}: {following(schema)}')
        one = " | ".join(f"call_{i}" for i in range(len(self.functions)))
        tagged = self.style == "hermes"
        rules.append(f'one: "{BEGIN}" "\\n" any "\\n" "{END}"' if tagged else "one: any")
        rules.append(f"any: {one}")
        rules.append('calls: one ("\\n" one)*' if self.several and tagged else "calls: one")
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
            "this model's chat template defines no tools in a way that is known here (Hermes's, Llama's, Mistral's, "
            "Qwen3-Coder's), so that it cannot choose one; name one by 'tool_choice' or say 'required' to hold the "
            "answer to a call, or 'none'",
            "tools",
            "unsupported_parameter",
        )
    named = choice.function.name if isinstance(choice, NamedTool) else None
    held = forced or (body.response_format is not None and body.response_format.grammar is not None)
    return Tools(
        offered=offer(body.tools),
        functions=tuple(tool.function for tool in body.tools if named in (None, tool.function.name)),
        style=None if held and style not in HELD else style,
        forced=forced,
        several=named is None and body.parallel_tool_calls is not False,
    )


class AnswerReader:
    """Parts an answer that grows into its reasoning, if it `thinks`, its calls of `tools`, and its text."""

    def __init__(self, thinks: bool, tools: Tools | None) -> None:
        self._reasoning, self._calls = ReasoningReader(thinks), CallReader(tools)
        self._thinks = thinks

    def push(self, text: str, *, thinking: bool = False, last: bool = False) -> Said:
        """Returns what can be shown after some more text.

        Args:
            thinking: the prompt has opened the reasoning (`Delta.thinking`).
        """
        reasoning, text = self._reasoning.push(THINK + text if thinking and self._thinks else text, last=last)
        text, calls = self._calls.push(text, last=last)
        return Said(text=text, reasoning=reasoning, calls=calls)


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
        if signs := SIGNS.get(tools.style or ""):
            return self._tagged(tools, *signs, last)
        return self._bare(tools, last)

    def _tagged(self, tools: Tools, first: str, final: str, last: bool) -> tuple[str, tuple[ToolCall, ...]]:
        shown, calls = "", list[ToolCall]()
        while True:
            before, begin, inside = self._held.partition(first)
            if not begin:
                keep = 0 if last else beginning(self._held, first)
                shown += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                break
            inside, end, after = inside.partition(final) if final else (inside, "", "")
            if not end and not last:
                shown, self._held = shown + before, self._held[len(before) :]
                break
            found = _read(inside, tools)
            shown += before + ("" if found else begin + inside + end)
            calls += found
            self._held = after
        self._began = self._began or bool(calls)
        return ("" if self._began and shown.isspace() else shown), tuple(calls)

    def _bare(self, tools: Tools, last: bool) -> tuple[str, tuple[ToolCall, ...]]:
        """A whole answer is a call or none is: what begins as one is held until the end."""
        sign = "[" if tools.style == "python" else "{"
        if not last and (self._held.lstrip()[:1] in ("", sign) and not self._began):
            return "", ()
        text, self._held, whole = self._held, "", not self._began
        self._began = True
        found = _read(text, tools) if whole else []
        names = {function.name for function in tools.functions}
        if found and all(call.name in names for call in found):
            return "", tuple(found)
        return text, ()


def _read(text: str, tools: Tools) -> list[ToolCall]:
    """The calls that a text of nothing else writes in the style of the tools; none if it is anything else."""
    if tools.style == "xml":
        return xml_calls(text, tools.functions)
    return {"mistral": mistral_calls, "python": python_calls}.get(tools.style or "", json_calls)(text)
