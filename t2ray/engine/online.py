"""The continuous engine: requests come and go one by one, and share every step, each with its own mixture. For serving.

transformers' continuous batching runs the loop in a thread of its own, which alone uses the model: scorings are queued
to it and run between two steps. Callers hold `generate`, `stream` and `score` in their event loop. Not here: what a
turn of the loop does (`loop`), static batches (`engine`), and the seam to transformers (`manager`).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from t2ray.adapters.model import Model
from t2ray.config.serve import EngineConfig
from t2ray.core import Completion, ConfigError, Delta, GenerationError, Message, Mixture, Prompt, SamplingParams, joined
from t2ray.engine.batches import prompt_ids, scoring
from t2ray.engine.loop import Loop, Row
from t2ray.engine.sampling import uniforms
from t2ray.engine.text import TextStream
from t2ray.engine.transformers import Manager


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


class OnlineEngine:
    """Generates for many callers at once. Experts are `model.svf.bank`, replaced as a whole by `set_experts`."""

    loop = Loop  # the benches have one that never folds

    def __init__(self, model: Model, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config or EngineConfig()
        self._loop = self.loop(model)
        self._z: dict[Mixture, Tensor | None] = {}
        self._numbers = itertools.count()
        self._manager = Manager(model.hf, self.config, self._loop)
        self._loop.cancel = self._manager.cancel_request

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
    ) -> AsyncIterator[Delta]:
        """The answer as it grows, or with `whole` at its end; raises as `generate` does. Closing the iterator ends the
        generation.

        The first token comes at once; later ones are joined, since all streams share `loop.DELTAS_PER_S`.
        """
        row = self._submit(messages, mixture, sampling, request_id, streams=not whole)
        async for delta in self._deltas(row):
            yield delta

    async def score(
        self, messages: tuple[Message, ...], labels: tuple[str, ...], mixture: Mixture
    ) -> tuple[float, ...]:
        """See `core.Score`. Raises as `generate` does."""
        request = scoring(self.model, messages, labels, mixture)
        request.z_K = self._mixed(mixture)
        done: asyncio.Future[tuple[float, ...]] = asyncio.get_running_loop().create_future()
        self.check()
        self._loop.scorings.put((request, done))
        self._manager._wake_up_loop.set()
        return await done

    def abort(self, request_id: str) -> int:
        """Ends the generations of that name, whose callers get a `GenerationError`; how many there were."""
        rows = [row for row in list(self._loop.rows.values()) if row.name == request_id]
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
        idle_s = time.monotonic() - self._loop.turned
        return EngineStats(
            running=running, waiting=waiting, kv_free=free, kv_total=total, idle_s=idle_s, **self._loop.count
        )

    def _submit(
        self, messages: Prompt, mixture: Mixture, sampling: SamplingParams, name: str | None, *, streams: bool
    ) -> Row:
        ids = prompt_ids(self.model, messages, sampling.max_tokens)
        if len(ids) + sampling.max_tokens > self.config.kv_tokens:
            raise ConfigError(
                f"a prompt of {len(ids)} tokens and {sampling.max_tokens} for the answer exceed the engine's cache "
                f"of {self.config.kv_tokens} tokens; shorten the prompt, lower max_tokens or raise engine.kv_tokens"
            )
        self.check()
        row = Row(
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

    def _mixed(self, mixture: Mixture) -> Tensor | None:
        """One tensor for all requests of a mixture, until the experts change; as many as a batch has rows are kept."""
        z = self._z
        z_K = z.pop(mixture) if mixture in z else self.model.svf.mix(mixture) if mixture.weights else None
        if len(z) >= self.config.batch_rows:
            del z[next(iter(z))]  # the one that was asked for longest ago
        z[mixture] = z_K
        return z_K
