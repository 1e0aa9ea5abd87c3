"""The answers of `/v1/responses`: OpenAI's response object, whole or as it grows, event by event.

Not here: how an answer is made (`job.py`).
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from t2ray.api.answers import streamed
from t2ray.api.calls import ToolCall
from t2ray.api.errors import Refusal
from t2ray.api.job import AnswerJob, prepare
from t2ray.api.responses import ResponsesRequest, renamed
from t2ray.api.shapes import Extension, Usage
from t2ray.api.tools import AnswerReader

Growing = Literal["message", "reasoning"]
"""What of an output grows with its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputDetails:
    """How many of the input's tokens were in a cache: none."""

    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDetails:
    """How many of the output's tokens were reasoning, its tags among them."""

    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseUsage:
    """Numbers of tokens."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens_details: OutputDetails = OutputDetails()

    @classmethod
    def of(cls, usage: Usage) -> ResponseUsage:
        return cls(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            output_tokens_details=OutputDetails(reasoning_tokens=usage.completion_tokens_details.reasoning_tokens),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseReply:
    """The answer of `POST /v1/responses`: `output` has a message, calls of functions, or both, behind reasoning."""

    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete"]
    output: Sequence[dict[str, Any]] = ()
    usage: ResponseUsage | None = None
    t2ray: Extension | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    text: dict[str, Any] = field(default_factory=dict)
    tools: Sequence[dict[str, Any]] = ()
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    object: Literal["response"] = "response"
    error: None = None
    metadata: dict[str, str] = field(default_factory=dict)
    previous_response_id: None = None
    store: Literal[False] = False
    background: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"


async def respond(request: Request, body: ResponsesRequest) -> Response:
    """Runs both passes and returns the response: the whole answer, or a stream that has begun; raises as `prepare`."""
    chat = body.chat
    limit = "max_output_tokens" if body.max_output_tokens else None
    try:
        job = await prepare(request, chat, [chat.conversation], param="input", limit=limit, prefix="resp_")
    except Refusal as refusal:
        raise renamed(refusal) from None
    reply = _begun(job, body)
    if body.stream:
        writer = EventWriter()
        return await streamed(request, job, _events(job, reply, writer), writer.broken)
    (answer,), seconds = await job.whole(request)
    said = AnswerReader(job.thinks, job.tools).push(answer.text, thinking=answer.thinking, last=True)
    output = [_grown("reasoning", said.reasoning)] if said.reasoning else []
    output += [_grown("message", said.text)] if said.text or not said.calls else []
    output += [_call(call) for call in said.calls]
    usage = job.usage([len(answer.prompt_ids)])
    extension = job.extension(job.rows[0], seconds)
    reply = _ended(reply, output, usage, extension, cut=answer.finish_reason == "length" and not said.calls)
    return Response(to_json(asdict(reply)), media_type="application/json")


def _begun(job: AnswerJob, body: ResponsesRequest) -> ResponseReply:
    given = body.model_dump(by_alias=True, include={"tools", "tool_choice"})
    return ResponseReply(
        id=job.id,
        created_at=job.created,
        model=body.model,
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        text={"format": body.format},
        tools=[{"strict": False, **tool} for tool in given["tools"] or ()],
        tool_choice=given["tool_choice"] or "auto",
        parallel_tool_calls=body.parallel_tool_calls is not False,
    )


def _ended(
    reply: ResponseReply, output: Sequence[dict[str, Any]], usage: Usage, extension: Extension, *, cut: bool
) -> ResponseReply:
    return replace(
        reply,
        status="incomplete" if cut else "completed",
        incomplete_details={"reason": "max_output_tokens"} if cut else None,
        output=output,
        usage=ResponseUsage.of(usage),
        t2ray=extension,
    )


def _part(kind: Growing, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _grown(kind: Growing, text: str | None, id: str = "") -> dict[str, Any]:
    """A message, or reasoning, of one text, or with None one that has just begun."""
    own: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
    return {
        "id": id or f"{'msg' if kind == 'message' else 'rs'}_{uuid.uuid4().hex}",
        "type": kind,
        **own,
        "status": "in_progress" if text is None else "completed",
        "content": [] if text is None else [_part(kind, text)],
    }


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"fc_{uuid.uuid4().hex}",
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


class EventWriter:
    """Writes the events of one response, numbered, and keeps its `output`: messages as they grow, and calls."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._number = 0
        self._grows: Growing | None = None  # the last of the output, if that is not whole
        self._text = ""

    def write(self, type: str, **fields: Any) -> bytes:
        """An event of a type."""
        data = to_json({"type": type, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: " + type.encode() + b"\ndata: " + data + b"\n\n"

    def broken(self, refusal: Refusal) -> bytes:
        """The event of an error that ends the stream."""
        error = refusal.detail
        return self.write("error", code=error.code, message=error.message, param=error.param, error=asdict(error))

    @property
    def answered(self) -> bool:
        """Whether there is anything but reasoning."""
        return any(item["type"] != "reasoning" for item in self.output)

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def grow(self, kind: Growing, more: str) -> bytes:
        """A message, or reasoning, begins or grows."""
        events = b""
        if self._grows != kind:
            events = self.close()
            self._grows, self._text = kind, ""
            self.output.append(_grown(kind, None))
            events += self.write(
                "response.output_item.added", output_index=len(self.output) - 1, item=self.output[-1]
            ) + self.write("response.content_part.added", **self._place, content_index=0, part=_part(kind, ""))
        self._text += more
        return events + self.write(f"response.{self._named}.delta", **self._place, **self._about, delta=more)

    def close(self) -> bytes:
        """What grows is whole, if anything does."""
        if self._grows is None:
            return b""
        place, kind, text = self._place, self._grows, self._text
        self.output[-1] = item = _grown(kind, text, place["item_id"])
        events = (
            self.write(f"response.{self._named}.done", **place, **self._about, text=text)
            + self.write("response.content_part.done", **place, content_index=0, part=_part(kind, text))
            + self.write("response.output_item.done", output_index=place["output_index"], item=item)
        )
        self._grows = None
        return events

    @property
    def _named(self) -> str:
        return "reasoning_text" if self._grows == "reasoning" else "output_text"

    @property
    def _about(self) -> dict[str, Any]:
        return {"content_index": 0} if self._grows == "reasoning" else {"content_index": 0, "logprobs": []}

    def call(self, call: ToolCall) -> bytes:
        """A call, which comes as a whole."""
        item = _call(call)
        self.output.append(item)
        place = self._place
        fresh = item | {"status": "in_progress", "arguments": ""}
        done = {"name": call.name, "arguments": call.arguments}
        return (
            self.write("response.output_item.added", output_index=place["output_index"], item=fresh)
            + self.write("response.function_call_arguments.delta", **place, delta=call.arguments)
            + self.write("response.function_call_arguments.done", **place, **done)
            + self.write("response.output_item.done", output_index=place["output_index"], item=item)
        )


async def _events(job: AnswerJob, reply: ResponseReply, writer: EventWriter) -> AsyncGenerator[bytes]:
    """Yields the events of the answer: its beginning, text as it grows and calls as they are whole, its end."""
    begun = asdict(reply)
    head = writer.write("response.created", response=begun) + writer.write("response.in_progress", response=begun)
    prompt_tokens, extension, cut = 0, None, False
    async with aclosing(job.turns()) as turns:
        async for (piece,) in turns:
            ended, events = piece.delta.finish_reason is not None, [head]
            said = piece.said
            if said.reasoning:
                events.append(writer.grow("reasoning", said.reasoning))
            if said.text or (ended and not said.calls and not writer.answered):
                events.append(writer.grow("message", said.text))
            if ended or said.calls:
                events.append(writer.close())
            events += [writer.call(call) for call in said.calls]
            yield b"".join(events)
            head, prompt_tokens, extension = b"", piece.sent.prompt_tokens, piece.extension or extension
            cut = piece.delta.finish_reason == "length"
    usage = job.usage([prompt_tokens])
    assert extension is not None
    calls = any(item["type"] == "function_call" for item in writer.output)
    done = _ended(reply, writer.output, usage, extension, cut=cut and not calls)
    yield writer.write(f"response.{done.status}", response=asdict(done))
