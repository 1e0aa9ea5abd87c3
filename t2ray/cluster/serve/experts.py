"""The experts of a `Generator`: the registry followed, the engine given what is new, the catalog of what there is.

What is known stays known while the registry cannot be listed, and the catalog says so. Not here: how a registry is
read (`t2ray.experts`), and how others get the catalog (`catalog`).
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from t2ray.api.backend import Catalog, ExpertInfo
from t2ray.cluster.serve.looking import Looking
from t2ray.config.serve import VERIFIERS, ServeConfig
from t2ray.core import ConfigError, Mixture, ResourceError
from t2ray.engine.protocol import Engine
from t2ray.experts.follow import Follower, Snapshot
from t2ray.experts.registry import Registry

T = TypeVar("T")

BEHIND_S = 5.0
"""Behind a look that takes longer, others answer from memory."""


class Experts:
    """What a replica knows of the registry, which is what its engine has.

    Args:
        join: makes one vector of an expert's vectors by target (`Adapter.join`).
    """

    def __init__(self, config: ServeConfig, engine: Engine, join: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        self.looking = Looking("the registry", config.poll_s)
        self._config, self._engine, self._join = config, engine, join
        self._given: dict[str, Tensor] = {}
        self._unlisted = ""
        self._made: tuple[tuple[Snapshot, str] | None, str, Catalog | None] = None, "", None
        self._syncing = threading.Lock()

    @property
    def snapshot(self) -> Snapshot:
        return self._follower.snapshot

    async def open(self) -> None:
        """Waits until the registry can be listed for the first time: who knows no expert must not answer."""
        assert self._config.experts is not None
        while True:
            try:
                registry = Registry(self._config.experts)
                self._follower = Follower(registry, self._engine.base_digest, self._engine.layout, self._join)
                await asyncio.to_thread(self._follower.sync)
                break
            except (ResourceError, ConfigError) as error:
                self.looking.complain(f"waiting for it: {error}")
                await asyncio.sleep(self._config.poll_s)
        self._sync()

    def follow(self) -> None:
        """Looks again and again, in the background."""
        self.looking.start(lambda: asyncio.to_thread(self._sync))

    async def know(self, mixture: Mixture) -> None:
        """An expert that is not known yet may have come to the registry since the last look.

        Raises:
            ResourceError: the registry has an expert of that name, and it cannot be used.
        """
        if any(name not in self._engine.experts for name in mixture.names):
            await asyncio.to_thread(self._sync)
        for name in mixture.names:
            if name in self.snapshot.problems:
                raise ResourceError(f"expert {name!r} cannot be used: {self.snapshot.problems[name]}")

    def change(self, how: Callable[[Registry], T]) -> T:
        """Changes the registry, and looks at it again.

        Raises:
            ResourceError: it cannot be listed; a new one in its place would hide all that is known.
        """
        self._sync()
        if self._unlisted:
            raise ResourceError(self._unlisted)
        result = how(self._follower.registry)
        self._sync()
        return result

    def catalog(self) -> tuple[str, Catalog | None]:
        """What there is now, with its digest.

        Made anew only after a change: with 1,000 experts it takes as long as a step of the engine.
        """
        self._sync()
        now = self.snapshot, self._unlisted
        if self._made[0] != now:
            catalog = self._catalog(*now)
            self._made = now, hashlib.blake2b(repr(catalog).encode(), digest_size=8).hexdigest(), catalog
        return self._made[1:]

    def _catalog(self, snapshot: Snapshot, unlisted: str) -> Catalog:
        experts = {
            name: ExpertInfo(
                name=name, version=m.version, domain=m.domain, created=m.created,
                accuracy=m.metrics.get("accuracy"), classifies=bool(m.labels), labels=m.labels,
                problem=snapshot.problems.get(name),
            )
            for name, m in snapshot.manifests.items()
        }  # fmt: skip
        for name in snapshot.problems.keys() - experts.keys():
            experts[name] = ExpertInfo(name=name, version=0, problem=snapshot.problems[name])
        classifiers = [name for name, info in experts.items() if info.classifies and info.problem is None]
        answering = any(info.answers for info in experts.values())
        strategies = ("prompt", "cls") if len(classifiers) == 1 and answering else ("prompt",) if answering else ()
        problems = dict(sorted((snapshot.problems | snapshot.odd).items()))
        return Catalog(
            base=self._config.name or self._config.model,
            default=self._config.strategy or ("cls" if "cls" in strategies else "prompt" if strategies else "base"),
            strategies=strategies,
            experts=dict(sorted(experts.items())),
            mixtures=dict(sorted(snapshot.mixtures.items())),
            verifiers=tuple(VERIFIERS),
            context=self._engine.context,
            tools=self._engine.chat.tools,
            thinks=self._engine.chat.thinks,
            problems=({".": unlisted} if unlisted else {}) | problems,
        )

    def _sync(self) -> None:
        """Looks, and gives the engine what is new; all that is known stays where the registry cannot be listed."""
        if not self._syncing.acquire(timeout=BEHIND_S):  # who finds nothing new must find it in the engine, too
            return
        try:
            try:
                self._follower.sync()
                self._unlisted = ""
            except ResourceError as error:
                self._unlisted = str(error)
            before, now = self._given, self.snapshot.tensors
            if now is not before:
                changed = {name: z_K for name, z_K in now.items() if before.get(name) is not z_K}
                self._engine.set_experts(changed, before.keys() - now.keys())
                self._given = now
        finally:
            self._syncing.release()
