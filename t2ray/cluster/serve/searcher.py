"""The `Searcher`: few-shot searches for a task's mixture (paper section 3.2, c), in the background.

Deployed once, so that everybody finds a search by its id; it holds no model: members are requests in the `Generator`s'
batches. Not here: the search itself (`t2ray.adapt`).
"""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from t2ray.adapt.cem import Round
from t2ray.adapt.fewshot import fewshot
from t2ray.api.backend import Adaptation, AdaptationRequest
from t2ray.cluster.serve.catalog import Watch
from t2ray.cluster.serve.handles import asked, told
from t2ray.config.files import nearest, validate
from t2ray.config.search import CEMConfig
from t2ray.config.serve import VERIFIERS, ServeConfig
from t2ray.core import (
    Completion,
    ConfigError,
    Example,
    Mixture,
    Prompt,
    SamplingParams,
    T2RayError,
    UnknownExpert,
    check_name,
)
from t2ray.tasks.verifier import Verifier

CHUNK = 16
"""Requests of a search that travel together; small enough for other requests to come in between."""

KEPT = 256
"""Searches whose outcome is remembered."""


class Searcher:
    """Runs searches and remembers how they went."""

    def __init__(self, config: dict[str, Any], generator: Any) -> None:
        self.config = ServeConfig.model_validate(config)
        self.generator = generator
        self.watch = Watch(generator, self.config.poll_s)
        self._searches: OrderedDict[str, Adaptation] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    @told
    async def adapt(self, request: AdaptationRequest) -> Adaptation:
        """Starts a few-shot search (paper section 3.2, c).

        Raises:
            ConfigError: a name, verifier or setting that is none.
            UnknownExpert: an expert that the search shall mix is not there.
        """
        check_name(request.name, "mixture")
        if request.verifier not in VERIFIERS:
            raise ConfigError(f"unknown verifier {request.verifier!r}{nearest(request.verifier, VERIFIERS)}")
        settings = validate(CEMConfig, dict(request.settings), where="settings")
        await self.watch.refresh()
        known = {name: info for name, info in self.watch.catalog.experts.items() if info.problem is None}
        experts = request.experts or tuple(name for name, info in known.items() if not info.classifies)
        for name in experts:
            if name not in known:
                raise UnknownExpert(f"unknown expert {name!r}{nearest(name, known)}")
        if not experts:
            raise ConfigError("there are no experts to mix; upload some first")
        search = Adaptation(
            id=f"adapt-{uuid.uuid4().hex[:16]}",
            name=request.name,
            status="running",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._searches[search.id] = search
        if len(self._searches) > KEPT:
            self._searches.popitem(last=False)
        task = asyncio.create_task(self._search(search.id, request, experts, settings))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return search

    @told
    async def adaptation(self, id: str) -> Adaptation:
        """Where a search stands.

        Raises:
            UnknownExpert: no search of that id; a restart forgets all of them.
        """
        if id not in self._searches:
            raise UnknownExpert(f"no adaptation {id!r}; a restart ends searches: start it again")
        return self._searches[id]

    async def _search(self, id: str, request: AdaptationRequest, experts: tuple[str, ...], settings: CEMConfig) -> None:
        def tell(done: Round) -> None:
            self._note(
                id,
                progress=(done.iteration + 1) / settings.iterations,
                accuracy=done.best.accuracy,
                seconds=done.seconds,
            )

        examples = [
            Example(id=f"{request.name}/{i}", messages=messages, row={"answer": answer})
            for i, (messages, answer) in enumerate(request.examples)
        ]
        calls = _Together(self.generator, SamplingParams(max_tokens=request.max_tokens))
        try:
            with Verifier(VERIFIERS[request.verifier], workers=1) as verify:
                found = await fewshot(
                    calls.generate, calls.score, verify, examples, experts,
                    settings=settings, sampling=calls.sampling, gold=lambda row: str(row["answer"]), progress=tell,
                )  # fmt: skip
            found.check()
            meta = {
                "shots": len(examples),
                "experts": list(experts),
                "accuracy": found.accuracy,
                "verifier": request.verifier,
            }
            await asked(self.generator.save_mixture, request.name, found.mixture, meta)
        except T2RayError as error:
            self._note(id, status="failed", error=str(error))
            return
        except Exception as error:  # told to whoever asks, and raised for the log
            self._note(id, status="failed", error=f"the search failed: {type(error).__name__}")
            raise
        self._note(id, status="succeeded", progress=1.0, accuracy=found.accuracy, mixture=found.mixture)

    def _note(self, id: str, **news: Any) -> None:
        if id in self._searches:
            self._searches[id] = replace(self._searches[id], **news)


class _Together:
    """`Generate` and `Score` over a handle: what is awaited together travels in chunks, which replicas share."""

    def __init__(self, generator: Any, sampling: SamplingParams) -> None:
        self.generator, self.sampling = generator, sampling
        self._queues: dict[str, list[tuple[Any, asyncio.Future[Any]]]] = {}

    async def generate(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> Completion:
        """See `core.Generate`."""
        completion: Completion = await self._queued("generate_many", (prompt, mixture))
        return completion

    async def score(self, prompt: Prompt, labels: tuple[str, ...], mixture: Mixture) -> tuple[float, ...]:
        """See `core.Score`."""
        scores: tuple[float, ...] = await self._queued("score_many", (prompt, labels, mixture))
        return scores

    async def _queued(self, method: str, request: Any) -> Any:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        queue = self._queues.setdefault(method, [])
        queue.append((request, done))
        if len(queue) == 1:  # a task starts after every call that is ready now has queued
            asyncio.ensure_future(self._flush(method))
        return await done

    async def _flush(self, method: str) -> None:
        queue = self._queues.pop(method)
        chunks = [queue[start : start + CHUNK] for start in range(0, len(queue), CHUNK)]
        await asyncio.gather(*(self._chunk(method, chunk) for chunk in chunks))

    async def _chunk(self, method: str, chunk: Sequence[tuple[Any, asyncio.Future[Any]]]) -> None:
        requests = [request for request, _ in chunk]
        more = (self.sampling,) if method == "generate_many" else ()
        results: list[Any] | None = None
        try:
            results = await asked(getattr(self.generator, method), requests, *more)
        except T2RayError as error:
            for _, done in chunk:
                if not done.done():
                    done.set_exception(error)
            return
        finally:
            if results is None:  # a fault of ours: nobody shall wait for ever
                for _, done in chunk:
                    done.cancel()
        assert results is not None
        for (_, done), result in zip(chunk, results, strict=True):
            if not done.done():
                done.set_result(result)
