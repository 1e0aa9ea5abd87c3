"""The offline engine: calls that are awaited together share static batches. For rollouts, the search and evaluation.

Callers hold it as `Generate` and `Score`; it computes in their event loop's thread, which blocks while a batch runs.
Not here: requests that come and go one by one (`continuous`).
"""

from __future__ import annotations

import asyncio

from torch import Tensor

from t2ray.adapters.model import Model
from t2ray.core import Completion, Message, Mixture, Prompt, SamplingParams
from t2ray.engine.batches import Request, StaticBatches, prompt_ids, scoring


class OfflineEngine:
    """Batches the calls of one event loop turn. Experts are `model.svf.bank`, by name."""

    def __init__(self, model: Model, *, max_batch_rows: int = 512, max_batch_tokens: int = 131_072) -> None:
        self.model = model
        self.batches = StaticBatches(model, max_rows=max_batch_rows, max_tokens=max_batch_tokens)
        self._queue: list[Request] = []
        self._z: dict[Mixture, Tensor | None] = {}
        self._flushing: asyncio.Task[None] | None = None

    async def generate(self, messages: Prompt, mixture: Mixture, sampling: SamplingParams) -> Completion:
        """See `core.Generate`.

        Raises:
            ConfigError: prompt and answer do not fit the model's context.
            UnknownExpert: the mixture names no expert of the bank.
        """
        ids = prompt_ids(self.model, messages, sampling.max_tokens)
        completion = await self._batched(Request(prompt_ids=ids, mixture=mixture, sampling=sampling))
        assert isinstance(completion, Completion)
        return completion

    async def score(
        self, messages: tuple[Message, ...], labels: tuple[str, ...], mixture: Mixture
    ) -> tuple[float, ...]:
        """See `core.Score`. Raises as `generate` does."""
        scores = await self._batched(scoring(self.model, messages, labels, mixture))
        assert isinstance(scores, tuple)
        return scores

    def fits(self, messages: tuple[Message, ...], max_tokens: int) -> bool:
        """Whether a prompt and an answer of `max_tokens` fit the model's context."""
        return len(self.model.chat.encode(messages)) + max_tokens <= self.model.context

    async def _batched(self, request: Request) -> Completion | tuple[float, ...] | None:
        """The request's result, computed together with whatever else is ready in this turn of the event loop."""
        mixture = request.mixture
        if mixture not in self._z:  # an unknown expert fails its own caller, not the batch
            self._z[mixture] = self.model.svf.mix(mixture) if mixture.weights else None
        request.z_K = self._z[mixture]
        if self._flushing is None:  # a task starts after every call that is ready now has queued
            self._flushing = asyncio.ensure_future(self._flush())
        self._queue.append(request)
        await asyncio.shield(self._flushing)
        return request.result

    async def _flush(self) -> None:
        queue, self._queue, self._flushing = self._queue, [], None
        self._z.clear()
        self.batches.run(queue)
