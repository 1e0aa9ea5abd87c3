"""The ingress: the API's `Backend` over the handles of the other deployments. It holds no model.

Not here: routes, keys and limits (`t2ray.api`). Deployed by `cluster.serve`.
"""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import ray
from fastapi import FastAPI
from ray.exceptions import RayActorError
from ray.serve.context import _get_global_client
from ray.util import metrics

from t2ray.adapt.strategies import Dispatch
from t2ray.api.app import create_api
from t2ray.api.backend import Adaptation, AdaptationRequest, Catalog, EndpointLoad
from t2ray.api.binding import check_host
from t2ray.cluster.serve.catalog import Watch
from t2ray.cluster.serve.handles import PAUSE_S, TRIES, asked, raised, translated
from t2ray.cluster.serve.scrape import own
from t2ray.config.serve import ServeConfig
from t2ray.core import (
    Completion,
    Delta,
    Message,
    Mixture,
    Prompt,
    ResourceError,
    SamplingParams,
    T2RayError,
    Token,
    user,
)
from t2ray.experts.admission import header
from t2ray.experts.heatmap import HeatMap

CUT = "the endpoint has ended before the answer did; ask again when it has started anew"

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Bounds of the histograms of times."""


class Ingress:
    """One replica of the API."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: dict[str, Any], generator: Any, dispatcher: Any, searcher: Any, monitor: Any
    ) -> None:
        self.config = ServeConfig.model_validate(config)
        check_host(_get_global_client().http_config.host, self.config.api)  # `serve deploy` comes by no other check
        self.backend = RayBackend(self.config, generator, dispatcher, searcher, monitor)
        self.api = create_api(self.config.api)
        self.api.state.backend = self.backend
        await self.backend.watch.start()

    def check_health(self) -> None:
        """Raises where the catalog is followed no longer; Serve then replaces us."""
        self.backend.watch.looking.check()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve asks for the application when the replica is made."""
        return self.api

    def close(self, cut: bool) -> int:
        """Refuses new requests from now on; returns how many are inside. With `cut`, their answers end with an error.

        Called on every replica, again and again, by whoever ends the endpoint.
        """
        self.api.state.door.closed = True
        if cut:
            self.backend.cut.set()
        return int(self.api.state.door.inside)


class RayBackend:
    """See `api.backend.Backend`."""

    def __init__(self, config: ServeConfig, generator: Any, dispatcher: Any, searcher: Any, monitor: Any) -> None:
        self._generator, self._dispatcher, self._searcher, self._monitor = generator, dispatcher, searcher, monitor
        self._metrics: dict[str, Any] = {}
        self.cut = asyncio.Event()
        self.watch = Watch(generator, config.poll_s)

    def catalog(self) -> Catalog:
        """From memory."""
        return self.watch.catalog

    async def dispatch(self, strategy: str, messages: tuple[Message, ...]) -> Dispatch:
        """Pass 1."""
        decided: Dispatch = await asked(self._dispatcher.decide, strategy, messages)
        return decided

    async def generate(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> Completion:
        """Pass 2, whole."""
        answer = asyncio.ensure_future(asked(self._generator.generate, prompt, mixture, sampling))
        end = asyncio.ensure_future(self.cut.wait())
        try:
            await asyncio.wait((answer, end), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ResourceError(CUT)
            done: Completion = answer.result()
            return done
        finally:
            answer.cancel()
            end.cancel()

    async def stream(self, prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> AsyncIterator[Delta]:
        """Pass 2, piece by piece. A replica that dies before the first piece is replaced unnoticed; later it cannot."""
        handle = self._generator.options(stream=True).stream
        for attempt in range(TRIES):
            pieces, begun = handle.remote(prompt, mixture, sampling), False
            try:
                async for delta in pieces:
                    begun = True
                    yield raised(delta)
                    if self.cut.is_set():
                        raise ResourceError(CUT)
                return
            except RayActorError as error:
                if begun or attempt == TRIES - 1:
                    raise translated(error) from error
                await asyncio.sleep(PAUSE_S * 2**attempt)
            except T2RayError:
                raise
            except Exception as error:
                raise translated(error) from error
            finally:
                pieces.cancel()

    async def read(self, prompt: Prompt, mixture: Mixture, top: int) -> tuple[Token, ...]:
        """A prompt's own tokens."""
        tokens: tuple[Token, ...] = await asked(self._generator.read, prompt, mixture, top)
        return tokens

    async def heat(self, name: str) -> HeatMap:
        """Of some replica's expert."""
        heat: HeatMap = await asked(self._generator.heat, name)
        return heat

    async def put_expert(self, name: str, data: bytes) -> int:
        """Some replica saves it, once one has judged it by its header; all others see it at their next look."""
        await asked(self._generator.check_upload, header(data), len(data))
        version: int = await asked(self._generator.put_expert, name, data)
        await self.watch.refresh()
        return version

    async def delete_expert(self, name: str) -> None:
        """From the registry."""
        await asked(self._generator.delete_expert, name)
        await self.watch.refresh()

    async def adapt(self, request: AdaptationRequest) -> Adaptation:
        """Starts a search."""
        started: Adaptation = await asked(self._searcher.adapt, request)
        return started

    async def adaptation(self, id: str) -> Adaptation:
        """Where a search stands; when it is done, its mixture can be asked for."""
        search: Adaptation = await asked(self._searcher.adaptation, id)
        if search.status == "succeeded" and search.name not in self.watch.catalog.mixtures:
            await self.watch.refresh()
        return search

    async def load(self) -> EndpointLoad:
        """As the monitor has it, with the problems of the registry."""
        load: EndpointLoad = await asked(self._monitor.load)
        return replace(load, problems=self.watch.catalog.problems)

    async def ready(self) -> None:
        """One token of the base model."""
        await self.generate(user("ready?"), Mixture.base(), SamplingParams(max_tokens=1))

    async def metrics(self) -> str:
        """What the metrics agents of all nodes have of t2ray."""
        agents = [
            f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            for node in ray.nodes()
            if node["Alive"] and node["MetricsExportPort"]
        ]
        texts = await asyncio.gather(*(asyncio.to_thread(_fetched, url) for url in agents))
        return own(texts, self.watch.catalog.base)

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Counts names that end in `_total`, keeps a histogram of any other."""
        if name not in self._metrics:
            keys = tuple(tags)
            self._metrics[name] = (
                metrics.Counter(f"t2ray_{name}", tag_keys=keys)
                if name.endswith("_total")
                else metrics.Histogram(f"t2ray_{name}", boundaries=list(SECONDS), tag_keys=keys)
            )
        metric = self._metrics[name]
        if name.endswith("_total"):
            metric.inc(value, tags=tags)
        else:
            metric.observe(value, tags=tags)


def _fetched(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())
