"""The two passes over a request: pass 1 finds the mixture of each prompt, pass 2 answers, whole or streamed.

Not here: the routes (`routes.py`), and what an answer looks like (`shapes.py`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from t2ray.adapt.strategies import Dispatch
from t2ray.api.backend import Backend, Catalog
from t2ray.api.errors import refusal
from t2ray.api.guard import LOG, Trace
from t2ray.api.limits import at_most, check_prompts, sampling
from t2ray.api.names import Route, resolve, usable
from t2ray.api.schema import ChatRequest, CompletionRequest
from t2ray.api.shapes import AnswerShape, Extension, Usage, event, weights
from t2ray.api.stream import EventStream, merged, together, unless_gone
from t2ray.config.serve import ApiConfig
from t2ray.core import Delta, Message, Mixture, Prompt, SamplingParams, T2RayError, Token, user


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRow:
    """One answer to make. `number` is the prompt's place in the request, `dispatch` the result of its pass 1.

    `echo` is what the answer begins with: the prompt's text, and its tokens if their log-probabilities are asked for.
    """

    prompt: Prompt
    echo: Delta
    number: int
    dispatch: Dispatch
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerJob:
    """A request after pass 1: all its answers to make, and how they are written."""

    body: ChatRequest | CompletionRequest
    shape: AnswerShape
    rows: Sequence[AnswerRow]
    catalog: Catalog
    backend: Backend
    trace: Trace
    id: str
    created: int

    @property
    def logprobs(self) -> bool:
        return self.body.logprobs is not None and self.body.logprobs is not False

    def shown(self, row: AnswerRow, text: str, tokens: tuple[Token, ...]) -> tuple[str, tuple[Token, ...]]:
        """What is shown of an answer's beginning: behind the echo, or with `max_tokens: 0` the echo alone."""
        if self.body.max_tokens == 0:
            text, tokens = "", ()
        return row.echo.text + text, row.echo.tokens + tokens

    def extension(self, row: AnswerRow, pass2_s: float | None) -> Extension:
        dispatch, experts = row.dispatch, self.catalog.experts
        return Extension(
            mixture=weights(dispatch.mixture),
            strategy=dispatch.strategy,
            label=dispatch.label,
            probabilities=dispatch.probabilities,
            pass1_ms=round(dispatch.seconds * 1000, 3),
            pass2_ms=None if pass2_s is None else round(pass2_s * 1000, 3),
            versions={name: experts[name].version for name in dispatch.mixture.names if name in experts},
            cached=dispatch.cached,
        )

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}


async def answer(
    request: Request, body: ChatRequest | CompletionRequest, shape: AnswerShape, prompts: Sequence[Prompt]
) -> Response:
    """Runs both passes and returns the response: the whole answer, or a stream that has begun.

    Raises:
        Refusal, T2RayError: an error before the first piece of an answer; a later one is sent in the stream.
        ClientDisconnect: the client has disconnected; whatever ran for it is cancelled.
    """
    config: ApiConfig = request.app.state.config
    backend: Backend = request.app.state.backend
    trace: Trace = request.state.trace
    trace.model = body.model
    if config.log_prompts:
        trace.shown["prompts"] = [
            p if isinstance(p, str) else [[m.role, m.content] if isinstance(m, Message) else m for m in p]
            for p in prompts
        ]
    at_most(config.max_n, body.n or 1, "n", "answers to one prompt")
    at_most(config.max_prompts, len(prompts), "prompt", "prompts")
    at_most(max(config.max_n, config.max_prompts), (body.n or 1) * len(prompts), "n", "answers to one request")
    check_prompts(prompts, config)
    params = sampling(body, config)
    catalog = backend.catalog()
    route = resolve(body.model, catalog)
    trace.param, trace.limit = shape.prompt, body.limit
    dispatches = await unless_gone(request.receive, together([_dispatch(backend, route, p, trace) for p in prompts]))
    for dispatch in dispatches:
        for name in usable(dispatch.mixture, catalog).names or ("base",):
            backend.observe("routes_total", 1, expert=name)
    echoes = await unless_gone(
        request.receive,
        together([_echo(backend, body, p, d.mixture) for p, d in zip(prompts, dispatches, strict=True)]),
    )
    rows = [
        AnswerRow(
            prompt=prompt,
            echo=echoes[number],
            number=number,
            dispatch=dispatches[number],
            sampling=params if params.seed is None else replace(params, seed=(params.seed + i) % 2**63),
        )
        for number, prompt in enumerate(prompts)
        for i in range(body.n or 1)
    ]
    job = AnswerJob(
        body=body,
        shape=shape,
        rows=rows,
        catalog=catalog,
        backend=backend,
        trace=trace,
        id=f"{shape.prefix}{uuid.uuid4().hex}",
        created=int(time.time()),
    )
    if body.stream:
        events = _events(job, config.log_prompts)
        first = await unless_gone(request.receive, anext(events))
        return EventStream(first, events)
    return await _whole(job, request, config.log_prompts)


async def _dispatch(backend: Backend, route: Route, prompt: Prompt, trace: Trace) -> Dispatch:
    if route.mixture is not None:
        return Dispatch(mixture=route.mixture, strategy=route.strategy)
    start = time.perf_counter()
    messages = tuple(message for message in prompt if isinstance(message, Message))
    if not messages:
        text = prompt if isinstance(prompt, str) else _text(await backend.read(prompt, Mixture.base(), 0))
        messages = user(text)
    dispatch = await backend.dispatch(route.strategy, messages)
    seconds = time.perf_counter() - start
    # The prompts of a request are dispatched side by side, so that their times do not add up.
    trace.backend_s = max(trace.backend_s, seconds)
    backend.observe("pass1_seconds", seconds, strategy=route.strategy)
    return dispatch


async def _echo(backend: Backend, body: ChatRequest | CompletionRequest, prompt: Prompt, mixture: Mixture) -> Delta:
    if isinstance(body, ChatRequest) or not body.echo:
        return Delta(text="")
    if isinstance(prompt, str) and body.logprobs is None:
        return Delta(text=prompt)
    tokens = await backend.read(prompt, mixture, body.logprobs or 0)
    return Delta(text=_text(tokens), tokens=tokens)


def _text(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


async def _whole(job: AnswerJob, request: Request, log_answers: bool) -> Response:
    backend, start = job.backend, time.perf_counter()
    calls = [backend.generate(row.prompt, row.dispatch.mixture, row.sampling) for row in job.rows]
    answers = await unless_gone(request.receive, together(calls))
    seconds = time.perf_counter() - start
    job.trace.backend_s += seconds
    several = job.rows[-1].number > 0
    choices = []
    for i, (row, answer) in enumerate(zip(job.rows, answers, strict=True)):
        text, tokens = job.shown(row, answer.text, answer.tokens)
        own = job.extension(row, seconds) if several else None
        choices.append(job.shape.choice(i, replace(answer, text=text, tokens=tokens), job.logprobs, own))
    usage = _usage(job, [len(answer.prompt_ids) for answer in answers], sum(len(answer.tokens) for answer in answers))
    if usage.completion_tokens:
        backend.observe("time_per_token_seconds", seconds / max(len(answer.tokens) for answer in answers))
    if log_answers:
        job.trace.shown["answers"] = [answer.text for answer in answers]
    reply = job.head(job.shape.whole) | {
        "choices": choices,
        "usage": usage,
        "t2ray": job.extension(job.rows[0], seconds),
    }
    return Response(to_json(reply), media_type="application/json")


def _usage(job: AnswerJob, prompt_tokens: Sequence[int], completion_tokens: int) -> Usage:
    """Counts tokens, also in the trace. `prompt_tokens` has one entry per row; a prompt counts once."""
    of_prompts = {row.number: tokens for row, tokens in zip(job.rows, prompt_tokens, strict=True)}
    job.trace.prompt_tokens, job.trace.completion_tokens = sum(of_prompts.values()), completion_tokens
    return Usage(
        prompt_tokens=job.trace.prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=job.trace.prompt_tokens + completion_tokens,
    )


async def _events(job: AnswerJob, log_answers: bool) -> AsyncGenerator[bytes]:
    """Yields the chunks of all rows. An error before the first chunk is raised, a later one becomes an event."""
    started = False
    try:
        async with aclosing(_chunks(job, log_answers)) as chunks:
            async for chunk in chunks:
                yield chunk
                started = True
    except T2RayError as error:
        if not started:
            raise
        job.trace.error = type(error).__name__
        yield b"data: " + refusal(error, job.trace.param, job.trace.limit).body + b"\n\n"
    except Exception as error:
        if started:
            job.trace.error = type(error).__name__
            LOG.exception("request %s: the stream broke", job.trace.request_id)
            yield b"data: " + refusal(error).body + b"\n\n"
        raise


async def _chunks(job: AnswerJob, log_answers: bool) -> AsyncGenerator[bytes]:
    """Yields one event per row and turn, then the usage, if it was asked for, and the end of the stream."""
    trace, backend = job.trace, job.backend
    head = job.head(job.shape.chunk) | ({"usage": None} if job.body.include_usage else {})
    tallies = [_Tally() for _ in job.rows]
    start = first = last = time.perf_counter()
    streams = [backend.stream(row.prompt, row.dispatch.mixture, row.sampling) for row in job.rows]
    waiting = start
    async with aclosing(merged(streams)) as turns:
        async for turn in turns:
            last = time.perf_counter()
            trace.backend_s += last - waiting
            events = []
            for index, delta in turn.items():
                chunk = head | {"choices": [tallies[index].piece(job, index, delta)]}
                if job.body.stream_options and job.body.stream_options.continuous_usage_stats:
                    own = tallies[index]
                    chunk["usage"] = Usage(
                        prompt_tokens=own.prompt_tokens,
                        completion_tokens=own.tokens,
                        total_tokens=own.prompt_tokens + own.tokens,
                    )
                if trace.ttft is None or delta.finish_reason:
                    chunk["t2ray"] = job.extension(job.rows[index], last - start if delta.finish_reason else None)
                if trace.ttft is None:
                    first, trace.ttft = last, trace.seconds
                events.append(event(chunk))
            trace.completion_tokens = sum(tally.tokens for tally in tallies)
            yield b"".join(events)
            waiting = time.perf_counter()
    usage = _usage(job, [tally.prompt_tokens for tally in tallies], trace.completion_tokens)
    if last > first:
        longest = max(tally.tokens for tally in tallies)
        backend.observe("time_per_token_seconds", (last - first) / max(longest - 1, 1))
    if log_answers:
        trace.shown["answers"] = [tally.text for tally in tallies]
    end = event(head | {"choices": [], "usage": usage}) if job.body.include_usage else b""
    yield end + b"data: [DONE]\n\n"


@dataclass(slots=True)
class _Tally:
    """Counts what a row's stream has sent so far."""

    begun: bool = False
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    offset: int = 0

    def piece(self, job: AnswerJob, index: int, delta: Delta) -> dict[str, Any]:
        """Counts a delta and returns it as a choice of a chunk."""
        shown = delta
        if not self.begun:
            text, tokens = job.shown(job.rows[index], delta.text, delta.tokens)
            shown = replace(delta, text=text, tokens=tokens)
        piece = job.shape.piece(index, shown, job.logprobs, self.offset, first=not self.begun)
        self.begun = True
        self.text += shown.text
        self.tokens += len(delta.tokens)
        self.prompt_tokens = max(self.prompt_tokens, delta.prompt_tokens)
        self.offset += len(_text(shown.tokens))
        return piece
