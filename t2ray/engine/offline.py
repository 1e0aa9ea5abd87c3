"""The offline engine: calls that are awaited together share static batches. For rollouts, the search and evaluation.

It computes in the thread of its callers' event loop, which blocks while a batch runs. Not here: requests that come and
go one by one (`online`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from t2ray.adapters.model import Model
from t2ray.core import Completion, Delta, Mixture, Prompt, SamplingParams, Token
from t2ray.engine.batches import StaticBatches
from t2ray.engine.protocol import EngineStats
from t2ray.engine.requests import Request, fitting, reading, scoring

if TYPE_CHECKING:
    from t2ray.engine.grammar import Guide, Guides


class OfflineEngine:
    """Batches the calls of one turn of the event loop; see `engine.protocol.Engine`."""

    def __init__(self, model: Model, *, max_batch_rows: int = 512, max_batch_tokens: int = 131_072) -> None:
        self.model = model
        self.chat, self.context = model.chat, model.context
        self.layout, self.base_digest = model.adapter.layout, model.base_digest
        self.batches = StaticBatches(model, max_rows=max_batch_rows, max_tokens=max_batch_tokens)
        self._guides: Guides | None = None
        self.count: Counter[str] = Counter()
        self._queue: list[Request] = []
        self._z: dict[Mixture, Tensor | None] = {}
        self._flushing: asyncio.Task[None] | None = None
        self._flushed = time.monotonic()

    @property
    def experts(self) -> Collection[str]:
        return self.model.adapter.bank.keys()

    @property
    def stats(self) -> EngineStats:
        """Counts of whole batches: nothing runs between two turns of the event loop."""
        names = ("rows", "mixtures", "steps", "tokens", "finished", "failed")
        return EngineStats(
            running=0, waiting=len(self._queue), aborted=0, folds=0, kv_free=0, kv_total=0,
            idle_s=time.monotonic() - self._flushed, **{name: self.count[name] for name in names},
        )  # fmt: skip

    def start(self) -> None:
        """Nothing: a batch allocates what it needs."""

    def stop(self) -> None:
        """Nothing: no batch outlives its callers."""

    def check(self) -> None:
        """Never raises: an error reaches the callers of its batch."""

    def fits(self, prompt: Prompt, max_tokens: int) -> bool:
        """See `Engine.fits`."""
        return len(self.model.chat.ids(prompt)) + max_tokens <= self.model.context

    def set_experts(self, changed: Mapping[str, Tensor], gone: Collection[str] = ()) -> None:
        """See `Engine.set_experts`."""
        self.model.adapter.set_experts(changed, gone)

    def vector(self, mixture: Mixture) -> Tensor:
        """See `Engine.vector`."""
        return self.model.adapter.mix(mixture)

    async def generate(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> Completion:
        """See `Engine.generate`."""
        ids, sampling = fitting(self.model, prompt, sampling, self.context)
        completion = await self._batched(
            Request(
                prompt_ids=ids,
                mixture=mixture,
                continues=self.chat.continues(prompt),
                sampling=sampling,
                guide=self._guide(sampling.grammar) if sampling.grammar else None,
            )
        )
        assert isinstance(completion, Completion)
        return completion

    def _guide(self, grammar: str) -> Guide:
        from t2ray.engine.grammar import Guides  # training never asks for any

        if self._guides is None:
            self._guides = Guides(self.chat, self.model.vocabulary)
        return self._guides.guide(grammar)

    async def stream(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> AsyncIterator[Delta]:
        """See `Engine.stream`: the whole answer in one piece, since a batch ends as a whole."""
        answer = await self.generate(prompt, mixture, sampling)
        yield Delta(
            text=answer.text,
            tokens=answer.tokens,
            prompt_tokens=len(answer.prompt_ids),
            finish_reason=answer.finish_reason,
        )

    async def score(self, prompt: Prompt, labels: tuple[str, ...], mixture: Mixture) -> tuple[float, ...]:
        """See `core.Score`."""
        scores: tuple[float, ...] = await self._batched(scoring(self.model, prompt, labels, mixture))
        return scores

    async def read(self, prompt: Prompt, mixture: Mixture, top: int) -> tuple[Token, ...]:
        """See `Engine.read`."""
        tokens: tuple[Token, ...] = await self._batched(reading(self.model, prompt, mixture, top))
        return tokens

    async def _batched(self, request: Request) -> Any:
        """The request's result, computed together with whatever else is ready in this turn of the event loop."""
        mixture = request.mixture
        if mixture not in self._z:  # an unknown expert fails its own caller, not the batch
            self._z[mixture] = self.model.adapter.mix(mixture) if mixture.weights else None
        request.z_K = self._z[mixture]
        if self._flushing is None:  # a task starts after every call that is ready now has queued
            self._flushing = asyncio.ensure_future(self._flush())
        self._queue.append(request)
        await asyncio.shield(self._flushing)
        return request.result

    async def _flush(self) -> None:
        queue, self._queue, self._flushing = self._queue, [], None
        self._z.clear()
        try:
            self.batches.run(queue)
        except BaseException:
            self.count["failed"] += len(queue)
            raise
        answers = [request.result for request in queue if isinstance(request.result, Completion)]
        self.count["rows"], self.count["mixtures"] = len(queue), len({request.mixture for request in queue})
        self.count.update(steps=1, finished=len(queue), tokens=sum(len(answer.tokens) for answer in answers))
        self._flushed = time.monotonic()
