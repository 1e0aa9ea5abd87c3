"""The continuous engine: requests come and go one by one, and share every step, each with its own mixture. For serving.

transformers' continuous batching runs the loop in a thread of its own, which alone uses the model: scorings are queued
to it and run between two steps. Callers hold `generate`, `stream` and `score` in their event loop. Not here: static
batches (`engine`), and the seam to transformers (`manager`).

Shapes: B rows of a step, T packed tokens, V vocabulary, R mixtures, K singular values.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from t2ray.core import (
    Completion,
    ConfigError,
    Delta,
    GenerationError,
    Message,
    Mixture,
    Prompt,
    SamplingParams,
    Token,
    joined,
)
from t2ray.engine.manager import Manager
from t2ray.engine.sampling import sample, uniforms
from t2ray.engine.static import Request, StaticBatches, prompt_ids, scoring
from t2ray.engine.text import TextStream
from t2ray.model import Model
from t2ray.serving import EngineConfig


@dataclass(slots=True, eq=False, kw_only=True)
class _Row:
    """A generation under way. The loop's thread adds `pieces`; its caller is woken by `wake`."""

    id: str
    prompt_ids: tuple[int, ...]
    z_K: Tensor | None
    sampling: SamplingParams
    uniforms: list[float]
    text: TextStream
    loop: asyncio.AbstractEventLoop
    streams: bool
    name: str | None
    pieces: deque[Delta] = field(default_factory=deque)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    length: int = 0
    ended: bool = False
    error: Exception | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counts since the start, and how things are now. KV in bytes; `rows` and `mixtures` are the last step's."""

    running: int
    waiting: int
    rows: int
    mixtures: int
    steps: int
    tokens: int
    finished: int
    aborted: int
    failed: int
    folds: int
    kv_free: int
    kv_total: int
    idle_s: float


class ContinuousEngine:
    """Generates for many callers at once. Experts are `model.svf.bank`, replaced as a whole by `set_experts`."""

    def __init__(self, model: Model, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config or EngineConfig()
        self._batches = StaticBatches(model)
        self._rows: dict[str, _Row] = {}
        self._scorings: queue.SimpleQueue[tuple[Request, asyncio.Future[tuple[float, ...]]]] = queue.SimpleQueue()
        self._z: dict[Mixture, Tensor | None] = {}
        self._numbers = itertools.count()
        self._fresh: list[_Row] = []
        self._alone: tuple[Tensor | None, int] = (None, 0)
        self._count = dict.fromkeys(
            ("rows", "mixtures", "steps", "tokens", "finished", "aborted", "failed", "folds"), 0
        )
        self._turned = time.monotonic()
        self._manager = Manager(model.hf, self.config, self)

    def start(self) -> None:
        """Allocates the cache and starts the loop's thread."""
        self._manager.begin()

    def stop(self) -> None:
        """Ends the thread; what is still running fails."""
        self._manager.stop(hard_stop=True)

    # -------------------------------------------------------------------------------------------------------- callers

    async def generate(
        self, messages: Prompt, mixture: Mixture, sampling: SamplingParams, request_id: str | None = None
    ) -> Completion:
        """See `core.Generate`. A call that is cancelled ends its generation.

        Raises:
            ConfigError: prompt and answer do not fit the model's context, or the cache.
            UnknownExpert: the mixture names no expert of the bank.
            GenerationError: the row's numbers overflowed, or the engine stopped.
        """
        row = self._submit(messages, mixture, sampling, request_id, streams=False)
        answer = joined([delta async for delta in self._deltas(row)])
        assert answer.finish_reason is not None
        return Completion(
            prompt_ids=row.prompt_ids,
            token_ids=tuple(token.id for token in answer.tokens),
            logprobs=tuple(token.logprob for token in answer.tokens),
            text=answer.text,
            finish_reason=answer.finish_reason,
            mixture=mixture,
        )

    async def stream(
        self,
        messages: Prompt,
        mixture: Mixture,
        sampling: SamplingParams,
        request_id: str | None = None,
        *,
        whole: bool = False,
        gap_s: float = 0.0,
    ) -> AsyncIterator[Delta]:
        """The answer as it grows; raises as `generate` does. Closing the iterator ends the generation.

        Args:
            whole: one delta at the end.
            gap_s: the least time between two deltas; what comes in between is joined. The first never waits.
        """
        row = self._submit(messages, mixture, sampling, request_id, streams=not whole)
        async for delta in self._deltas(row, gap_s):
            yield delta

    async def score(
        self, messages: tuple[Message, ...], labels: tuple[str, ...], mixture: Mixture
    ) -> tuple[float, ...]:
        """See `core.Score`. Raises as `generate` does."""
        request = scoring(self.model, messages, labels, mixture)
        request.z_K = self._mixed(mixture)
        done: asyncio.Future[tuple[float, ...]] = asyncio.get_running_loop().create_future()
        self.check()
        self._scorings.put((request, done))
        self._manager._wake_up_loop.set()
        return await done

    def abort(self, request_id: str) -> int:
        """Ends the generations of that name, whose callers get a `GenerationError`; how many there were."""
        rows = [row for row in list(self._rows.values()) if row.name == request_id]
        for row in rows:
            self._drop(row)
            row.error = GenerationError(f"request {request_id} was aborted")
            row.woken.set()
        return len(rows)

    def set_experts(self, bank: Mapping[str, Tensor]) -> None:
        """Replaces all experts. Requests that run keep the z they began with."""
        self.model.svf.bank = dict(bank)
        self._z = {}

    @property
    def stats(self) -> EngineStats:
        running, waiting = self._manager.counts
        free, total = self._manager.pages
        idle_s = time.monotonic() - self._turned
        return EngineStats(running=running, waiting=waiting, kv_free=free, kv_total=total, idle_s=idle_s, **self._count)

    def _submit(
        self, messages: Prompt, mixture: Mixture, sampling: SamplingParams, name: str | None, *, streams: bool
    ) -> _Row:
        ids = prompt_ids(self.model, messages, sampling.max_tokens)
        if len(ids) + sampling.max_tokens > self.config.kv_tokens:
            raise ConfigError(
                f"a prompt of {len(ids)} tokens and {sampling.max_tokens} for the answer exceed the engine's cache "
                f"of {self.config.kv_tokens} tokens; shorten the prompt, lower max_tokens or raise engine.kv_tokens"
            )
        self.check()
        row = _Row(
            id=f"{next(self._numbers)}",
            prompt_ids=ids,
            z_K=self._mixed(mixture),
            sampling=sampling,
            uniforms=uniforms(sampling.seed, sampling.max_tokens).tolist() if sampling.temperature else [],
            text=TextStream(self.model.chat, sampling.stop),
            loop=asyncio.get_running_loop(),
            streams=streams,
            name=name,
        )
        self._rows[row.id] = row
        self._manager.add_request(
            list(ids),
            row.id,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=-1 if sampling.ignore_eos else list(self.model.chat.eos_ids),
        )
        return row

    async def _deltas(self, row: _Row, gap_s: float = 0.0) -> AsyncIterator[Delta]:
        try:
            while True:
                await row.woken.wait()
                row.woken.clear()
                if row.error is not None:
                    raise row.error
                if pieces := [row.pieces.popleft() for _ in range(len(row.pieces))]:
                    yield joined(pieces)
                    if pieces[-1].finish_reason is not None:
                        return
                if gap_s:
                    await asyncio.sleep(gap_s)
        finally:
            if not row.ended:
                self._drop(row)

    def _drop(self, row: _Row) -> None:
        if self._rows.pop(row.id, None) is not None:
            row.ended = True
            self._count["aborted"] += 1
            self._manager.cancel_request(row.id)

    def check(self) -> None:
        """Raises GenerationError when the loop's thread has ended."""
        if not self._manager.is_running():
            raise GenerationError("the engine has stopped") from self._manager.background_thread_status.fatal_error

    def _mixed(self, mixture: Mixture) -> Tensor | None:
        """One tensor for all requests of a mixture, until the experts change."""
        z = self._z
        if mixture not in z:
            if len(z) >= 4096:
                z.clear()
            z[mixture] = self.model.svf.mix(mixture) if mixture.weights else None
        return z[mixture]

    # ---------------------------------------------------------------------------- the loop's thread (`manager.Steps`)

    def before_step(self) -> None:
        """Scores what is queued, all of it together."""
        self._turned = time.monotonic()
        waiting = []
        with suppress(queue.Empty):
            while True:
                waiting.append(self._scorings.get_nowait())
        if not waiting:
            return
        error: Exception | None = None
        try:
            self._batches.run(request for request, _ in waiting)
        except RuntimeError as failure:  # torch's: out of memory
            error = GenerationError(f"scoring failed: {failure}")
        for request, done in waiting:
            done.get_loop().call_soon_threadsafe(_settle, done, error or request.result)

    def bound(self, requests: list[tuple[str, int]]) -> AbstractContextManager[None]:
        """Folds when the rows have had one mixture alone for as many tokens as a fold costs, so that folding at most
        doubles the least possible time, however the mixtures alternate."""
        svf = self.model.svf
        z = [row.z_K if (row := self._rows.get(id)) else None for id, _ in requests]
        distinct = {id(z_K): z_K for z_K in z}
        tokens = sum(length for _, length in requests)
        self._count["steps"] += 1
        self._count["rows"], self._count["mixtures"] = len(requests), len(distinct)
        if len(distinct) > 1:
            self._alone = (None, 0)
            place = {key: i for i, key in enumerate(distinct)}
            index_B = torch.tensor([place[id(z_K)] for z_K in z], device=svf.s_K.device)
            if tokens > len(requests):
                lengths_B = torch.tensor([length for _, length in requests], device=svf.s_K.device)
                index_B = index_B.repeat_interleave(lengths_B)
            return svf.rows(svf.table(list(distinct.values())), index_B)
        (only,) = distinct.values()
        if only is None:
            return nullcontext()
        if svf.is_folded(only):
            return svf.folded(only)
        before = self._alone[1] if self._alone[0] is only else 0
        self._alone = (only, before + tokens)
        if before >= svf.tokens_to_fold():
            self._count["folds"] += 1
            return svf.folded(only)
        return svf.rows(only[None])

    def choose(self, requests: list[str], logits_BV: Tensor) -> Tensor:
        """Each row's next token, by its own temperature, top_p and stream of random numbers."""
        rows = [self._rows.get(id) for id in requests]
        logprob_BV = logits_BV.log_softmax(-1)
        token_B1 = logprob_BV.argmax(-1, keepdim=True)
        hot = [(i, row) for i, row in enumerate(rows) if row and row.sampling.temperature > 0]
        if hot:
            at = torch.tensor([i for i, _ in hot], device=logits_BV.device)
            settings = [[r.sampling.temperature, r.sampling.top_p, r.uniforms[r.length]] for _, r in hot]
            temperature_B1, top_p_B1, u_B1 = torch.tensor(settings, dtype=torch.float64, device=at.device).split(1, 1)
            nucleus_B1 = top_p_B1.float() if any(row.sampling.top_p < 1 for _, row in hot) else None
            token_B1[at] = sample(logprob_BV[at], temperature_B1.float(), nucleus_B1, u_B1)
        chosen_B = logprob_BV.gather(-1, token_B1)[:, 0].tolist()
        tokens: list[int] = token_B1[:, 0].tolist()
        for i, (row, token, logprob) in enumerate(zip(rows, tokens, chosen_B, strict=True)):
            if row is None:
                continue
            if logprob != logprob:
                self.fail(row.id, GenerationError("this mixture's numbers overflow: the model's scores are not finite"))
                self._manager.cancel_request(row.id)
            else:
                self._add(row, token, logprob, logprob_BV[i])
        return token_B1[:, 0]

    def _add(self, row: _Row, token: int, logprob: float, logprob_V: Tensor) -> None:
        sampling, chat = row.sampling, self.model.chat
        row.length += 1
        top: tuple[tuple[str, float], ...] = ()
        if sampling.top_logprobs:
            best = logprob_V.topk(sampling.top_logprobs)
            top = tuple((chat.token(i), p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True))
        piece = row.text.push(token)
        stopped = row.text.stopped or (token in chat.eos_ids and not sampling.ignore_eos)
        reason = "stop" if stopped else "length" if row.length == sampling.max_tokens else None
        row.pieces.append(
            Delta(
                text=piece if reason is None else piece + row.text.finish(),
                tokens=(Token(id=token, text=chat.token(token), logprob=logprob, top=top),),
                prompt_tokens=len(row.prompt_ids),
                finish_reason=reason,
            )
        )
        self._count["tokens"] += 1
        if reason is not None and self._rows.pop(row.id, None) is not None:
            row.ended = True
            self._count["finished"] += 1
            if row.text.stopped:
                self._manager.cancel_request(row.id)
        if row.ended or row.streams:
            self._fresh.append(row)

    def after_step(self) -> None:
        """Wakes the callers of the rows that have something new: after the step, so that no page of theirs is held."""
        fresh, self._fresh = self._fresh, []
        for loop in {row.loop for row in fresh}:
            rows = [row for row in fresh if row.loop is loop]
            with suppress(RuntimeError):  # a caller's loop that was closed meanwhile
                loop.call_soon_threadsafe(_wake, rows)

    def fail(self, request: str | None, error: Exception) -> None:
        """Tells a row's caller, or with None everybody's."""
        if not isinstance(error, GenerationError):
            error = GenerationError(f"the engine failed: {error}")
        for id in list(self._rows) if request is None else [request]:
            if row := self._rows.pop(id, None):
                row.error, row.ended = error, True
                self._count["failed"] += 1
                self._fresh.append(row)
        if request is None:
            self.after_step()
            with suppress(queue.Empty):
                while True:
                    _, done = self._scorings.get_nowait()
                    done.get_loop().call_soon_threadsafe(_settle, done, error)


def _wake(rows: list[_Row]) -> None:
    for row in rows:
        row.woken.set()


def _settle(done: asyncio.Future[tuple[float, ...]], result: object) -> None:
    """In the caller's loop: the caller may have gone."""
    if done.done():
        return
    if isinstance(result, Exception):
        done.set_exception(result)
    else:
        assert isinstance(result, tuple)
        done.set_result(result)
