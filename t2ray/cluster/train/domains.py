"""Runs the domains of a job on Ray, as many at once as fit.

A domain whose workers die is started again from its newest checkpoint.

On a cluster, and wherever it has several workers or GPUs, a domain is a job of Ray Train (`group`). On a private Ray
one worker without a GPU is a plain task, which starts in a third of the time. Why: docs/decisions/0014-startup.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from t2ray.cluster.session import cancel
from t2ray.cluster.train.faults import diagnosis
from t2ray.cluster.train.group import Groups, WorkersDied
from t2ray.cluster.train.nodes import head_answers
from t2ray.cluster.train.worker import environment, work
from t2ray.config.train import TrainConfig
from t2ray.core import ResourceError, T2RayError
from t2ray.runs.heartbeat import heartbeats, note_fault
from t2ray.training.checkpoint import steps
from t2ray.training.domain import domain_store

Tick = Callable[[TrainConfig], None]
_STARTS = 4
_POLL_S = 0.5
_GONE_S = 20.0  # after 60 s Ray ends this process


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The share of a cluster that domains have: `at_once` run at a time, each with at most `most` workers.

    `private`: the cluster is this machine alone, and nobody looks at its dashboard.
    """

    at_once: int
    most: int
    private: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """A start of a domain: its number since the newest checkpoint that there was, and when earlier heartbeats began."""

    domain: str
    number: int
    checkpoint: int
    earlier: frozenset[float]


def run_domains(config: TrainConfig, domains: Sequence[str], share: Share, tick: Tick) -> dict[str, str]:
    """Trains the domains; returns why each that failed did.

    If a domain fails and cannot be retried, the others go on; with `fail_fast` they end at once.

    Raises:
        ResourceError: the cluster's head no longer answers; all domains have ended.
    """
    waiting, failed = list(reversed(domains)), dict[str, str]()
    running = dict[ray.ObjectRef, _Start]()
    heard = time.monotonic()
    with _launcher(config, share) as launch:
        while (waiting or running) and not (failed and config.fail_fast):
            while waiting and len(running) < share.at_once:
                first = _next_start(config, waiting.pop())
                running[launch(first.domain)] = first
            ended, _ = ray.wait(list(running), timeout=_POLL_S)
            tick(config)
            if not head_answers():  # whatever Ray is asked now waits for it
                if time.monotonic() - heard > _GONE_S:
                    raise ResourceError(
                        f"no answer from the cluster's head for {_GONE_S:.0f} s; the run goes on with --resume"
                    )
                time.sleep(_POLL_S)
                continue
            heard = time.monotonic()
            for task in ended:
                last = running.pop(task)
                try:
                    again = _after(config, task, last)
                except T2RayError as error:
                    failed[last.domain] = str(error)
                    continue
                if again is not None:
                    running[launch(again.domain)] = again
    return failed


def _next_start(config: TrainConfig, domain: str, last: _Start | None = None) -> _Start:
    """Returns the next start of a domain, counted from its newest checkpoint: over days, many nodes may go."""
    store = domain_store(config, domain)
    newest = max(steps(store), default=0)
    number = last.number + 1 if last is not None and newest == last.checkpoint else 1
    earlier = frozenset(beat.began for beat in heartbeats(store))
    return _Start(domain=domain, number=number, checkpoint=newest, earlier=earlier)


@contextmanager
def _launcher(config: TrainConfig, share: Share) -> Iterator[Callable[[str], ray.ObjectRef]]:
    """Yields a function that starts a domain and returns a task; at the end of the block everything it started ends.

    Ray itself retries nothing: it would not note why the worker before died.
    """
    job = {"config": config.model_dump(mode="json")}
    if share.private and share.most == 1 and not config.gpus:
        started: list[ray.ObjectRef] = []

        def launch(domain: str) -> ray.ObjectRef:
            one = ray.remote(work).options(
                name=domain, max_retries=0, num_cpus=config.cpus, runtime_env=environment(config),
                scheduling_strategy="DEFAULT",  # else, in a sweep, among the resources of the trial's own process
            )  # fmt: skip
            started.append(one.remote(job | {"domain": domain}))
            return started[-1]

        try:
            yield launch
        finally:
            cancel(started)
        return
    # Beside the driver, as Ray Train's controllers are beside it: the run outlives every other node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    groups = (
        ray.remote(Groups)
        .options(num_cpus=0, max_concurrency=share.at_once, max_restarts=-1, scheduling_strategy=here)
        .remote()
    )
    try:
        yield lambda domain: groups.fit.remote(job | {"domain": domain}, share.most)
    finally:
        if head_answers():  # which `kill` would wait for; without it all ends with this process
            ray.kill(groups)


def _after(config: TrainConfig, task: ray.ObjectRef, last: _Start) -> _Start | None:
    """Returns the next start of a domain whose workers died; None for one that is done.

    Raises:
        T2RayError: a mistake of the user's; or workers that died too often. It is noted in the run folder.
    """
    store = domain_store(config, last.domain)
    try:
        ray.get(task)
    except RayError as failure:
        causes = _causes(failure)
        mistake = next((cause for cause in causes.values() if isinstance(cause, T2RayError)), None)
        if mistake is not None:  # trying again would not help
            note_fault(store, str(mistake), ended=True)
            raise mistake from None
        # a worker that died before its first heartbeat has left its predecessor's last one
        seen = tuple(beat for beat in heartbeats(store) if beat.began not in last.earlier)
        what, again = diagnosis(last.domain, causes, seen), _next_start(config, last.domain, last)
        if again.number > _STARTS:
            what += f"; started {_STARTS} times, it came to no new checkpoint"
            note_fault(store, what, ended=True)
            raise ResourceError(what) from failure
        note_fault(store, what, ended=False)
        return again
    return None


def _causes(failure: RayError) -> Mapping[int, BaseException]:
    """Returns what failed, by rank."""
    cause = failure.cause if isinstance(failure, RayTaskError) else failure
    if isinstance(cause, WorkersDied):
        return cause.causes
    return {0: cause if isinstance(cause, T2RayError) else failure}
