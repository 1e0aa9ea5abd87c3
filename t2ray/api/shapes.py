"""What an answer looks like: OpenAI's chat completions and completions, whole and in chunks, with t2ray's extension.

The dataclasses are also the response schemas of `/openapi.json`. Not here: how an answer is made (`answers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from pydantic_core import to_json

from t2ray.api.calls import ToolCall
from t2ray.api.logprobs import ChatLogprobs, TextLogprobs, chat_logprobs, text_logprobs
from t2ray.api.reasoning import ThoughtCounter
from t2ray.api.tools import Said
from t2ray.core import Delta, FinishReason, Mixture, Token

MixtureWeights = Mapping[str, float | tuple[float, ...]]
Finish = Literal["stop", "length", "tool_calls"] | None


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
class CompletionDetails:
    """How many of the answers' tokens were reasoning, its tags among them."""

    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Numbers of tokens. A prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionDetails

    @classmethod
    def of(cls, prompt: int, completion: int, reasoning: int) -> Usage:
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            completion_tokens_details=CompletionDetails(reasoning_tokens=reasoning),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionReply:
    """The function of a call, with its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallReply:
    """A function that the model asks to be called."""

    id: str
    function: FunctionReply
    type: Literal["function"] = "function"

    @classmethod
    def of(cls, call: ToolCall) -> ToolCallReply:
        return cls(id=call.id, function=FunctionReply(name=call.name, arguments=call.arguments))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """The turn that answers a conversation: a text, calls of functions, or both, and what was thought before."""

    content: str | None
    reasoning_content: str | None
    tool_calls: list[ToolCallReply] | None
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


@dataclass(slots=True, kw_only=True)
class Sent:
    """What a row's stream has sent so far; `offset` is the number of characters of its tokens."""

    thoughts: ThoughtCounter
    begun: bool = False
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    offset: int = 0
    calls: int = 0

    def add(self, delta: Delta, said: Said) -> None:
        """Counts a piece that was sent, but its tokens, which are counted when they come."""
        self.begun = True
        self.text += said.text
        self.offset += sum(len(token.text) for token in delta.tokens)
        self.calls += len(said.calls)


class AnswerShape(Protocol):
    """How one kind of answer (chat or text) is written: its names, its choices and the pieces of its stream.

    `prompt` is the parameter that it answers.
    """

    prompt: str
    prefix: str
    whole: str
    chunk: str

    def choice(
        self, index: int, said: Said, tokens: Sequence[Token] | None, reason: FinishReason, own: Extension | None
    ) -> Any:
        """A whole answer, with the log-probabilities of `tokens` if there are any."""
        ...

    def piece(self, index: int, delta: Delta, said: Said, logprobs: bool, sent: Sent) -> dict[str, Any]:
        """A choice of a stream's chunk, after what was `sent`."""
        ...


class ChatShape:
    """The answers of `/v1/chat/completions`."""

    prompt = "messages"
    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(
        self, index: int, said: Said, tokens: Sequence[Token] | None, reason: FinishReason, own: Extension | None
    ) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessage(
                content=None if said.calls and not said.text else said.text,
                reasoning_content=said.reasoning or None,
                tool_calls=[ToolCallReply.of(call) for call in said.calls] or None,
            ),
            logprobs=None if tokens is None else chat_logprobs(tokens),
            finish_reason="tool_calls" if said.calls else reason,
        )

    def piece(self, index: int, delta: Delta, said: Said, logprobs: bool, sent: Sent) -> dict[str, Any]:
        ended: FinishReason | None = delta.finish_reason
        more: dict[str, Any] = {} if sent.begun else {"role": "assistant"}
        if said.reasoning:
            more["reasoning_content"] = said.reasoning
        if said.text or not (sent.begun or said.calls or said.reasoning):
            more["content"] = said.text
        if said.calls:
            more["tool_calls"] = [
                {"index": i} | asdict(ToolCallReply.of(call)) for i, call in enumerate(said.calls, sent.calls)
            ]
        return {
            "index": index,
            "delta": more,
            "logprobs": chat_logprobs(delta.tokens) if logprobs else None,
            "finish_reason": "tool_calls" if ended and (said.calls or sent.calls) else ended,
        }


class TextShape:
    """The answers of `/v1/completions`."""

    prompt = "prompt"
    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def choice(
        self, index: int, said: Said, tokens: Sequence[Token] | None, reason: FinishReason, own: Extension | None
    ) -> TextChoice:
        return TextChoice(
            index=index,
            text=said.text,
            logprobs=None if tokens is None else text_logprobs(tokens, 0),
            finish_reason=reason,
            t2ray=own,
        )

    def piece(self, index: int, delta: Delta, said: Said, logprobs: bool, sent: Sent) -> dict[str, Any]:
        return {
            "index": index,
            "text": said.text,
            "logprobs": text_logprobs(delta.tokens, sent.offset) if logprobs else None,
            "finish_reason": delta.finish_reason,
        }


def event(value: Any) -> bytes:
    """Returns `value` as one server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def weights(mixture: Mixture) -> MixtureWeights:
    """A mixture as the API shows it: one number per expert, or one per expert and layer."""
    return {name: alpha[0] if len(alpha) == 1 else alpha for name, alpha in mixture.weights}
