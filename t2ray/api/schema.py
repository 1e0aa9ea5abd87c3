"""The bodies of requests as strict pydantic models, with OpenAI's parameter names.

A parameter of OpenAI's that t2ray does not support is accepted if its value changes nothing (its neutral values), and
otherwise refused by name. An unknown parameter is refused with the nearest known name. Not here: configured limits
(`limits.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from t2ray.config.files import nearest
from t2ray.core import Message, user

MOST = 2**31 - 1  # upper bound of any number; the configured limits are far below
NULL: tuple[Any, ...] = (None,)
ZERO: tuple[Any, ...] = (None, 0, 0.0)
EMPTY: tuple[Any, ...] = (None, [])
ONE: tuple[Any, ...] = (None, 1, 1.0)
FALSE: tuple[Any, ...] = (None, False)


def _document(schema: dict[str, Any], model: type[Any]) -> None:
    """Adds the unsupported parameters with their neutral values to the JSON schema."""
    for name, values in model.neutral.items():
        unique = [value for i, value in enumerate(values) if value not in values[:i]]  # in JSON, 0 and 0.0 are one
        schema["properties"][name] = {"enum": unique, "description": "not supported; accepted with these values"}
    for name in model.ignored:
        schema["properties"][name] = {"description": "accepted, not used"}


class Body(BaseModel):
    """A JSON object in a request: strict types, no unknown keys.

    `neutral` holds its unsupported parameters with the values that change nothing, `ignored` those that say nothing
    about the answer.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, json_schema_extra=_document, allow_inf_nan=False
    )
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = {}
        for key, value in values.items():
            if key in cls.model_fields:
                known[key] = value
            elif key in cls.ignored:
                continue
            elif key not in cls.neutral:
                message = f"unknown parameter {key[:80]!r}{nearest(key[:80], cls.model_fields)}"
                raise PydanticCustomError("unknown", "{message}", {"message": message, "param": key[:80]})
            elif not any(type(value) is type(neutral) and value == neutral for neutral in cls.neutral[key]):
                message = f"{key!r} is not supported here; leave it out"
                raise PydanticCustomError("unsupported", "{message}", {"message": message, "param": key})
        return known


def _text(value: Any) -> Any:
    """A string as it is; a list of parts `[{"type": "text", "text": ...}]` as one string."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.keys() - {"cache_control"} != {"type", "text"} or part["type"] != "text":
            raise PydanticCustomError("part", 'only parts {"type": "text", "text": "..."} are supported')
        if not isinstance(part["text"], str):
            raise PydanticCustomError("part", "the text of a part must be a string")
    return "".join(part["text"] for part in value)


def _strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    """A list of prompts, of which each is a text or the ids of its tokens."""
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        value = [value]
    value = _strings(value)
    return [tuple(item) if isinstance(item, list) else item for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return "token-ids" if isinstance(value, tuple) else "a-text"


PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}, "cache_control": {}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
TEXT = {"anyOf": [{"type": "string"}, {"type": "array", "items": PART}]}
STRING = {"type": "string", "minLength": 1}
Text = Annotated[str, BeforeValidator(_text), WithJsonSchema(TEXT)]
Nonempty = Annotated[str, Field(min_length=1)]
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MOST}, "minItems": 1}
TokenIds = Annotated[tuple[Annotated[int, Field(ge=0, le=MOST)], ...], Field(min_length=1)]
Prompts = Annotated[
    list[Annotated[Annotated[Nonempty, Tag("a-text")] | Annotated[TokenIds, Tag("token-ids")], Discriminator(_kind)]],
    BeforeValidator(_prompts),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [STRING, IDS, {"type": "array", "items": {"anyOf": [STRING, IDS]}, "minItems": 1}]}),
]
Bias = dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]
Stops = Annotated[
    list[Nonempty] | None,
    BeforeValidator(_strings),
    WithJsonSchema({"anyOf": [STRING, {"type": "array", "items": STRING}, {"type": "null"}]}),
]


class MessageBody(Body):
    """One turn. It may hold, empty, the fields of OpenAI's answers that t2ray never fills."""

    neutral = {
        **dict.fromkeys(("refusal", "audio", "function_call", "tool_call_id", "reasoning", "reasoning_content"), NULL),
        **dict.fromkeys(("tool_calls", "annotations"), EMPTY),
    }
    ignored = ("id", "name", "cache_control")
    role: Literal["system", "developer", "user", "assistant"]
    content: Text

    @property
    def message(self) -> Message:
        return Message(role="system" if self.role == "developer" else self.role, content=self.content)


class StreamOptions(Body):
    """Options of a stream: the numbers of tokens in a last chunk, and in every chunk those so far."""

    neutral = {"include_obfuscation": FALSE}
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="needs include_usage")


class Generation(Body):
    """The parameters that both kinds of completion share. The default temperature is 1.0, as in OpenAI's API."""

    neutral = {
        **dict.fromkeys(("repetition_penalty", "length_penalty", "typical_p", "best_of"), ONE),
        **dict.fromkeys(("min_tokens", "prompt_logprobs"), ZERO),
        **dict.fromkeys(("stop_token_ids", "bad_words"), EMPTY),
        **dict.fromkeys(("use_beam_search", "include_stop_str_in_output", "return_token_ids"), FALSE),
        **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "detokenize"), (None, True)),
        **dict.fromkeys(("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"), NULL),
    }
    ignored = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")

    model: str = Field(min_length=1, max_length=4096, examples=["t2ray", "t2ray:math", "t2ray:math:0.7,code:0.3"])
    n: int | None = Field(None, ge=1, le=MOST, description="number of answers per prompt; 1 by default")
    stop: Stops = Field(None, description="texts that end the answer and are not part of it")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="answer i of n uses seed + i, i from 0 on")
    max_tokens: int | None = Field(None, ge=1, le=MOST)
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; 1 by default")
    top_p: float | None = Field(None, gt=0, le=1, description="1 by default")
    top_k: int | None = Field(None, ge=-1, le=MOST, description="so many of the likeliest tokens; 0 and -1 mean all")
    min_p: float | None = Field(None, ge=0, le=1, description="least share of the likeliest token's probability")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="off the logits of tokens in the answer")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="the same, as often as they are in it")
    logit_bias: Bias | None = Field(None, max_length=1024, description="added to the logits of tokens, by their ids")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(None, description="generate max_tokens tokens, past the end token: for load tests")

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "'stream_options' needs 'stream': true", {"param": "stream_options"}
            )
        return self

    @property
    def limit(self) -> str | None:
        """The parameter that says how long the answer may be, if one does."""
        return next((name for name in ("max_tokens", "max_completion_tokens") if getattr(self, name, None)), None)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Generation):
    """`POST /v1/chat/completions`: a conversation to continue."""

    neutral = {
        **Generation.neutral,
        **dict.fromkeys(("tools", "functions"), EMPTY),
        **dict.fromkeys(("tool_choice", "function_call"), (None, "none", "auto")),
        **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"), NULL),
        **dict.fromkeys(("moderation", "chat_template", "documents"), NULL),
        "chat_template_kwargs": (None, {}),
        "add_generation_prompt": (None, True),
        **dict.fromkeys(("echo", "continue_final_message"), FALSE),
        "modalities": (None, ["text"]),
        "response_format": (None, {"type": "text"}),
        "service_tier": (None, "auto", "default"),
        "parallel_tool_calls": (None, True, False),
    }
    messages: list[MessageBody] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="likeliest tokens per token; needs logprobs")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("logprobs", "'top_logprobs' needs 'logprobs': true", {"param": "top_logprobs"})
        if len({self.max_tokens, self.max_completion_tokens} - {None}) == 2:
            message = "'max_tokens' and 'max_completion_tokens' say different things; send one"
            raise PydanticCustomError("max_tokens", "{message}", {"message": message, "param": "max_completion_tokens"})
        return self

    @property
    def conversation(self) -> tuple[Message, ...]:
        return tuple(message.message for message in self.messages)


class CompletionRequest(Generation):
    """`POST /v1/completions`: texts to continue as they stand."""

    neutral = {
        **Generation.neutral,
        "response_format": (None, {"type": "text"}),
        "add_special_tokens": (None, True),
        "suffix": (None, ""),
    }
    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0, le=MOST, description="0 needs echo")
    echo: bool | None = Field(None, description="the answer begins with the prompt; with logprobs, with its own")
    logprobs: int | None = Field(None, ge=0, le=5, description="likeliest tokens per token")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "0 needs 'echo': true", {"param": "max_tokens"})
        return self


class ExampleBody(Body):
    """A labelled example: a conversation (or a `prompt`, which is one user turn) and its right answer."""

    messages: list[MessageBody] | None = Field(None, min_length=1)
    prompt: str | None = None
    answer: str

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        if (self.messages is None) == (self.prompt is None):
            raise PydanticCustomError("example", "an example has either 'messages' or 'prompt'", {"param": "prompt"})
        return self

    @property
    def conversation(self) -> tuple[Message, ...]:
        return tuple(message.message for message in self.messages or ()) or user(self.prompt or "")


class AdaptationBody(Body):
    """`POST /v1/adaptations`: a few-shot search for a task's mixture."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$",
        description="the mixture will be the model `t2ray:fewshot/NAME`",
    )
    examples: list[ExampleBody] = Field(min_length=1)
    verifier: str = Field(description="name of the verifier that grades the answers")
    experts: list[str] = Field([], description="experts that may be mixed; all by default")
    max_tokens: int | None = Field(None, ge=1, le=MOST)
    settings: dict[str, bool | int | float | str | None] = Field({}, description="settings of the cross-entropy method")
