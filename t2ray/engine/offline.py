"""The offline engine: calls that are awaited together share static batches. For rollouts, the search and evaluation.

It computes in the thread of its callers' event loop, which blocks while a batch runs; or, where it serves a model that
cannot be batched continuously, in a thread of its own. Not here: requests that come and go one by one (`online`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from torch import Tensor

from t2ray.adapters.model import Model
from t2ray.core import Completion, Delta, Mixture, Prompt, SamplingParams, Token
from t2ray.engine.batches import MAX_ROWS, MAX_TOKENS, StaticBatches
from t2ray.engine.protocol import EngineStats
from t2ray.engine.requests import Request, finite, fitting, reading, scoring, whole
from t2ray.prompts import pictured

if TYPE_CHECKING:
    from t2ray.engine.grammar import Guide, Guides


class OfflineEngine:
    """Batches the calls of one turn of the event loop; see `engine.protocol.Engine`.

    With a `pool`, of one thread, batches are computed there, and calls that come meanwhile make the next batch.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_batch_rows: int = MAX_ROWS,
        max_batch_tokens: int = MAX_TOKENS,
        pool: Executor | None = None,
    ) -> None:
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
        self._pool, self._turn, self._running = pool, asyncio.Lock(), 0

    @property
    def experts(self) -> Collection[str]:
        return self.model.adapter.bank.keys()

    @property
    def stats(self) -> EngineStats:
        """Counts of whole batches. Keys and values are allocated by batch; with a pool there is no loop to be idle."""
        names = ("rows", "mixtures", "steps", "tokens", "finished", "failed")
        idle_s = 0.0 if self._pool else time.monotonic() - self._flushed
        return EngineStats(
            running=self._running, waiting=len(self._queue), aborted=0, folds=0, kv_free=self.batches.max_tokens,
            kv_total=self.batches.max_tokens, idle_s=idle_s, **{name: self.count[name] for name in names},
        )  # fmt: skip

    def start(self) -> None:
        """Nothing: a batch allocates what it needs."""

    def stop(self) -> None:
        """Ends the pool, if there is one, with the batch that it computes."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

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
                pictured=pictured(prompt),
                continues=self.chat.continues(prompt),
                sampling=sampling,
                guide=self._guide(sampling.grammar) if sampling.grammar else None,
            )
        )
        assert isinstance(completion, Completion)
        return finite(completion) if self._pool else completion

    def _guide(self, grammar: str) -> Guide:
        from t2ray.engine.grammar import Guides  # training never asks for any

        if self._guides is None:
            self._guides = Guides(self.chat, self.model.vocabulary)
        return self._guides.guide(grammar)

    async def stream(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> AsyncIterator[Delta]:
        """See `Engine.stream`: the whole answer in one piece."""
        yield whole(await self.generate(prompt, mixture, sampling))

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
        async with self._turn:
            queue, self._queue, self._flushing = self._queue, [], None
            self._z.clear()
            self._running = len(queue)
            try:
                if self._pool is None:
                    self.batches.run(queue)
                else:
                    await asyncio.get_running_loop().run_in_executor(self._pool, self.batches.run, queue)
            except BaseException:
                self.count["failed"] += len(queue)
                raise
            finally:
                self._running = 0
        answers = [request.result for request in queue if isinstance(request.result, Completion)]
        self.count["rows"], self.count["mixtures"] = len(queue), len({request.mixture for request in queue})
        self.count.update(steps=1, finished=len(queue), tokens=sum(len(answer.tokens) for answer in answers))
        self._flushed = time.monotonic()
