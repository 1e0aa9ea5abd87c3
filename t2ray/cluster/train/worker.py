"""Trains domains in a worker, with signs of life in the run folder. This module imports no Ray Train."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import ray

from t2ray.config.train import TrainConfig
from t2ray.core import ResourceError
from t2ray.runs.heartbeat import note_fault, start_heartbeat
from t2ray.store import Store
from t2ray.training.domain import CONFIG, domain_store, train_domain
from t2ray.training.metrics import ReportStep, StepMetrics


def work(job: dict[str, Any], rank: int = 0, report: ReportStep = lambda domain, row: None) -> dict[str, str]:
    """Trains the domains of a job that it names; `report` gets the steps that have a validation.

    Returns, and raises, what `train_alive` does.

    Raises:
        ResourceError: the run's folder is not seen from this node.
    """
    config = TrainConfig.model_validate(job["config"])
    run = f"{config.out}/{config.run}"
    if not Store(run).exists(CONFIG):  # a node that came after `check_shared`
        node = ray.util.get_node_ip_address()
        raise ResourceError(f"{run} is not shared: node {node} does not see it; name a folder that all nodes mount")

    def step(domain: str, metrics: StepMetrics) -> None:
        if metrics.validation is not None:
            report(domain, metrics)

    return train_alive(config, job["domains"], rank, step)


def train_alive(config: TrainConfig, domains: Sequence[str], rank: int, report: ReportStep) -> dict[str, str]:
    """Trains one domain, or several in lockstep, with signs of life; returns why each of several that failed did.

    Raises:
        T2RayError: as `train_domain`, or as `train_domains` for several.
    """
    beats = {domain: start_heartbeat(domain_store(config, domain), rank) for domain in domains}

    def step(domain: str, metrics: StepMetrics) -> None:
        beats[domain](metrics.step)
        report(domain, metrics)

    def failed(domain: str, why: str) -> None:
        note_fault(domain_store(config, domain), why, ended=True)
        del beats[domain]

    if len(domains) == 1:
        train_domain(config, domains[0], partial(step, domains[0]))
        return {}
    from t2ray.training.lockstep import train_domains  # most workers have one

    return train_domains(config, domains, step, failed)


def task_name(domains: Sequence[str]) -> str:
    """Returns the name that Ray shows of a worker's domains: `math`, or `math+3` for it and three others."""
    return domains[0] + f"+{len(domains) - 1}" * (len(domains) > 1)


def environment(config: TrainConfig) -> dict[str, Any]:
    """Returns the runtime environment of a worker, with as many threads as it has CPUs."""
    threads = str(max(1, int(config.cpus or 1)))
    return {"env_vars": {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}}
