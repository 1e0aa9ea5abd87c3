"""The bodies of requests as strict pydantic models, with OpenAI's parameter names.

Not here: what a body is made of (`body.py`), what an answer may be held to (`formats.py`), configured limits
(`limits.py`).
"""

from __future__ import annotations

import json
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from t2ray.api.body import EMPTY, FALSE, MOST, NULL, ONE, ZERO, Bias, Body, Content, Prompts, Stops
from t2ray.api.formats import NamedTool, ResponseFormat, ToolBody, ToolCallBody
from t2ray.core import Message, user


class MessageBody(Body):
    """One turn. It may hold, empty, the fields of OpenAI's answers that t2ray never fills."""

    neutral = {
        **dict.fromkeys(("refusal", "audio", "function_call", "reasoning"), NULL),
        "annotations": EMPTY,
    }
    ignored = ("id", "name", "cache_control")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    tool_calls: list[ToolCallBody] | None = Field(None, description="of an assistant's turn")
    tool_call_id: str | None = Field(None, description="of a tool's turn: the call whose result it has")
    reasoning_content: str | None = Field(None, description="of an assistant's turn: what it thought before")

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        for name, given, role in (
            ("tool_calls", self.tool_calls, "assistant"),
            ("tool_call_id", self.tool_call_id, "tool"),
            ("reasoning_content", self.reasoning_content, "assistant"),
        ):
            if given and self.role != role:
                message = f"{name!r} is for the role {role!r}"
                raise PydanticCustomError("role", "{message}", {"message": message, "param": name})
        if isinstance(self.content, tuple) and self.role != "user":
            raise PydanticCustomError("role", "pictures are for the role 'user'", {"param": "content"})
        missing = "content" if self.content is None and not self.tool_calls else None
        if self.role == "tool" and not self.tool_call_id:
            missing = "tool_call_id"
        if missing:
            raise PydanticCustomError("missing", "it is missing", {"param": missing})
        return self

    @property
    def message(self) -> Message:
        return Message(
            role="system" if self.role == "developer" else self.role,
            content=self.content or "",
            calls=json.dumps([call.model_dump() for call in self.tool_calls]) if self.tool_calls else "",
            call_id=self.tool_call_id or "",
            reasoning=self.reasoning_content or "",
        )


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
    response_format: ResponseFormat | None = Field(None, description="needs the extra t2ray[structured], but for text")
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
        "functions": EMPTY,
        "function_call": (None, "none", "auto"),
        **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"), NULL),
        **dict.fromkeys(("moderation", "chat_template", "documents"), NULL),
        "add_generation_prompt": (None, True),
        **dict.fromkeys(("echo", "continue_final_message"), FALSE),
        "modalities": (None, ["text"]),
        "service_tier": (None, "auto", "default"),
    }
    messages: list[MessageBody] = Field(min_length=1)
    tools: list[ToolBody] | None = Field(None, description="functions that the model may ask to be called")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(None, description="auto by default")
    parallel_tool_calls: bool | None = Field(None, description="whether there may be several calls; true by default")
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="likeliest tokens per token; needs logprobs")
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = Field(
        None, max_length=32, description="what the model's chat template gets besides, such as enable_thinking"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("logprobs", "'top_logprobs' needs 'logprobs': true", {"param": "top_logprobs"})
        if len({self.max_tokens, self.max_completion_tokens} - {None}) == 2:
            message = "'max_tokens' and 'max_completion_tokens' say different things; send one"
            raise PydanticCustomError("max_tokens", "{message}", {"message": message, "param": "max_completion_tokens"})
        names = [tool.function.name for tool in self.tools or ()]
        wrong = None
        if len(set(names)) < len(names):
            wrong = ("tools", "two tools have one name")
        elif isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            wrong = ("tool_choice", f"there is no tool {self.tool_choice.function.name!r}")
        elif self.tool_choice == "required" and not names:
            wrong = ("tool_choice", "'required' needs 'tools'")
        if wrong:
            raise PydanticCustomError("tools", "{message}", {"message": wrong[1], "param": wrong[0]})
        return self

    @property
    def conversation(self) -> tuple[Message, ...]:
        turns = tuple(message.message for message in self.messages)
        if not self.chat_template_kwargs:
            return turns
        return (*turns, Message(role="template", content=json.dumps(self.chat_template_kwargs)))


class CompletionRequest(Generation):
    """`POST /v1/completions`: texts to continue as they stand."""

    neutral = {
        **Generation.neutral,
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
