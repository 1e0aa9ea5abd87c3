"""A job's domains on Ray, as many at once as it fits; one whose workers die is started again from its last checkpoint.

A domain with one worker is a plain task, one process, where a job of Ray Train starts six; one with several is a job of
Ray Train (`cluster.group`). Why: docs/decisions/0014-startup.md. Called by `cluster.train`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from t2ray.cluster.train.faults import diagnosis
from t2ray.cluster.train.nodes import head_answers
from t2ray.config.train import TrainConfig
from t2ray.core import ResourceError, T2RayError
from t2ray.runs.folder import CONFIG
from t2ray.runs.heartbeat import heartbeats, note_fault, start_heartbeat
from t2ray.store import Store
from t2ray.training.checkpoint import FOLDER as CHECKPOINTS
from t2ray.training.domain import domain_store, train_domain
from t2ray.training.metrics import StepMetrics
from t2ray.training.trainer import ReportMetrics

Tick = Callable[[TrainConfig], None]
_STARTS = 4
_POLL_S = 0.5
_GOES_ON = "the run goes on with --resume"
_GONE_S = 20.0  # after 60 s Ray ends this process


class WorkersDied(Exception):
    """The exception of each rank of a group that failed."""

    def __init__(self, causes: Mapping[int, BaseException]) -> None:
        super().__init__(causes)
        self.causes = causes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Try:
    """A start of a domain: its number since the newest checkpoint that there was, and when earlier heartbeats began."""

    domain: str
    number: int
    checkpoint: list[str]
    earlier: frozenset[float]


def run_domains(config: TrainConfig, domains: Sequence[str], at_once: int, most: int, tick: Tick) -> None:
    """Trains the domains with at most `most` workers each; whatever ends one that is not tried again ends them all.

    Raises:
        T2RayError: a mistake of the user's in any worker, at once; workers that died too often; no head any more.
    """
    waiting, running = list(reversed(domains)), dict[ray.ObjectRef, _Try]()
    heard = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                domain = waiting.pop()
                first = _try(config, domain)
                running[_start(config, domain, most)] = first
            ended, _ = ray.wait(list(running), timeout=_POLL_S)
            tick(config)
            if not head_answers():  # whatever Ray is asked now waits for it
                if time.monotonic() - heard > _GONE_S:
                    raise ResourceError(f"no answer from the cluster's head for {_GONE_S:.0f} s; {_GOES_ON}")
                time.sleep(_POLL_S)
                continue
            heard = time.monotonic()
            for task in ended:
                again = _after(config, task, running.pop(task))
                if again is not None:
                    running[_start(config, again.domain, most)] = again
    finally:
        for task in running:
            ray.cancel(task, force=True)


def _try(config: TrainConfig, domain: str, last: _Try | None = None) -> _Try:
    """The domain's next start. Over days, many nodes may go: one that got to another checkpoint has a new count."""
    store = domain_store(config, domain)
    newest = store.names(CHECKPOINTS)[-1:]
    number = last.number + 1 if last is not None and newest == last.checkpoint else 1
    earlier = frozenset(beat.began for beat in heartbeats(store))
    return _Try(domain=domain, number=number, checkpoint=newest, earlier=earlier)


def _start(config: TrainConfig, domain: str, most: int) -> ray.ObjectRef:
    job = {"config": config.model_dump(mode="json"), "domain": domain}
    # Ray's own retries would note nothing about why the worker before died.
    if most == 1:
        one = ray.remote(work).options(
            name=domain, max_retries=0, num_cpus=config.cpus, num_gpus=config.gpus, runtime_env=environment(config),
            scheduling_strategy="DEFAULT",  # else, in a sweep, among the resources of the trial's own process
        )  # fmt: skip
        return one.remote(job)
    # Beside the driver, as Ray Train's controllers are beside it: the run outlives every other node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    group = ray.remote(_group).options(name=f"{domain}'s group", max_retries=0, num_cpus=0, scheduling_strategy=here)
    return group.remote(job, most)


def environment(config: TrainConfig) -> dict[str, Any]:
    """The runtime environment of a worker."""
    threads = str(max(1, int(config.cpus or 1)))
    return {"env_vars": {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}}


def _group(job: dict[str, Any], most: int) -> None:
    from t2ray.cluster.train.group import fit  # imports Ray Train, which the other processes do without

    fit(job, most)


def _after(config: TrainConfig, task: ray.ObjectRef, last: _Try) -> _Try | None:
    """The next start of a domain whose workers died; None for one that is done."""
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
        what, again = diagnosis(last.domain, causes, seen), _try(config, last.domain, last)
        if again.number > _STARTS:
            what += f"; started {_STARTS} times, it came to no new checkpoint; {_GOES_ON}"
            note_fault(store, what, ended=True)
            raise ResourceError(what) from failure
        note_fault(store, what, ended=False)
        return again
    return None


def _causes(failure: RayError) -> Mapping[int, BaseException]:
    """What failed, by rank."""
    cause = failure.cause if isinstance(failure, RayTaskError) else failure
    if isinstance(cause, WorkersDied):
        return cause.causes
    return {0: cause if isinstance(cause, T2RayError) else failure}


def work(job: dict[str, Any], rank: int = 0, report: ReportMetrics = lambda row: None) -> None:
    """Trains the job's domain, in each of its workers; `report` gets the rows that have a validation.

    Raises:
        ResourceError: the run's folder is not seen from this node.
        T2RayError: as `train_domain`.
    """
    config = TrainConfig.model_validate(job["config"])
    run = f"{config.out}/{config.run}"
    if not Store(run).exists(CONFIG):  # a node that came after `check_shared`
        node = ray.util.get_node_ip_address()
        raise ResourceError(f"{run} is not shared: node {node} does not see it; name a folder that all nodes mount")

    beat = start_heartbeat(domain_store(config, job["domain"]), rank)

    def step(row: StepMetrics) -> None:
        beat(row.step)
        if row.validation is not None:
            report(row)

    train_domain(config, job["domain"], step)
