"""Several domains on one model, in one worker: what they ask of the engine at a time is one batch, each row with its z.

Each domain has a trainer of its own, with its optimiser, checkpoints and records. They meet where they sample: one that
asks waits until every other asks, too. Rewards are graded together, gradients are taken domain by domain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from t2ray.adapters.model import Model
from t2ray.config.train import TrainConfig
from t2ray.core import Completion, Generate, Mixture, Prompt, SamplingParams, T2RayError
from t2ray.engine.offline import OfflineEngine
from t2ray.training.domain import check_checkpoints, job_model, train_on
from t2ray.training.metrics import ReportStep

ReportFailure = Callable[[str, str], None]
"""Is told which domain failed, and why."""


class Lockstep:
    """Lets callers ask an engine together: the calls of one wait for those of every other that has not left.

    Each round's calls reach the engine in the order of their callers' names, whoever asks first: a batch that is
    computed again has the same rows in the same places.
    """

    def __init__(self, generate: Generate, callers: Iterable[str]) -> None:
        self.generate, self.callers = generate, set(callers)
        self.waiting: dict[str, asyncio.Event] = {}

    def of(self, caller: str) -> Generate:
        """Returns the engine as a caller asks it."""

        async def ask(prompt: Prompt, mixture: Mixture, sampling: SamplingParams) -> Completion:
            turn = self.waiting.setdefault(caller, asyncio.Event())
            self._look()
            await turn.wait()
            return await self.generate(prompt, mixture, sampling)

        return ask

    def leave(self, caller: str) -> None:
        """Has the others wait for this caller no longer."""
        self.callers.discard(caller)
        self._look()

    def _look(self) -> None:
        asyncio.get_running_loop().call_soon(self._begin)  # after every call that is ready now

    def _begin(self) -> None:
        """Lets all calls go, if no caller is missing."""
        if self.waiting.keys() >= self.callers:
            for caller in sorted(self.waiting):
                self.waiting[caller].set()
            self.waiting = {}


def train_domains(
    config: TrainConfig, domains: Sequence[str], report: ReportStep, tell: ReportFailure
) -> dict[str, str]:
    """Trains the experts of several domains from where each of their runs stands; returns why each that failed did.

    A domain that fails leaves the others, which go on; with `fail_fast` they end at once.

    Raises:
        T2RayError: the model cannot be loaded.
        Exception: a domain failed of what is no mistake of the user's, which may pass; the others have ended before.
    """
    return asyncio.run(_train(config, domains, job_model(config), report, tell))


async def _train(
    config: TrainConfig, domains: Sequence[str], model: Model, report: ReportStep, tell: ReportFailure
) -> dict[str, str]:
    engine = OfflineEngine(model)
    together = Lockstep(engine.generate, domains)

    async def train(domain: str) -> None:
        try:
            check_checkpoints(config, domain)
            await train_on(config, domain, model, engine, together.of(domain), partial(report, domain))
        except T2RayError as error:
            tell(domain, str(error))
            raise
        finally:
            together.leave(domain)

    tasks = {domain: asyncio.ensure_future(train(domain)) for domain in domains}
    for task in tasks.values():
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, or asyncio tells of it too
    until = asyncio.FIRST_EXCEPTION if config.fail_fast else asyncio.ALL_COMPLETED
    ended, _ = await asyncio.wait(tasks.values(), return_when=until)
    failed = {domain: error for domain, task in tasks.items() if task in ended and (error := task.exception())}
    for error in failed.values():
        if not isinstance(error, T2RayError):
            raise error
    return {domain: str(error) for domain, error in failed.items()}
