"""What an answer looks like: OpenAI's chat completions and completions, whole and in chunks, with t2ray's extension.

The dataclasses are also the response schemas of `/openapi.json`. Not here: how an answer is made (`answers.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic_core import to_json

from t2ray.core import Completion, Delta, Mixture, Token

LOWEST = -9999.0  # least log-probability shown, as in OpenAI's API: JSON has no -inf
MixtureWeights = Mapping[str, float | tuple[float, ...]]
Finish = Literal["stop", "length"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """How the answer was made: its mixture (a number, or one per layer, per expert) and the times in milliseconds."""

    mixture: MixtureWeights
    strategy: str
    label: str | None
    probabilities: Mapping[str, float]
    pass1_ms: float
    pass2_ms: float | None
    versions: Mapping[str, int]
    cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Numbers of tokens. A prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprob:
    """One of the likeliest tokens at a place, with its log-probability in nats."""

    token: str
    logprob: float
    bytes: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A chosen token with its log-probability in nats, and the likeliest tokens at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatLogprobs:
    """The log-probabilities of a chat answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """The turn that answers a conversation."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatChoice:
    """One of n answers to a conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReply:
    """The answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    t2ray: Extension


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLogprobs:
    """The log-probabilities of a text answer's tokens, as columns of equal length; `text_offset` is in characters.

    The first token of an echoed prompt has none.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextChoice:
    """One of n answers to one of the prompts; it has its own `t2ray` if there are several prompts."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish
    t2ray: Extension | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReply:
    """The answer of `POST /v1/completions`; `t2ray` describes the first prompt's."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    t2ray: Extension


class AnswerShape(Protocol):
    """How one kind of answer (chat or text) is written: its names, its choices and the pieces of its stream.

    `prompt` is the parameter that it answers.
    """

    prompt: str
    prefix: str
    whole: str
    chunk: str

    def choice(self, index: int, answer: Completion, logprobs: bool, own: Extension | None) -> Any: ...

    def piece(self, index: int, delta: Delta, logprobs: bool, offset: int, *, first: bool) -> dict[str, Any]:
        """A choice of a stream's chunk; `offset` is the number of characters of the tokens before it."""
        ...


class ChatShape:
    """The answers of `/v1/chat/completions`."""

    prompt = "messages"
    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, answer: Completion, logprobs: bool, own: Extension | None) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessage(content=answer.text),
            logprobs=_chat_logprobs(answer.tokens) if logprobs else None,
            finish_reason=answer.finish_reason,
        )

    def piece(self, index: int, delta: Delta, logprobs: bool, offset: int, *, first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        return {
            "index": index,
            "delta": role | ({"content": delta.text} if delta.text or first else {}),
            "logprobs": _chat_logprobs(delta.tokens) if logprobs else None,
            "finish_reason": delta.finish_reason,
        }


class TextShape:
    """The answers of `/v1/completions`."""

    prompt = "prompt"
    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def choice(self, index: int, answer: Completion, logprobs: bool, own: Extension | None) -> TextChoice:
        return TextChoice(
            index=index,
            text=answer.text,
            logprobs=_text_logprobs(answer.tokens, 0) if logprobs else None,
            finish_reason=answer.finish_reason,
            t2ray=own,
        )

    def piece(self, index: int, delta: Delta, logprobs: bool, offset: int, *, first: bool) -> dict[str, Any]:
        return {
            "index": index,
            "text": delta.text,
            "logprobs": _text_logprobs(delta.tokens, offset) if logprobs else None,
            "finish_reason": delta.finish_reason,
        }


def event(value: Any) -> bytes:
    """Returns `value` as one server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def weights(mixture: Mixture) -> MixtureWeights:
    """A mixture as the API shows it: one number per expert, or one per expert and layer."""
    return {name: alpha[0] if len(alpha) == 1 else alpha for name, alpha in mixture.weights}


def _chat_logprobs(tokens: Sequence[Token]) -> ChatLogprobs:
    def row(token: Token) -> dict[str, Any]:
        bytes_ = list(token.raw or token.text.encode())
        return {"token": token.text, "logprob": max(token.logprob, LOWEST), "bytes": bytes_}

    return ChatLogprobs(
        content=[
            TokenLogprob(**row(token), top_logprobs=[TopLogprob(**row(top)) for top in token.top]) for token in tokens
        ]
    )


def _text_logprobs(tokens: Sequence[Token], offset: int) -> TextLogprobs:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return TextLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[None if math.isnan(token.logprob) else max(token.logprob, LOWEST) for token in tokens],
        top_logprobs=[None if math.isnan(token.logprob) else _alternatives(token.top) for token in tokens],
        text_offset=offsets,
    )


def _alternatives(top: Sequence[Token]) -> dict[str, float]:
    """Log-probabilities by texts; a token without a text of its own goes by its bytes or, at last, by its id."""
    found: dict[str, float] = {}
    for token in top:
        names = [token.text] if not token.raw else []
        names += ["bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw or token.text.encode())]
        name = next((name for name in names if name not in found), f"token:{token.id}")
        found[name] = max(token.logprob, LOWEST)
    return found
