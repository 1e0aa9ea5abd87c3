"""The online engine: requests come and go one by one and share every step, each with its own mixture. For serving.

transformers' continuous batching runs the loop in a thread of its own. This thread alone uses the model: scorings are
queued to it and run between two steps. Callers await `generate`, `stream` and `score` in their own event loop.
Not here: what a turn of the loop does (`loop`), static batches (`batches`), and the seam to transformers
(`engine.transformers`).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any

from torch import Tensor

from t2ray.adapters.model import Model
from t2ray.config.serve import EngineConfig
from t2ray.core import (
    Completion,
    ContextExceeded,
    Delta,
    GenerationError,
    Mixture,
    Prompt,
    SamplingParams,
    Token,
    joined,
)
from t2ray.engine.grammar import Guides
from t2ray.engine.loop import Loop, Row
from t2ray.engine.protocol import EngineStats
from t2ray.engine.requests import Request, finite, fitting, reading, scoring, whole
from t2ray.engine.sampling import uniforms
from t2ray.engine.text import TextStream
from t2ray.engine.transformers import Manager
from t2ray.prompts import pictured


class OnlineEngine:
    """Generates for many callers at once; see `engine.protocol.Engine`."""

    def __init__(self, model: Model, config: EngineConfig | None = None) -> None:
        self.model = model
        self.chat, self.context = model.chat, model.context
        self.layout, self.base_digest = model.adapter.layout, model.base_digest
        self.config = config or EngineConfig()
        self._loop = Loop(model)
        self._guides = Guides(model.chat, model.vocabulary)
        self._z: dict[Mixture, tuple[int, Tensor | None]] = {}
        self._numbers, self._salts = itertools.count(), itertools.count(1)
        self._manager = Manager(model.hf, self.config, self._loop)
        self._loop.cancel = self._manager.cancel_request
        self._loop.plain_attention = self._manager.plain_attention

    @property
    def experts(self) -> Collection[str]:
        return self.model.adapter.bank.keys()

    def start(self) -> None:
        """Allocates the cache and starts the loop's thread."""
        self._manager.begin()

    def stop(self) -> None:
        """Ends the thread; what is still running fails."""
        self._manager.stop(hard_stop=True)

    # -------------------------------------------------------------------------------------------------------- callers

    async def generate(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> Completion:
        """See `Engine.generate`. A prompt with pictures is answered between two steps, which all others wait for."""
        if pictured(prompt):
            return await self._seeing(prompt, mixture, sampling)
        row = await self._submit(prompt, mixture, sampling, streams=False)
        answer = joined([delta async for delta in self._deltas(row)])
        assert answer.finish_reason is not None
        return Completion(
            prompt_ids=row.prompt_ids,
            tokens=answer.tokens,
            text=answer.text,
            finish_reason=answer.finish_reason,
            mixture=mixture,
            thinking=answer.thinking,
        )

    async def stream(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> AsyncIterator[Delta]:
        """See `Engine.stream`.

        The first token comes at once; later ones are joined, since all streams share `loop.DELTAS_PER_S`.
        """
        if pictured(prompt):
            yield whole(await self._seeing(prompt, mixture, sampling))
            return
        row = await self._submit(prompt, mixture, sampling, streams=True)
        async for delta in self._deltas(row):
            yield delta

    async def _seeing(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> Completion:
        """The answer to a prompt with pictures, which transformers' continuous batching does not take."""
        await asyncio.to_thread(self.chat.ids, prompt)  # which keeps what it made of the pictures
        ids, sampling = fitting(self.model, prompt, sampling, self.context)
        guide = await asyncio.to_thread(self._guides.guide, sampling.grammar) if sampling.grammar else None
        asked = Request(prompt_ids=ids, mixture=mixture, pictured=pictured(prompt), sampling=sampling, guide=guide)
        completion = finite(await self._between_steps(asked))
        self._loop.count["finished"] += 1
        self._loop.count["tokens"] += len(completion.tokens)
        return completion

    async def score(self, prompt: Prompt, labels: tuple[str, ...], mixture: Mixture) -> tuple[float, ...]:
        """See `core.Score`."""
        if pictured(prompt):
            await asyncio.to_thread(self.chat.ids, prompt)
        scores: tuple[float, ...] = await self._between_steps(scoring(self.model, prompt, labels, mixture))
        return scores

    async def read(self, prompt: Prompt, mixture: Mixture, top: int) -> tuple[Token, ...]:
        """See `Engine.read`."""
        tokens: tuple[Token, ...] = await self._between_steps(reading(self.model, prompt, mixture, top))
        return tokens

    async def _between_steps(self, request: Request) -> Any:
        _, request.z_K = self._mixed(request.mixture)
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.check()
        self._loop.scorings.put((request, done))
        self._manager._wake_up_loop.set()
        return await done

    def fits(self, prompt: Prompt, max_tokens: int) -> bool:
        """See `Engine.fits`: the context, and the cache."""
        return len(self.chat.ids(prompt)) + max_tokens <= min(self.context, self.config.kv_tokens)

    def set_experts(self, changed: Mapping[str, Tensor], gone: Collection[str] = ()) -> None:
        """See `Engine.set_experts`."""
        self.model.adapter.set_experts(changed, gone)
        self._z = {}

    def vector(self, mixture: Mixture) -> Tensor:
        """See `Engine.vector`."""
        return self.model.adapter.mix(mixture)

    @property
    def stats(self) -> EngineStats:
        running, waiting = self._manager.counts
        free, total = self._manager.pages
        idle_s = time.monotonic() - self._loop.turned
        return EngineStats(
            running=running, waiting=waiting, kv_free=free, kv_total=total, idle_s=idle_s, **self._loop.count
        )

    async def _submit(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams, *, streams: bool) -> Row:
        ids, sampling = fitting(self.model, prompt, sampling, min(self.context, self.config.kv_tokens))
        if len(ids) + sampling.max_tokens > self.config.kv_tokens:
            raise ContextExceeded(
                f"a prompt of {len(ids)} tokens and {sampling.max_tokens} for the answer exceed the engine's cache "
                f"of {self.config.kv_tokens} tokens; shorten the prompt, lower max_tokens or raise engine.kv_tokens",
                len(ids), sampling.max_tokens, self.config.kv_tokens,
            )  # fmt: skip
        guide = await asyncio.to_thread(self._guides.guide, sampling.grammar) if sampling.grammar else None
        self.check()
        salt, z_K = self._mixed(mixture)
        row = Row(
            id=f"{salt}-{next(self._numbers)}",
            prompt_ids=ids,
            z_K=z_K,
            sampling=sampling,
            guide=guide,
            uniforms=uniforms(sampling.seed, sampling.max_tokens).tolist() if sampling.temperature else [],
            text=TextStream(self.model.chat, sampling.stop, continues=self.chat.continues(prompt)),
            loop=asyncio.get_running_loop(),
            streams=streams,
        )
        self._loop.rows[row.id] = row
        self._manager.add_request(
            list(ids),
            row.id,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=-1 if sampling.ignore_eos else list(self.model.chat.eos_ids),
        )
        return row

    async def _deltas(self, row: Row) -> AsyncIterator[Delta]:
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
        finally:
            if not row.ended:
                self._drop(row)

    def _drop(self, row: Row) -> None:
        if self._loop.rows.pop(row.id, None) is not None:
            row.ended = True
            self._loop.count["aborted"] += 1
            self._manager.cancel_request(row.id)

    def check(self) -> None:
        """Raises GenerationError when the loop's thread has ended."""
        if not self._manager.is_running():
            raise GenerationError("the engine has stopped") from self._manager.background_thread_status.fatal_error

    def _mixed(self, mixture: Mixture) -> tuple[int, Tensor | None]:
        """One tensor for all requests of a mixture, until the experts change; as many as a batch has rows are kept.

        With the tensor's number: requests of one number may share what was computed of a prefix. The base's is 0.
        """
        if not mixture.weights:
            return 0, None
        z = self._z
        salt, z_K = z.pop(mixture) if mixture in z else (next(self._salts), self.model.adapter.mix(mixture))
        if len(z) >= self.config.batch_rows:
            del z[next(iter(z))]  # the one that was asked for longest ago
        z[mixture] = salt, z_K
        return salt, z_K
