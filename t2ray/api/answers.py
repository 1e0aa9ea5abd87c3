"""The answers of `/v1/chat/completions` and `/v1/completions`, whole or in chunks.

Not here: how an answer is made (`job.py`), and what it looks like (`shapes.py`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from t2ray.api.errors import Refusal, refusal
from t2ray.api.guard import LOG
from t2ray.api.job import AnswerJob, prepare
from t2ray.api.schema import ChatRequest, CompletionRequest
from t2ray.api.shapes import AnswerShape, Usage, event
from t2ray.api.stream import EventStream, unless_gone
from t2ray.api.tools import AnswerReader
from t2ray.core import Prompt, T2RayError


async def answer(
    request: Request, body: ChatRequest | CompletionRequest, shape: AnswerShape, prompts: Sequence[Prompt]
) -> Response:
    """Runs both passes and returns the response: the whole answer, or a stream that has begun; raises as `prepare`."""
    job = await prepare(request, body, prompts, param=shape.prompt, limit=body.limit, prefix=shape.prefix)
    if body.stream:
        return await streamed(request, job, _chunks(job, shape), lambda error: b"data: " + error.body + b"\n\n")
    answers, seconds = await job.whole(request)
    several = job.rows[-1].number > 0
    choices = []
    for i, (row, answer) in enumerate(zip(job.rows, answers, strict=True)):
        text, tokens = job.shown(row, answer.text, answer.tokens)
        said = AnswerReader(job.thinks, job.tools).push(text, thinking=answer.thinking, last=True)
        own = job.extension(row, seconds) if several else None
        choices.append(shape.choice(i, said, tokens if job.logprobs else None, answer.finish_reason, own))
    usage = job.usage([len(answer.prompt_ids) for answer in answers])
    extension = job.extension(job.rows[0], seconds)
    reply = job.head(shape.whole) | {"choices": choices, "usage": usage, "t2ray": extension}
    return Response(to_json(reply), media_type="application/json")


async def streamed(
    request: Request, job: AnswerJob, events: AsyncGenerator[bytes], broken: Callable[[Refusal], bytes]
) -> EventStream:
    """Returns a stream whose first event is there. An error before it is raised, a later one becomes an event.

    Args:
        broken: writes an error as an event.
    """
    rest = _unbroken(job, events, broken)
    return EventStream(await unless_gone(request.receive, anext(rest)), rest)


async def _unbroken(
    job: AnswerJob, events: AsyncGenerator[bytes], broken: Callable[[Refusal], bytes]
) -> AsyncGenerator[bytes]:
    started = False
    try:
        async with aclosing(events):
            async for chunk in events:
                yield chunk
                started = True
    except T2RayError as error:
        if not started:
            raise
        job.trace.error = type(error).__name__
        yield broken(refusal(error, job.trace.param, job.trace.limit))
    except Exception as error:
        if started:
            job.trace.error = type(error).__name__
            LOG.exception("request %s: the stream broke", job.trace.request_id)
            yield broken(refusal(error))
        raise


async def _chunks(job: AnswerJob, shape: AnswerShape) -> AsyncGenerator[bytes]:
    """Yields one event per row and turn, then the usage, if it was asked for, and the end of the stream."""
    head = job.head(shape.chunk) | ({"usage": None} if job.body.include_usage else {})
    options = job.body.stream_options
    prompt_tokens = [0] * len(job.rows)
    async with aclosing(job.turns()) as turns:
        async for pieces in turns:
            events = []
            for piece in pieces:
                sent = piece.sent
                chunk = head | {"choices": [shape.piece(piece.index, piece.delta, piece.said, job.logprobs, sent)]}
                prompt_tokens[piece.index] = sent.prompt_tokens
                if options and options.continuous_usage_stats:
                    chunk["usage"] = Usage.of(sent.prompt_tokens, sent.tokens, sent.thoughts.count)
                if piece.extension is not None:
                    chunk["t2ray"] = piece.extension
                events.append(event(chunk))
            yield b"".join(events)
    usage = job.usage(prompt_tokens)
    end = event(head | {"choices": [], "usage": usage}) if job.body.include_usage else b""
    yield end + b"data: [DONE]\n\n"
