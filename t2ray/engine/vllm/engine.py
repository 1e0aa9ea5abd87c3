"""The engine over vLLM: what `engine.protocol.Engine` asks, by vLLM's requests. For GPUs; on a CPU it gains nothing.

With `mode="mixtures"` every token has the gains of its own request's mixture, beside the dense weights. With "one" all
requests that run share a mixture, which is folded into the weights: at the base's speed, for rollouts. Their
log-probabilities are those of the distribution that is drawn from, at the sampling temperature. In half precision a
fold loses small changes (`lost`); what a trainer makes of it is an importance weight.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2ray.adapters.factors import Factors
from t2ray.adapters.svf import mixed
from t2ray.config.serve import EngineConfig
from t2ray.core import (
    Completion,
    Delta,
    GenerationError,
    Mixture,
    ModelError,
    Prompt,
    SamplingParams,
    T2RayError,
    Token,
    joined,
)
from t2ray.engine.grammar import check
from t2ray.engine.protocol import EngineStats
from t2ray.engine.requests import fitting, prompt_ids
from t2ray.engine.text import TextStream
from t2ray.engine.vllm import seams
from t2ray.engine.vllm.answers import Answer, label_score, prompt_tokens
from t2ray.engine.vllm.arguments import engine_arguments, request_arguments
from t2ray.engine.vllm.bank import Mode
from t2ray.engine.vllm.pump import Job, Pump
from t2ray.models.chat import Chat


class VLLMEngine:
    """Generates for many callers at once; see `engine.protocol.Engine`."""

    def __init__(
        self, folder: Path, factors: Factors, chat: Chat, config: EngineConfig | None = None, *, mode: Mode = "mixtures"
    ) -> None:
        """Loads the model in `folder` into vLLM: in this process on a CPU, in one of its own on GPUs.

        Raises:
            ModelError: vLLM does not run this model, or lays its matrices out in an unknown way.
        """
        self.chat, self.mode = chat, mode
        self.config = config or EngineConfig()
        self.layout, self.base_digest = factors.layout, factors.base_digest
        ranks, layers = zip(*((target.rank, target.layer) for target in factors.layout), strict=True)
        self._layer_of_K = torch.repeat_interleave(torch.tensor(layers), torch.tensor(ranks))
        vllm_config = engine_arguments(folder, factors, self.config, mode)
        self._pump = Pump(vllm_config, mode, processes=not seams.current_platform.is_cpu())
        missing = {name for found in self._pump.engine.collective_rpc("t2ray_missing") for name in found}
        if missing:
            self._pump.stop()
            raise ModelError(f"{folder}: vLLM has no layer for {len(missing)} adapted matrices, as {min(missing)}")
        model = vllm_config.model_config
        self.context, self.vocabulary = int(model.max_model_len), int(model.get_vocab_size())
        self._kv_bytes = int(vllm_config.cache_config.kv_cache_memory_bytes)
        self._pump.after_step, self._pump.ended = self._wake, self._retire
        self._answers: dict[str, Answer] = {}
        self._count = Counter({"tokens": 0, "finished": 0, "aborted": 0, "failed": 0})
        self._bank: dict[str, Tensor] = {}
        self._keys: dict[str, str] = {}
        self._versions, self._numbers = itertools.count(1), itertools.count()
        self._known: dict[Mixture, Mixture] = {}
        self._versioning = threading.Lock()
        """A request is queued with the versions that it names before they can be dropped."""

    def start(self) -> None:
        """Starts the thread that drives vLLM."""
        self._pump.start()

    def stop(self) -> None:
        """Ends it; what is still running fails."""
        self._pump.stop()

    def check(self) -> None:
        """Raises GenerationError when the thread has ended."""
        if not self._pump.runs:
            raise GenerationError("the engine has stopped") from self._pump.error

    # -------------------------------------------------------------------------------------------------------- experts

    @property
    def experts(self) -> Collection[str]:
        return self._bank.keys()

    @property
    def lost(self) -> float:
        """What the last fold lost to rounding, as a share of the change; see `Bank.fold`."""
        return self._pump.lost

    def set_experts(self, changed: Mapping[str, Tensor], gone: Collection[str] = ()) -> None:
        """See `Engine.set_experts`. Each vector goes to the workers once, under a new key, so that requests that wait
        or run keep theirs."""
        keys = {name: f"{name}@{next(self._versions)}" for name in changed}
        old = [self._keys[name] for name in {*changed, *gone} if name in self._keys]
        data = {keys[name]: z_K.float().cpu().numpy().tobytes() for name, z_K in changed.items()}

        workers = self._pump.engine.collective_rpc
        self._pump.call(lambda: workers("t2ray_set_experts", args=(data, [])))
        with self._versioning:
            kept = {name: z_K for name, z_K in self._bank.items() if name not in gone}
            self._bank = kept | {name: z_K.float().cpu() for name, z_K in changed.items()}
            self._keys = {name: key for name, key in self._keys.items() if name in kept} | keys
            self._known = {}

        def drop() -> None:
            """Behind every request that was made with the old versions; those in use go with their last request."""
            workers("t2ray_set_experts", args=({}, [key for key in old if key not in self._pump.live]))

        self._pump.call(drop)

    def _retire(self, key: str) -> None:
        """In the thread: no request uses an expert's version any more."""
        if key not in self._keys.values():
            self._pump.engine.collective_rpc("t2ray_set_experts", args=({}, [key]))

    def vector(self, mixture: Mixture) -> Tensor:
        """See `Engine.vector`."""
        return mixed(mixture, self._bank, self._layer_of_K)

    def _versioned(self, mixture: Mixture) -> Mixture:
        """The mixture with the keys of its experts' versions; raises as `mixed` does, before vLLM is asked."""
        if mixture not in self._known:
            self.vector(mixture)
            self._known[mixture] = Mixture(weights=tuple((self._keys[name], alpha) for name, alpha in mixture.weights))
        return self._known[mixture]

    # -------------------------------------------------------------------------------------------------------- callers

    async def generate(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> Completion:
        """See `Engine.generate`."""
        answer = self._ask(prompt, mixture, sampling, streams=False)
        whole = joined([delta async for delta in self._deltas(*answer)])
        assert whole.finish_reason is not None
        return Completion(
            prompt_ids=answer[1].prompt_ids, tokens=whole.tokens, text=whole.text, finish_reason=whole.finish_reason,
            mixture=mixture, thinking=whole.thinking,
        )  # fmt: skip

    async def stream(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> AsyncIterator[Delta]:
        """See `Engine.stream`."""
        async for delta in self._deltas(*self._ask(prompt, mixture, sampling, streams=True)):
            yield delta

    async def score(self, prompt: Prompt, labels: tuple[str, ...], mixture: Mixture) -> tuple[float, ...]:
        """See `core.Score`: a reading of the prompt with each of its labels, of which vLLM shares what it can."""
        label_ids = [self.chat.encode_answer(label) for label in labels]
        ids = prompt_ids(self, prompt, max(map(len, label_ids)) + 1)
        rows = await asyncio.gather(*(self._scores((*ids, *label), mixture, 0) for label in label_ids))
        pairs = zip(label_ids, rows, strict=True)
        return tuple(label_score((*ids, *label), len(label), scores) for label, scores in pairs)

    async def read(self, prompt: Prompt, mixture: Mixture, top: int) -> tuple[Token, ...]:
        """See `Engine.read`."""
        ids = prompt_ids(self, prompt, 1)
        return prompt_tokens(self.chat, ids, await self._scores(ids, mixture, top), top)

    def fits(self, prompt: Prompt, max_tokens: int) -> bool:
        """See `Engine.fits`."""
        return len(self.chat.ids(prompt)) + max_tokens <= self.context

    @property
    def stats(self) -> EngineStats:
        pump = self._pump
        running, waiting = len(pump.jobs), len(pump.waiting)
        return EngineStats(
            running=running, waiting=waiting, kv_free=int(self._kv_bytes * (1 - pump.usage)), kv_total=self._kv_bytes,
            idle_s=time.monotonic() - pump.turned, **self._count, **pump.count,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- requests

    def _ask(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams, *, streams: bool) -> tuple[str, Answer]:
        ids, sampling = fitting(self, prompt, sampling, self.context)
        if sampling.grammar:
            check(sampling.grammar)
        self.check()
        id = f"{next(self._numbers)}"
        answer = Answer(
            chat=self.chat, prompt_ids=ids, sampling=sampling, loop=asyncio.get_running_loop(), streams=streams,
            text=TextStream(self.chat, sampling.stop, continues=self.chat.continues(prompt)),
        )  # fmt: skip
        with self._versioning:
            job = Job(
                id=id, prompt_ids=ids, mixture=self._versioned(mixture),
                params=request_arguments(sampling, self.chat, streams),
                deliver=partial(self._deliver, id), fail=partial(self._fail, id),
            )  # fmt: skip
            self._answers[id] = answer
            self._pump.soon(lambda: self._pump.add(job))
        return id, answer

    async def _deltas(self, id: str, answer: Answer) -> AsyncIterator[Delta]:
        try:
            while True:
                await answer.woken.wait()
                answer.woken.clear()
                if answer.error is not None:
                    raise answer.error
                if pieces := [answer.pieces.popleft() for _ in range(len(answer.pieces))]:
                    yield joined(pieces)
                    if pieces[-1].finish_reason is not None:
                        return
        finally:
            if self._answers.pop(id, None) is not None and not answer.ended and answer.error is None:
                self._count["aborted"] += 1
                self._pump.soon(lambda: self._pump.abort(id))

    async def _scores(self, ids: tuple[int, ...], mixture: Mixture, top: int) -> list[Any]:
        """What vLLM says of each place of a prompt."""
        loop: Any = asyncio.get_running_loop()
        done: asyncio.Future[list[Any]] = loop.create_future()
        self.check()
        id = f"{next(self._numbers)}"
        params = {
            "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top, "detokenize": False,
            "output_kind": seams.RequestOutputKind.FINAL_ONLY,
        }  # fmt: skip
        with self._versioning:
            job = Job(
                id=id, prompt_ids=ids, params=params, mixture=self._versioned(mixture),
                deliver=lambda output: loop.call_soon_threadsafe(_settle, done, output.prompt_logprobs),
                fail=lambda error: loop.call_soon_threadsafe(_settle, done, error),
            )  # fmt: skip
            self._pump.soon(lambda: self._pump.add(job))
        try:
            return await done
        finally:
            if not done.done() or done.cancelled():
                self._pump.soon(lambda: self._pump.abort(id))

    def _deliver(self, id: str, output: Any) -> None:
        """In the thread: new tokens; an answer that its own stop string has ended is ended in vLLM, too."""
        answer, piece = self._answers.get(id), output.outputs[0]
        if answer is None:
            return
        try:
            self._count["tokens"] += answer.add(piece.token_ids, piece.logprobs)
        except T2RayError as error:
            self._fail(id, error)
            self._pump.abort(id)
            return
        if answer.ended:
            self._count["finished"] += 1
            if not output.finished:
                self._pump.abort(id)
        elif output.finished:
            self._fail(id, GenerationError(f"vLLM ended the answer: {piece.finish_reason}"))

    def _fail(self, id: str, error: Exception) -> None:
        if (answer := self._answers.get(id)) is not None:
            answer.error = error
            self._count["failed"] += 1

    def _wake(self) -> None:
        """In the thread, after a step: those who have something new, each in its own event loop."""
        answers = list(self._answers.values())
        streams = sum(answer.streams for answer in answers)
        for answer in answers:
            if (answer.pieces or answer.error is not None) and answer.is_due(streams):
                try:
                    answer.loop.call_soon_threadsafe(answer.woken.set)
                except RuntimeError:  # a caller's loop that was closed meanwhile
                    continue


def _settle(done: asyncio.Future[list[Any]], result: Any) -> None:
    """In the caller's loop: the caller may have gone."""
    if done.done():
        return
    if isinstance(result, Exception):
        done.set_exception(result)
    else:
        done.set_result(result)
