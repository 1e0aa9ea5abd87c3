"""A `Generator` replica: one model, one engine, every expert of the registry. Deployed by `cluster.serve`.

Not here: which mixture a request gets (`dispatcher`), and HTTP (`ingress`).
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray import serve
from ray.util import metrics

from t2ray.adapters.factors import Factors
from t2ray.adapters.model import load_model
from t2ray.adapters.sparse import held
from t2ray.api.backend import Catalog
from t2ray.cluster.serve.experts import Experts
from t2ray.cluster.serve.handles import raised, told
from t2ray.cluster.serve.looking import Looking
from t2ray.cluster.serve.monitor import Pulse
from t2ray.config.serve import ServeConfig
from t2ray.core import (
    Completion,
    Delta,
    ExpertError,
    GenerationError,
    Mixture,
    Prompt,
    SamplingParams,
    T2RayError,
    Token,
    UnknownExpert,
    check_name,
)
from t2ray.engine.choose import choose, vllm_engine
from t2ray.engine.protocol import Engine
from t2ray.engine.serving import sample, serving_engine
from t2ray.experts.admission import check_header
from t2ray.experts.exchange import import_expert
from t2ray.experts.heatmap import HeatMap, mean_distance
from t2ray.experts.registry import Registry

PRIMITIVES = "64"
"""oneDNN keeps code for each number of tokens that a matrix was multiplied with: 300 MB by its default of 1024."""

UPLOAD = "the upload"

STALLED_S = 20.0
"""A loop that has not turned for so long is stuck: it turns ten times a second when it is idle."""


class Generator:
    """Answers with any mixture of the registry's experts."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: dict[str, Any], monitor: Any
    ) -> None:
        self.config = ServeConfig.model_validate(config)
        torch.set_num_threads(self.config.engine.threads)
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVES)  # read at the first product
        assert self.config.factors is not None and self.config.experts is not None
        self.factors = Factors.open(self.config.factors)
        kind = choose(self.config.engine.kind, self.config.model, self.config.factors, gpu=torch.cuda.is_available())
        vllm = kind == "vllm"
        self.engine: Engine
        if vllm:
            self.engine = vllm_engine(self.config.model, self.factors, self.config.engine, mode="mixtures")
        else:
            self.engine = await serving_engine(
                load_model(self.config.model, self.config.factors), self.config.engine
            )  # which has started
        self.experts = Experts(self.config, self.engine, partial(held, self.factors))
        await self.experts.open()
        if vllm:
            self.engine.start()
            await sample(self.engine)  # what it loads and compiles at its first step belongs to its start: no stall
        self._gauges = {
            name: metrics.Gauge(f"t2ray_{name}", description=text)
            for name, text in (
                ("running_requests", "requests in the batch"),
                ("waiting_requests", "requests that wait for the batch"),
                ("batch_rows", "rows of the last step"),
                ("batch_mixtures", "distinct mixtures of the last step"),
                ("kv_used", "share of the cache in use"),
                ("tokens_per_second", "generated tokens"),
            )
        }
        self._monitor, self._reporting = monitor, Looking("the monitor", 1.0)
        self._told: tuple[int, float] = 0, time.monotonic()
        self.experts.follow()
        self._reporting.start(self._report)

    # --------------------------------------------------------------------------------------------------------- passes

    @told
    async def generate(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> Completion:
        """See `core.Generate`."""
        await self.experts.know(mixture)
        return await self.engine.generate(prompt, mixture, sampling)

    @told
    async def generate_many(
        self, requests: Sequence[tuple[Prompt, Mixture]], sampling: SamplingParams
    ) -> list[Completion]:
        """The answers of a few-shot search's members."""
        answers = await asyncio.gather(*(self.generate(p, mixture, sampling) for p, mixture in requests))
        return list(map(raised, answers))

    async def stream(
        self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams
    ) -> AsyncIterator[Delta | T2RayError]:
        """The answer as it grows; an error comes as its last piece (`told`)."""
        try:
            await self.experts.know(mixture)
            async for delta in self.engine.stream(prompt, mixture, sampling):
                yield delta
        except T2RayError as error:
            yield error

    @told
    async def read(self, prompt: Prompt, mixture: Mixture, top: int) -> tuple[Token, ...]:
        """See `Engine.read`."""
        await self.experts.know(mixture)
        return await self.engine.read(prompt, mixture, top)

    @told
    async def score(self, prompt: Prompt, labels: tuple[str, ...], mixture: Mixture) -> tuple[float, ...]:
        """See `core.Score`."""
        await self.experts.know(mixture)
        return await self.engine.score(prompt, labels, mixture)

    @told
    async def score_many(self, requests: Sequence[tuple[Prompt, tuple[str, ...], Mixture]]) -> Any:
        """The scores of a few-shot search's members."""
        return list(map(raised, await asyncio.gather(*(self.score(*request) for request in requests))))

    # -------------------------------------------------------------------------------------------------------- experts

    @told
    async def catalog(self, seen: str) -> tuple[str, Catalog | None]:
        """What there is now, whichever replica is asked, with its digest; None for a caller who has seen it."""
        digest, catalog = await asyncio.to_thread(self.experts.catalog)
        return digest, None if digest == seen else catalog

    @told
    async def heat(self, name: str) -> HeatMap:
        """The mean of |z - 1| of an expert, per decoder layer and kind of matrix.

        Raises:
            ResourceError: it cannot be used.
            UnknownExpert: no such expert here.
        """
        await self.experts.know(Mixture.of({name: 1.0}))
        z_K = self.experts.snapshot.tensors.get(name)
        if z_K is None:
            raise UnknownExpert(f"unknown expert {name!r}")
        return mean_distance(self.engine.layout, z_K)

    @told
    async def check_upload(self, head: bytes, size: int) -> None:
        """Judges an upload by its header and size, before it is sent.

        Raises:
            ExpertError: it is no expert of this model.
        """
        check_header(head, size, self.engine.layout, UPLOAD)

    @told
    async def put_expert(self, name: str, data: bytes) -> int:
        """Checks an uploaded file as when loading, and saves it as the next version.

        Raises:
            ConfigError: a name that no expert can have.
            ExpertError: a file that is no expert of this model.
        """
        check_name(name)
        return await asyncio.to_thread(self.experts.change, lambda registry: self._import(registry, name, data))

    def _import(self, registry: Registry, name: str, data: bytes) -> int:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.safetensors"
            path.write_bytes(data)
            try:
                return import_expert(registry, name, path, self.factors)
            except ExpertError as error:  # the temporary file's name says nothing to the one who sent it
                raise ExpertError(str(error).replace(str(path), UPLOAD)) from None

    @told
    async def delete_expert(self, name: str) -> None:
        """Deletes an expert with all its versions; requests that run with it end as they began."""
        await asyncio.to_thread(self.experts.change, lambda registry: registry.delete(name))

    @told
    async def save_mixture(self, name: str, mixture: Mixture, meta: dict[str, Any]) -> None:
        """Keeps a mixture that a search has found."""
        await asyncio.to_thread(self.experts.change, lambda registry: registry.save_mixture(name, mixture, meta))

    # --------------------------------------------------------------------------------------------------------- health

    def check_health(self) -> None:
        """Raises where the loop has ended or is stuck, or nobody looks into the registry; Serve then replaces us."""
        stats = self.engine.stats
        if stats.idle_s > STALLED_S:
            raise GenerationError(f"the engine's loop has not turned for {stats.idle_s:.0f} s")
        self.experts.looking.check()
        self._reporting.check()
        self.engine.check()

    async def _report(self) -> None:
        stats, now = self.engine.stats, time.monotonic()
        tokens, then = self._told
        self._told = stats.tokens, now
        speed, used = (stats.tokens - tokens) / (now - then), 1 - stats.kv_free / stats.kv_total
        values = (stats.running, stats.waiting, stats.rows, stats.mixtures, used, speed)
        for gauge, value in zip(self._gauges.values(), values, strict=True):
            gauge.set(value)
        pulse = Pulse(
            running=stats.running, waiting=stats.waiting, tokens_per_s=speed, kv_used=used,
            requests=stats.finished, aborted=stats.aborted, failed=stats.failed, folds=stats.folds,
        )  # fmt: skip
        self._monitor.beat.remote(serve.get_replica_context().replica_id.unique_id, pulse)
