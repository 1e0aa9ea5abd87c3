"""Runs the domains of a job on Ray, as many at once as fit, each by itself or several in a worker.

A domain whose workers die is started again from its newest checkpoint, and with it those that it shared them with.

On a cluster, and wherever it has several workers or GPUs, a domain is a job of Ray Train (`group`). On a private Ray
one worker without a GPU is a plain task, which starts in a third of the time. Why: docs/decisions/0014-startup.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from t2ray.cluster.session import cancel
from t2ray.cluster.train.faults import diagnosis
from t2ray.cluster.train.group import Groups, WorkersDied
from t2ray.cluster.train.nodes import head_answers
from t2ray.cluster.train.worker import environment, task_name, work
from t2ray.config.train import TrainConfig
from t2ray.core import ResourceError, T2RayError
from t2ray.runs.heartbeat import heartbeats, note_fault
from t2ray.training.checkpoint import steps
from t2ray.training.domain import damage, domain_store, finished

Tick = Callable[[TrainConfig], None]
_STARTS = 4
_TOGETHER = 2  # starts without another checkpoint until domains of one worker are parted: one may kill it for all
_POLL_S = 0.5
_GONE_S = 20.0  # after 60 s Ray ends this process


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The share of a cluster that domains have: `at_once` run at a time, each with at most `most` workers.

    With `together` above 1, so many domains at most have one worker, and count as one. `private`: the cluster is this
    machine alone, and nobody looks at its dashboard.
    """

    at_once: int
    most: int
    private: bool
    together: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """A start of domains in one worker, or of one: its number since their newest checkpoints, by domain.

    `earlier` says when the heartbeats before it began.
    """

    domains: tuple[str, ...]
    number: int
    checkpoints: dict[str, int]
    earlier: frozenset[float]


def run_domains(config: TrainConfig, domains: Sequence[str], share: Share, tick: Tick) -> dict[str, str]:
    """Trains the domains; returns why each that failed did.

    If a domain fails and cannot be retried, the others go on; with `fail_fast` they end at once.

    Raises:
        ResourceError: the cluster's head no longer answers; all domains have ended.
    """
    waiting, failed = [*reversed(split(domains, share.together))], dict[str, str]()
    running = dict[ray.ObjectRef, _Start]()
    heard = time.monotonic()
    with _launcher(config, share) as launch:
        while (waiting or running) and not (failed and config.fail_fast):
            while waiting and len(running) < share.at_once:
                first = _next_start(config, waiting.pop())
                running[launch(first.domains)] = first
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
                why, again = _after(config, task, running.pop(task))
                failed |= why
                if again is not None and len(again.domains) > 1 and again.number > _TOGETHER:
                    waiting += [(domain,) for domain in reversed(again.domains)]
                elif again is not None:
                    running[launch(again.domains)] = again
    return failed


def split(domains: Sequence[str], together: int) -> list[tuple[str, ...]]:
    """Returns the domains in groups of at most `together`, about evenly and in their order."""
    groups = -(-len(domains) // together)
    ends = [len(domains) * i // max(groups, 1) for i in range(groups + 1)]
    return [tuple(domains[start:end]) for start, end in pairwise(ends)]


def _next_start(config: TrainConfig, domains: Sequence[str], last: _Start | None = None) -> _Start:
    """Returns the next start of domains, counted from their newest checkpoints: over days, many nodes may go."""
    stores = {domain: domain_store(config, domain) for domain in domains}
    newest = {domain: max(steps(store), default=0) for domain, store in stores.items()}
    number = last.number + 1 if last is not None and newest.items() <= last.checkpoints.items() else 1
    earlier = frozenset(beat.began for store in stores.values() for beat in heartbeats(store))
    return _Start(domains=tuple(domains), number=number, checkpoints=newest, earlier=earlier)


@contextmanager
def _launcher(config: TrainConfig, share: Share) -> Iterator[Callable[[Sequence[str]], ray.ObjectRef]]:
    """Yields a function that starts a domain, or several in a worker, and returns a task.

    At the end of the block everything it started ends.
    Ray itself retries nothing: it would not note why the worker before died.
    """
    job = {"config": config.model_dump(mode="json")}
    if share.private and share.most == 1 and not config.gpus:
        started: list[ray.ObjectRef] = []

        def launch(domains: Sequence[str]) -> ray.ObjectRef:
            one = ray.remote(work).options(
                name=task_name(domains), max_retries=0, num_cpus=config.cpus, runtime_env=environment(config),
                scheduling_strategy="DEFAULT",  # else, in a sweep, among the resources of the trial's own process
            )  # fmt: skip
            started.append(one.remote(job | {"domains": domains}))
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
        yield lambda domains: groups.fit.remote(job | {"domains": domains, "name": task_name(domains)}, share.most)
    finally:
        if head_answers():  # which `kill` would wait for; without it all ends with this process
            ray.kill(groups)


def _after(config: TrainConfig, task: ray.ObjectRef, last: _Start) -> tuple[dict[str, str], _Start | None]:
    """Returns why domains failed; and the next start of those whose workers died, unless that was too often.

    A failure that is a mistake of the user's has no next start. What failed is noted in the run folder.
    """
    try:
        return ray.get(task), None
    except RayError as error:
        causes = _causes(error)
    stores = {domain: domain_store(config, domain) for domain in last.domains}
    left = {
        domain: store for domain, store in stores.items()
        if (result := finished(store)) is None or damage(store) or result.goes_on(config.domain_rl(domain))
    }  # fmt: skip
    mistake = next((cause for cause in causes.values() if isinstance(cause, T2RayError)), None)
    # a worker that died before its first heartbeat has left its predecessor's last one
    seen = tuple(beat for store in left.values() for beat in heartbeats(store) if beat.began not in last.earlier)
    why = str(mistake) if mistake is not None else diagnosis(last.domains, causes, seen)
    again = _next_start(config, tuple(left), last)
    given_up = mistake is not None or again.number > _STARTS  # of a mistake, trying again would not help
    if mistake is None and given_up:
        why += f"; started {_STARTS} times, it came to no new checkpoint"
    for store in left.values():
        note_fault(store, why, ended=given_up)
    return (dict.fromkeys(left, why), None) if given_up else ({}, again if left else None)


def _causes(failure: RayError) -> Mapping[int, BaseException]:
    """Returns what failed, by rank."""
    cause = failure.cause if isinstance(failure, RayTaskError) else failure
    if isinstance(cause, WorkersDied):
        return cause.causes
    return {0: cause if isinstance(cause, T2RayError) else failure}
