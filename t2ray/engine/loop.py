"""What the online engine does at each turn of its loop, in the loop's thread.

It binds each row to its mixture, chooses the next tokens, wakes the callers, and scores what is queued.
Not here: what callers see (`online`), and transformers' loop itself (`engine.transformers`, whose `Steps` this is).

Shapes: B rows of a step, T packed tokens, V vocabulary, R mixtures, K singular values.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from t2ray.adapters.model import Model
from t2ray.core import ConfigError, Delta, ExpertError, FinishReason, GenerationError, SamplingParams, T2RayError, Token
from t2ray.engine.batches import StaticBatches
from t2ray.engine.grammar import Guide
from t2ray.engine.requests import Request
from t2ray.engine.sampling import adjusted, cuts, likeliest, sample
from t2ray.engine.text import TextStream

DELTAS_PER_S, LONGEST_GAP_S = 50.0, 0.5
"""Of all streams together, and of one. A delta costs the engine's process, the ingress and the proxy a millisecond
each: one for each token takes longer to send than to generate (16 streams, 2 cores: 0.31 of the engine's tokens/s)."""

Scoring = tuple[Request, "asyncio.Future[Any]"]


@dataclass(slots=True, eq=False, kw_only=True)
class Row:
    """A generation under way. The loop's thread adds `pieces`; its caller is woken by `woken`, from `due` on."""

    id: str
    prompt_ids: tuple[int, ...]
    z_K: Tensor | None
    sampling: SamplingParams
    guide: Guide | None
    uniforms: list[float]
    text: TextStream
    loop: asyncio.AbstractEventLoop
    streams: bool
    pieces: deque[Delta] = field(default_factory=deque)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    due: float = 0.0
    length: int = 0
    ended: bool = False
    error: Exception | None = None


class Loop:
    """The rows under way and the scorings that wait. `cancel` tells the manager that a row has ended early."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.rows: dict[str, Row] = {}
        self.scorings: queue.SimpleQueue[Scoring] = queue.SimpleQueue()
        counted = ("rows", "mixtures", "steps", "tokens", "finished", "aborted", "failed", "folds")
        self.count = dict.fromkeys(counted, 0)
        self.turned = time.monotonic()
        self.cancel: Callable[[str], None]
        self.plain_attention: Callable[[], AbstractContextManager[None]]
        self._batches = StaticBatches(model)
        self._fresh: list[Row] = []
        self._alone: tuple[Tensor | None, int] = (None, 0)

    def before_step(self) -> bool:
        """Computes what is queued, all of it together, up to the first prompt to read; returns whether there is more.

        Those are scorings, readings, and answers to prompts with pictures.
        """
        self.turned = time.monotonic()
        waiting = []
        with suppress(queue.Empty):
            while True:
                waiting.append(self.scorings.get_nowait())
                if waiting[-1][0].top is not None:  # it takes as long as a step or more, which all rows wait for
                    break
        if not waiting:
            return False
        error: Exception | None = None
        try:
            with self.plain_attention():
                self._batches.run(request for request, _ in waiting)
        except Exception as failure:  # whatever it is, it is told to who asked, and the rows of others go on
            error = GenerationError(f"a batch between two steps failed: {failure}")
        for request, done in waiting:
            done.get_loop().call_soon_threadsafe(_settle, done, error or request.result)
        return not self.scorings.empty()

    def bound(self, requests: list[tuple[str, int]]) -> AbstractContextManager[None]:
        """Folds when the rows have had one mixture alone for as many tokens as a fold costs, so that folding at most
        doubles the least possible time, however the mixtures alternate."""
        adapter = self.model.adapter
        z = [row.z_K if (row := self.rows.get(id)) else None for id, _ in requests]
        distinct = {id(z_K): z_K for z_K in z}
        tokens = sum(length for _, length in requests)
        self.count["steps"] += 1
        self.count["rows"], self.count["mixtures"] = len(requests), len(distinct)
        if len(distinct) > 1:
            self._alone = (None, 0)
            if tokens == len(requests):
                return adapter.each(z)
            place = {key: i for i, key in enumerate(distinct)}
            index = [place[id(z_K)] for z_K, (_, length) in zip(z, requests, strict=True) for _ in range(length)]
            return adapter.rows(adapter.table(list(distinct.values())), torch.tensor(index, device=self.model.device))
        (only,) = distinct.values()
        if only is None:
            return nullcontext()
        if adapter.is_folded(only):
            return adapter.folded(only)
        before = self._alone[1] if self._alone[0] is only else 0
        self._alone = (only, before + tokens)
        if before >= adapter.tokens_to_fold():
            self.count["folds"] += 1
            return adapter.folded(only)
        return adapter.rows(only[None])

    def choose(self, requests: list[str], logits_BV: Tensor) -> Tensor:
        """Each row's next token, by its own parameters and stream of random numbers."""
        rows = [self.rows.get(id) for id in requests]
        logprob_BV = logits_BV.log_softmax(-1)
        params = [row.sampling if row else SamplingParams() for row in rows]
        guides = [row.guide if row else None for row in rows]
        adjusted_BV = adjusted(logprob_BV, params, [row.text.ids if row else [] for row in rows], guides)
        token_B1 = adjusted_BV.argmax(-1, keepdim=True)
        hot = [(i, row) for i, row in enumerate(rows) if row and row.sampling.temperature > 0]
        if hot:
            at = torch.tensor([i for i, _ in hot], device=logits_BV.device)
            settings = [[row.sampling.temperature, row.uniforms[row.length]] for _, row in hot]
            temperature_B1, u_B1 = torch.tensor(settings, dtype=torch.float64, device=at.device).split(1, 1)
            cuts_B3 = cuts([row.sampling for _, row in hot], at.device)
            token_B1[at] = sample(adjusted_BV[at], temperature_B1.float(), cuts_B3, u_B1)
        chosen_B = logprob_BV.gather(-1, token_B1)[:, 0].tolist()
        tokens: list[int] = token_B1[:, 0].tolist()
        for i, (row, token, logprob) in enumerate(zip(rows, tokens, chosen_B, strict=True)):
            if row is None:
                continue
            error: Exception | None = None
            if logprob != logprob:
                error = ExpertError(
                    "this mixture's numbers overflow: the model's scores are not finite; use smaller weights"
                )
            elif row.guide is not None:
                row.guide.push(token)
                error = ConfigError(row.guide.error) if row.guide.error else None
            if error is not None:
                self.fail(row.id, error)
                self.cancel(row.id)
            else:
                self._add(row, token, logprob, logprob_BV[i])
        return token_B1[:, 0]

    def _add(self, row: Row, token: int, logprob: float, logprob_V: Tensor) -> None:
        sampling, chat = row.sampling, self.model.chat
        row.length += 1
        piece = row.text.push(token)
        stopped = row.text.stopped or (token in chat.eos_ids and not sampling.ignore_eos)
        reason: FinishReason | None = None
        if stopped or row.length == sampling.max_tokens:
            reason = "stop" if stopped else "length"
            piece += row.text.finish()
        raw = chat.token(token)[1]
        top = likeliest(chat, logprob_V, sampling.top_logprobs)
        row.pieces.append(
            Delta(
                text=piece,
                tokens=(Token(id=token, text=row.text.added, logprob=logprob, raw=raw, top=top),),
                prompt_tokens=len(row.prompt_ids),
                finish_reason=reason,
                thinking=row.length == 1 and chat.opens(row.prompt_ids),
            )
        )
        self.count["tokens"] += 1
        if reason is not None and self.rows.pop(row.id, None) is not None:
            row.ended = True
            self.count["finished"] += 1
            if row.text.stopped:
                self.cancel(row.id)
        if row.ended or (row.streams and self.turned >= row.due):
            streams = sum(other.streams for other in self.rows.values())
            row.due = self.turned + min(streams / DELTAS_PER_S, LONGEST_GAP_S)
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
        if not isinstance(error, T2RayError):
            error = GenerationError(f"the engine failed: {error}")
        for id in list(self.rows) if request is None else [request]:
            if row := self.rows.pop(id, None):
                row.error, row.ended = error, True
                self.count["failed"] += 1
                self._fresh.append(row)
        if request is None:
            self.after_step()
            with suppress(queue.Empty):
                while True:
                    _, done = self.scorings.get_nowait()
                    done.get_loop().call_soon_threadsafe(_settle, done, error)


def _wake(rows: list[Row]) -> None:
    for row in rows:
        row.woken.set()


def _settle(done: asyncio.Future[Any], result: object) -> None:
    """In the caller's loop: the caller may have gone."""
    if done.done():
        return
    if isinstance(result, Exception):
        done.set_exception(result)
    else:
        done.set_result(result)
