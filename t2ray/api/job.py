"""From a request to the answers to make: checks, pass 1, which finds the mixture of each prompt, and pass 2.

Not here: what an answer looks like, whole or in pieces (`answers.py`, `responses.py`).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from t2ray.adapt.strategies import Dispatch
from t2ray.api.backend import Backend, Catalog
from t2ray.api.guard import Trace
from t2ray.api.images import with_images
from t2ray.api.limits import check_numbers, check_prompts, invalid, sampling
from t2ray.api.names import Route, resolve, usable
from t2ray.api.reasoning import ThoughtCounter
from t2ray.api.schema import ChatRequest, CompletionRequest
from t2ray.api.shapes import Extension, Sent, Usage, weights
from t2ray.api.stream import merged, together, unless_gone
from t2ray.api.tools import AnswerReader, Said, Tools, tools_of
from t2ray.config.serve import ApiConfig
from t2ray.core import (
    Completion,
    ConfigError,
    Delta,
    Message,
    Mixture,
    Prompt,
    SamplingParams,
    Token,
    user,
)
from t2ray.engine.grammar import check


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
class Piece:
    """What has come of one row: what it `said`, tokens to show, and what was `sent` before.

    `sent` counts the tokens of this piece already. The first piece of all and each row's last have an `extension`.
    """

    index: int
    delta: Delta
    said: Said
    sent: Sent
    extension: Extension | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerJob:
    """A request after pass 1: all its answers to make, the functions that they may call, and whether they may think."""

    body: ChatRequest | CompletionRequest
    rows: Sequence[AnswerRow]
    tools: Tools | None
    thinks: bool
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

    def usage(self, prompt_tokens: Sequence[int]) -> Usage:
        """Counts the prompts' tokens, also in the trace. There is one entry per row; a prompt counts once."""
        of_prompts = {row.number: tokens for row, tokens in zip(self.rows, prompt_tokens, strict=True)}
        self.trace.prompt_tokens = sum(of_prompts.values())
        return Usage.of(self.trace.prompt_tokens, self.trace.completion_tokens, self.trace.reasoning_tokens)

    async def whole(self, request: Request) -> tuple[list[Completion], float]:
        """Returns all answers, and the seconds of pass 2."""
        start = time.perf_counter()
        calls = [self.backend.generate(row.prompt, row.dispatch.mixture, row.sampling) for row in self.rows]
        answers = await unless_gone(request.receive, together(calls))
        seconds = time.perf_counter() - start
        self.trace.backend_s += seconds
        self.trace.completion_tokens = sum(len(answer.tokens) for answer in answers)
        counts = (ThoughtCounter(self.thinks).push(answer.tokens, thinking=answer.thinking) for answer in answers)
        self.trace.reasoning_tokens = sum(counts)
        if longest := max(len(answer.tokens) for answer in answers):
            self.backend.observe("time_per_token_seconds", seconds / longest)
        if "prompts" in self.trace.shown:
            self.trace.shown["answers"] = [answer.text for answer in answers]
        return answers, seconds

    async def turns(self) -> AsyncGenerator[list[Piece]]:
        """Yields what has come of the answers since the last turn, and keeps the trace's times."""
        trace = self.trace
        sent = [Sent(thoughts=ThoughtCounter(self.thinks)) for _ in self.rows]
        readers = [AnswerReader(self.thinks, self.tools) for _ in self.rows]
        streams = [self.backend.stream(row.prompt, row.dispatch.mixture, row.sampling) for row in self.rows]
        start = first = last = waiting = time.perf_counter()
        async with aclosing(merged(streams)) as turns:
            async for turn in turns:
                last = time.perf_counter()
                trace.backend_s += last - waiting
                if trace.ttft is None:
                    first, trace.ttft = last, trace.seconds
                pieces: list[Piece] = []
                for index, delta in turn.items():
                    row, own, ended = self.rows[index], sent[index], delta.finish_reason is not None
                    own.tokens += len(delta.tokens)
                    own.thoughts.push(delta.tokens, thinking=delta.thinking)
                    own.prompt_tokens = max(own.prompt_tokens, delta.prompt_tokens)
                    fresh = (delta.text, delta.tokens)
                    text, tokens = fresh if own.begun else self.shown(row, *fresh)
                    said = readers[index].push(text, thinking=delta.thinking, last=ended)
                    extension = None
                    if ended or not (pieces or any(other.begun for other in sent)):
                        extension = self.extension(row, last - start if ended else None)
                    shown = replace(delta, tokens=tokens)
                    pieces.append(Piece(index=index, delta=shown, said=said, sent=own, extension=extension))
                trace.completion_tokens = sum(own.tokens for own in sent)
                trace.reasoning_tokens = sum(own.thoughts.count for own in sent)
                yield pieces
                for piece in pieces:
                    piece.sent.add(piece.delta, piece.said)
                waiting = time.perf_counter()
        self.usage([own.prompt_tokens for own in sent])
        if last > first:
            longest = max(own.tokens for own in sent)
            self.backend.observe("time_per_token_seconds", (last - first) / max(longest - 1, 1))
        if "prompts" in trace.shown:
            trace.shown["answers"] = [own.text for own in sent]

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}


async def prepare(
    request: Request,
    body: ChatRequest | CompletionRequest,
    prompts: Sequence[Prompt],
    *,
    param: str,
    limit: str | None,
    prefix: str,
) -> AnswerJob:
    """Checks a request, and runs pass 1.

    Args:
        param: the parameter that holds the prompt.
        limit: the parameter that says how long the answer may be, if one does.
        prefix: what the answer's id begins with.

    Raises:
        Refusal, T2RayError: the request cannot be answered.
        ClientDisconnect: the client has disconnected; whatever ran for it is cancelled.
    """
    config: ApiConfig = request.app.state.config
    backend: Backend = request.app.state.backend
    trace: Trace = request.state.trace
    trace.model, n = body.model, body.n or 1
    check_numbers(n, len(prompts), config)
    prompts = await unless_gone(request.receive, with_images(prompts, config))
    catalog = backend.catalog()
    tools = tools_of(body, catalog.tools)
    offered = [(tools.message, *prompt) for prompt in prompts] if tools else list(prompts)
    if config.log_prompts:
        trace.shown["prompts"] = [_logged(prompt) for prompt in offered]
    check_prompts(offered, config)
    params = replace(sampling(body, config), grammar=await held(body, tools))
    route = resolve(body.model, catalog)
    trace.param, trace.limit = param, limit
    dispatches = await unless_gone(request.receive, together([_dispatch(backend, route, p, trace) for p in prompts]))
    for dispatch in dispatches:
        for name in usable(dispatch.mixture, catalog).names or ("base",):
            backend.observe("routes_total", 1, expert=name)
    echoes = await unless_gone(
        request.receive,
        together([_echo(backend, body, p, d.mixture) for p, d in zip(prompts, dispatches, strict=True)]),
    )
    return AnswerJob(
        body=body,
        rows=_rows(n, params, offered, dispatches, echoes),
        tools=tools,
        thinks=catalog.thinks and isinstance(body, ChatRequest) and params.grammar is None,
        catalog=catalog,
        backend=backend,
        trace=trace,
        id=f"{prefix}{uuid.uuid4().hex}",
        created=int(time.time()),
    )


def _rows(
    n: int,
    params: SamplingParams,
    prompts: Sequence[Prompt],
    dispatches: Sequence[Dispatch],
    echoes: Sequence[Delta],
) -> list[AnswerRow]:
    """`n` answers to each prompt, each with a seed of its own."""
    return [
        AnswerRow(
            prompt=prompt,
            echo=echoes[number],
            number=number,
            dispatch=dispatches[number],
            sampling=params if params.seed is None else replace(params, seed=(params.seed + i) % 2**63),
        )
        for number, prompt in enumerate(prompts)
        for i in range(n)
    ]


async def held(body: ChatRequest | CompletionRequest, tools: Tools | None) -> str | None:
    """Returns the grammar that a request's answers follow.

    Raises:
        Refusal: 400, a schema that cannot be followed, or nothing is installed here to follow it.
    """
    grammar = body.response_format.grammar if body.response_format else None
    named = "tools" if tools and grammar is None else "response_format"
    if tools is not None:
        grammar = tools.grammar(grammar)
    if grammar is not None:
        try:
            await asyncio.to_thread(check, grammar)
        except ConfigError as error:
            raise invalid(f"{named}: {error}", named) from None
    return grammar


def _logged(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [[m.role, m.text] if isinstance(m, Message) else m for m in prompt]


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
