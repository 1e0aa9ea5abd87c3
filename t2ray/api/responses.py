"""The body of `POST /v1/responses`: what of it is text, as the chat request that means the same.

Not here: how the answer is written (`outputs.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from t2ray.api.body import FALSE, MOST, NULL, ZERO, Body
from t2ray.api.errors import Refusal
from t2ray.api.formats import Name, Schema
from t2ray.api.limits import explained
from t2ray.api.schema import ChatRequest

KINDS = ("input_text", "output_text", "text", "reasoning_text")
TAKEN = {"max_completion_tokens": "max_output_tokens", "messages": "input", "response_format": "text.format"}
"""The chat request's parameters, and those of this body that they are made of."""


def _text(value: Any) -> Any:
    """A string as it is; a list of parts `[{"type": "input_text", "text": ...}]` as one string."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") not in KINDS or not isinstance(part.get("text"), str):
            raise PydanticCustomError("part", 'only parts {"type": "input_text", "text": "..."} are supported')
    return "".join(part["text"] for part in value)


PART = {
    "type": "object",
    "properties": {"type": {"enum": list(KINDS)}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
Parts = Annotated[
    str,
    BeforeValidator(_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": PART}]}),
]


class InputItem(Body):
    """A turn, what was thought before one, a call of a function that the model has asked for, or the result of one."""

    ignored = ("id", "status", "phase", "name_space", "summary", "encrypted_content")
    type: Literal["message", "reasoning", "function_call", "function_call_output"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Parts | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Parts | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        needed = {
            "message": ("role", "content"),
            "reasoning": (),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }[self.type]
        for name in needed:
            if getattr(self, name) is None:
                raise PydanticCustomError("missing", "it is missing", {"param": name})
        return self

    @property
    def turn(self) -> dict[str, Any]:
        """The message that means the same."""
        if self.type == "message":
            return {"role": self.role, "content": self.content}
        if self.type == "reasoning":
            return {"role": "assistant", "reasoning_content": self.content}
        if self.type == "function_call_output":
            return {"role": "tool", "content": self.output, "tool_call_id": self.call_id}
        call = {"id": self.call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return {"role": "assistant", "tool_calls": [call]}


def _items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Items = Annotated[
    list[InputItem],
    BeforeValidator(_items),
    Field(min_length=1),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": InputItem.model_json_schema(), "minItems": 1}]}
    ),
]


class FunctionTool(Body):
    """A function that the model may ask to be called."""

    ignored = ("strict",)
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: Schema | None = None


class FunctionChoice(Body):
    """The one function that must be called."""

    type: Literal["function"]
    name: Name


class TextFormat(Body):
    """What form the answer has."""

    ignored = ("description", "strict")
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema_: Schema | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.type == "json_schema" and self.schema_ is None:
            raise PydanticCustomError("missing", "it is missing", {"param": "schema"})
        return self


class TextOptions(Body):
    """How the text of an answer is."""

    neutral = {"verbosity": (None, "medium")}
    format: TextFormat | None = None


class ResponsesRequest(Body):
    """`POST /v1/responses`: a conversation to continue. Nothing is kept, so that none can be continued by its id."""

    neutral = {
        **dict.fromkeys(("previous_response_id", "conversation", "prompt", "context_management"), NULL),
        **dict.fromkeys(("max_tool_calls", "moderation"), NULL),
        "include": (None, [], ["reasoning.encrypted_content"]),  # there is no reasoning to encrypt
        "background": FALSE,
        "top_logprobs": ZERO,
        "reasoning": (None, {}, {"effort": None}, {"effort": None, "summary": None}),
        "stream_options": (None, {}, {"include_obfuscation": False}),
        "service_tier": (None, "auto", "default"),
        "truncation": (None, "disabled"),
    }
    ignored = (
        *("metadata", "store", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        "prompt_cache_options",
    )

    model: str = Field(min_length=1, max_length=4096, examples=["t2ray", "t2ray:math"])
    input: Items
    instructions: str | None = Field(None, description="a system turn before the input")
    max_output_tokens: int | None = Field(None, ge=1, le=MOST)
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; 1 by default")
    top_p: float | None = Field(None, gt=0, le=1, description="1 by default")
    stream: bool | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def format(self) -> dict[str, Any]:
        """The form of the text, as the answer repeats it."""
        given = self.text.format if self.text else None
        return given.model_dump(by_alias=True, exclude_none=True) if given else {"type": "text"}

    @property
    def chat(self) -> ChatRequest:
        """The chat request that means the same.

        Raises:
            Refusal: 400, a parameter of it is wrong.
        """
        turns = [{"role": "system", "content": self.instructions}] if self.instructions else []
        form, choice = self.format, self.tool_choice
        if form["type"] == "json_schema":
            form = {
                "type": "json_schema",
                "json_schema": {"name": form.get("name", "answer"), "schema": form["schema"]},
            }
        if isinstance(choice, FunctionChoice):
            named: Any = {"type": "function", "function": {"name": choice.name}}
        else:
            named = choice
        tools = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
            for tool in self.tools or ()
        ]
        try:
            return ChatRequest.model_validate(
                {
                    "model": self.model,
                    "messages": turns + _joined([item.turn for item in self.input]),
                    "max_completion_tokens": self.max_output_tokens,
                    "temperature": self.temperature,
                    "top_p": self.top_p,
                    "response_format": form,
                    "tools": tools or None,
                    "tool_choice": named,
                    "parallel_tool_calls": self.parallel_tool_calls,
                }
            )
        except ValidationError as error:
            raise renamed(explained(error)) from None


def _joined(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns, with the calls that follow one another, or the model's text or reasoning, in one turn: as made."""
    joined: list[dict[str, Any]] = []
    for turn in turns:
        last = joined[-1] if joined and joined[-1]["role"] == turn["role"] == "assistant" else None
        if last is not None and "tool_calls" in turn:
            joined[-1] = {**last, "tool_calls": [*last.get("tool_calls", ()), *turn["tool_calls"]]}
        elif last is not None and last.keys() == {"role", "reasoning_content"}:
            joined[-1] = last | turn
        else:
            joined.append(turn)
    return [turn for turn in joined if turn.keys() != {"role", "reasoning_content"}]


def renamed(refusal: Refusal) -> Refusal:
    """A refusal that names this body's parameters."""
    for theirs, ours in TAKEN.items():
        refusal.message = refusal.message.replace(theirs, ours)
        if refusal.param is not None:
            refusal.param = refusal.param.replace(theirs, ours)
    return refusal
