"""A `Generator` replica: one model, one continuous engine, every expert of the registry. Deployed by `cluster.serve`.

Not here: which mixture a request gets (`dispatcher`), and HTTP (`ingress`).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ray import serve
from ray.util import metrics

from t2ray.adapters.factors import Factors
from t2ray.adapters.model import load_model
from t2ray.api.backend import Catalog, ExpertInfo
from t2ray.cluster.serve.monitor import Pulse
from t2ray.config.serve import VERIFIERS, ServeConfig
from t2ray.core import (
    Completion,
    Delta,
    ExpertError,
    GenerationError,
    Mixture,
    Prompt,
    SamplingParams,
    Token,
    UnknownExpert,
    check_name,
)
from t2ray.engine.online import OnlineEngine
from t2ray.engine.protocol import Engine
from t2ray.experts.exchange import import_expert
from t2ray.experts.follow import Follower, Snapshot
from t2ray.experts.heatmap import HeatMap, mean_distance
from t2ray.experts.registry import Registry

PRIMITIVES = "64"
"""oneDNN keeps code for each number of tokens that a matrix was multiplied with: 300 MB by its default of 1024."""

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
        model = load_model(self.config.model, self.config.factors)
        self.engine: Engine = OnlineEngine(model, self.config.engine)
        registry = Registry(self.config.experts)
        self.follower = Follower(registry, self.engine.base_digest, self.engine.layout, model.adapter.join)
        self._syncing = threading.Lock()
        self._made: tuple[Snapshot | None, str, Any] = None, "", None
        self._sync()
        self.engine.start()
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
        self._monitor = monitor
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._report())]

    # --------------------------------------------------------------------------------------------------------- passes

    async def generate(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> Completion:
        """See `core.Generate`."""
        await self._known(mixture)
        return await self.engine.generate(prompt, mixture, sampling)

    async def generate_many(
        self, requests: Sequence[tuple[Prompt, Mixture]], sampling: SamplingParams
    ) -> list[Completion]:
        """The answers of a few-shot search's members."""
        return list(await asyncio.gather(*(self.generate(p, mixture, sampling) for p, mixture in requests)))

    async def stream(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> AsyncIterator[Delta]:
        """The answer as it grows."""
        await self._known(mixture)
        async for delta in self.engine.stream(prompt, mixture, sampling):
            yield delta

    async def read(self, prompt: Prompt, mixture: Mixture, top: int) -> tuple[Token, ...]:
        """See `Engine.read`."""
        await self._known(mixture)
        return await self.engine.read(prompt, mixture, top)

    async def score(self, prompt: Prompt, labels: tuple[str, ...], mixture: Mixture) -> tuple[float, ...]:
        """See `core.Score`."""
        return await self.engine.score(prompt, labels, mixture)

    async def score_many(self, requests: Sequence[tuple[Prompt, tuple[str, ...], Mixture]]) -> Any:
        """The scores of a few-shot search's members."""
        return list(await asyncio.gather(*(self.score(*request) for request in requests)))

    async def _known(self, mixture: Mixture) -> None:
        """An expert that is not known yet may have come to the registry since the last look.

        Raises:
            ExpertError: the registry has an expert of that name, and it cannot be used.
        """
        if any(name not in self.engine.experts for name in mixture.names):
            await asyncio.to_thread(self._sync)
        for name in mixture.names:
            if name in self.follower.snapshot.problems:
                raise ExpertError(self.follower.snapshot.problems[name])

    # -------------------------------------------------------------------------------------------------------- experts

    async def catalog(self, seen: str) -> tuple[str, Catalog | None]:
        """What there is now, whichever replica is asked, with its digest; None for a caller who has seen it."""
        digest, catalog = await asyncio.to_thread(self._catalog_now)
        return digest, None if digest == seen else catalog

    def _catalog_now(self) -> tuple[str, Catalog]:
        """Made anew only after a change: with 1,000 experts it takes as long as a step of the engine."""
        self._sync()
        snapshot = self.follower.snapshot
        if self._made[0] is not snapshot:
            catalog = self._catalog(snapshot)
            self._made = snapshot, hashlib.blake2b(repr(catalog).encode(), digest_size=8).hexdigest(), catalog
        return self._made[1:]

    def _catalog(self, snapshot: Snapshot) -> Catalog:
        experts = {
            name: ExpertInfo(
                name=name, version=m.version, domain=m.domain, created=m.created,
                accuracy=m.metrics.get("accuracy"), classifies=bool(m.labels), labels=m.labels,
            )
            for name, m in sorted(snapshot.manifests.items())
        }  # fmt: skip
        experts |= {name: ExpertInfo(name=name, version=0, problem=text) for name, text in snapshot.problems.items()}
        classifiers = [name for name, info in experts.items() if info.classifies]
        answering = [name for name, info in experts.items() if not info.classifies and info.problem is None]
        strategies = ("prompt", "cls") if len(classifiers) == 1 and answering else ("prompt",) if answering else ()
        return Catalog(
            base=self.config.name or self.config.model,
            default=self.config.strategy or ("cls" if "cls" in strategies else "prompt" if strategies else "base"),
            strategies=strategies,
            experts=experts,
            mixtures=dict(sorted(snapshot.mixtures.items())),
            verifiers=tuple(VERIFIERS),
            context=self.engine.context,
        )

    async def heat(self, name: str) -> HeatMap:
        """The mean of |z - 1| of an expert, per decoder layer and kind of matrix.

        Raises:
            UnknownExpert: no such expert here.
        """
        z_K = self.follower.snapshot.tensors.get(name)
        if z_K is None:
            raise UnknownExpert(f"unknown expert {name!r}")
        return mean_distance(self.engine.layout, z_K)

    async def put_expert(self, name: str, data: bytes) -> int:
        """Checks an uploaded file as when loading, and saves it as the next version.

        Raises:
            ConfigError: a name that no expert can have.
            ExpertError: a file that is no expert of this model.
        """
        check_name(name)
        return await asyncio.to_thread(self._import, name, data)

    def _import(self, name: str, data: bytes) -> int:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.safetensors"
            path.write_bytes(data)
            try:
                version = import_expert(self.follower.registry, name, path, self.factors)
            except ExpertError as error:  # the temporary file's name says nothing to the one who sent it
                raise ExpertError(str(error).replace(str(path), "the upload")) from None
        self._sync()
        return version

    async def delete_expert(self, name: str) -> None:
        """Deletes an expert with all its versions; requests that run with it end as they began."""
        await asyncio.to_thread(self.follower.registry.delete, name)
        await asyncio.to_thread(self._sync)

    async def save_mixture(self, name: str, mixture: Mixture, meta: dict[str, Any]) -> None:
        """Keeps a mixture that a search has found."""
        await asyncio.to_thread(self.follower.registry.save_mixture, name, mixture, meta)
        await asyncio.to_thread(self._sync)

    def _sync(self) -> None:
        with self._syncing:  # who finds nothing new must find it in the engine, too
            before = self.follower.snapshot.tensors
            if self.follower.sync():
                now = self.follower.snapshot.tensors
                changed = {name: z_K for name, z_K in now.items() if before.get(name) is not z_K}
                self.engine.set_experts(changed, before.keys() - now.keys())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self.config.poll_s)
            await asyncio.to_thread(self._sync)

    # --------------------------------------------------------------------------------------------------------- health

    def check_health(self) -> None:
        """Raises where the loop has ended or is stuck, or the registry's follower died; Serve then replaces us."""
        stats = self.engine.stats
        if stats.idle_s > STALLED_S:
            raise GenerationError(f"the engine's loop has not turned for {stats.idle_s:.0f} s")
        for task in self._tasks:
            if task.done():
                raise GenerationError(f"a background task ended: {task.exception()!r}")
        self.engine.check()

    async def _report(self) -> None:
        replica = serve.get_replica_context().replica_id.unique_id
        before, then = 0, time.monotonic()
        while True:
            await asyncio.sleep(1.0)
            stats, now = self.engine.stats, time.monotonic()
            speed, before, then = (stats.tokens - before) / (now - then), stats.tokens, now
            used = 1 - stats.kv_free / stats.kv_total
            values = (stats.running, stats.waiting, stats.rows, stats.mixtures, used, speed)
            for gauge, value in zip(self._gauges.values(), values, strict=True):
                gauge.set(value)
            pulse = Pulse(
                running=stats.running, waiting=stats.waiting, tokens_per_s=speed, kv_used=used,
                requests=stats.finished, aborted=stats.aborted, failed=stats.failed, folds=stats.folds,
            )  # fmt: skip
            self._monitor.beat.remote(replica, pulse)
