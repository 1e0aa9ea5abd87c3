"""Launches a training job: it finds the job's share of the cluster, runs its domains, and publishes their experts.

Not here: how domains run on Ray (`domains`), and what a worker does (`worker`). Workers that die are started again; a
run whose driver died goes on with `--resume`: both find the newest checkpoint in the run folder.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from t2ray.adapters.factors import decompose
from t2ray.cluster.session import PRIVATE, check_lasting, check_shared, session, slots
from t2ray.cluster.train.domains import Share, Tick, run_domains, split
from t2ray.cluster.train.nodes import largest
from t2ray.cluster.train.worker import train_alive
from t2ray.config.train import TrainConfig
from t2ray.core import ResourceError, RunError, T2RayError
from t2ray.engine.batches import MAX_ROWS
from t2ray.experts.registry import Registry
from t2ray.integrity import Damaged
from t2ray.models.weights import open_weights
from t2ray.prompts import OTHERS
from t2ray.runs.folder import free_name, open_run
from t2ray.runs.fork import starts
from t2ray.runs.heartbeat import note_fault
from t2ray.runs.lease import lease
from t2ray.runs.prepare import check_run, job_tasks, prepare
from t2ray.runs.rows import check_rows
from t2ray.store import Store
from t2ray.training.domain import START, Result, damage, domain_store, expert_of, finished
from t2ray.training.metrics import note


class DomainsFailed(RunError):
    """Domains of a job failed, and each has a line; the experts of those that are done have been saved.

    `args[1]` says why each failed, by its name.
    """


def train(
    config: TrainConfig, *, resume: bool = False, tick: Tick = lambda config: None, wait_s: float = 0.0
) -> dict[str, Result]:
    """Trains every domain of a job and saves its expert; `tick` is called about twice a second for a live display.

    Args:
        wait_s: how long to wait for another driver of this run that is about to end.

    Returns:
        The result of each domain, in the job's order; its expert is in the registry under the domain's name.

    Raises:
        DomainsFailed: a line for each domain that failed; the others are done and their experts saved, or, with
            `fail_fast`, they have ended where they were.
        T2RayError: a mistake in the job or its data, a run that exists or that another driver trains, a cluster too
            small or gone.
        KeyboardInterrupt: the run's checkpoints stand and no process is left.
    """
    config = prepare(config, resume=resume)
    check_lasting([config.out, str(config.factors)])
    with ExitStack() as stack:  # the lease outlives the session
        if config.workers == 0:
            config = config.model_copy(update={"cpus": config.cpus or 1.0})
            tick = _begin(config, stack, tick, resume=resume, wait_s=wait_s)
            failed = _run_here(config, tick)
        else:
            with session() as resources:
                config, share = _share(config, resources)
                check_shared([config.out, str(config.factors)])
                tick = _begin(config, stack, tick, resume=resume, wait_s=wait_s)
                failed = run_domains(config, _unfinished(config), share, tick)
        tick(config)
        results = _collect(config)
    if failed:
        remedy = "--resume trains the domains that are not done, and no others"
        lines = [f"domain {name!r} failed: {' '.join(why.split())}; {remedy}" for name, why in failed.items()]
        raise DomainsFailed("\n".join(lines), failed)
    return results


def _run_here(config: TrainConfig, tick: Tick) -> dict[str, str]:
    """Trains the domains in this process, in turn or several at a time; returns why each that failed did."""
    failed = dict[str, str]()
    for domains in split(_unfinished(config), _together(config, workers=1)):
        try:
            failed |= train_alive(config, domains, 0, lambda domain, row: tick(config))
        except T2RayError as error:
            for domain in domains:
                failed[domain] = str(error)
                note_fault(domain_store(config, domain), failed[domain], ended=True)
        if failed and config.fail_fast:
            break
    return failed


def _begin(config: TrainConfig, stack: ExitStack, tick: Tick, *, resume: bool, wait_s: float) -> Tick:
    """Makes the model's factors, which may take long, and takes the run's lease; opens its folder, or checks it again.

    Returns `tick` that also ends a driver that has lost its lease.
    """
    assert config.factors is not None
    if config.adapter.kind == "svf":
        decompose(config.model, config.factors, targets=config.trained.targets, layers=config.trained.layers)
    held = stack.enter_context(lease(f"{config.out}/{config.run}", wait_s=wait_s))
    check_run(config, resume)  # another driver may have begun it since
    new = free_name(f"{config.out}/{config.run}")
    check_rows(config, job_tasks(config), new=new)
    for domain, z in starts(config).items() if new and config.source is not None else ():
        domain_store(config, domain).write_tensors(START, z, {})
    open_run(config)

    def watched(config: TrainConfig) -> None:
        held.check()
        tick(config)

    return watched


def _unfinished(config: TrainConfig) -> list[str]:
    """Returns the domains that are still to train.

    These are also those whose run was made longer, and those whose expert was lost before the registry had it.
    """
    stores = {domain: domain_store(config, domain) for domain in config.trains}
    results = {domain: finished(store) for domain, store in stores.items()}
    return [
        domain
        for domain, result in results.items()
        if result is None
        or result.goes_on(config.domain_rl(domain))
        or (damage(stores[domain]) and not _registered(config, domain, result))
    ]


def _share(config: TrainConfig, resources: dict[str, float]) -> tuple[TrainConfig, Share]:
    """Returns the job with its CPUs per worker decided, and the share of the cluster that its domains have."""
    least, most = config.span
    least_cpus = {"CPU": config.cpus or 1.0, "GPU": config.gpus}
    what = f"a domain of run {config.run!r}"
    together = _together(config, slots({key: n * least for key, n in least_cpus.items()}, resources, what))
    groups = len(split(config.trains, together))
    # A core is left to Ray, the driver and the verifiers: threads that share one wait for each other at every step.
    even = max(1.0, (resources.get("CPU", 0.0) - 1) // (groups * most))
    worker = {"CPU": config.cpus or min(even, max(1.0, largest("CPU"))), "GPU": config.gpus}
    need = {key: amount * least for key, amount in worker.items()}
    at_once = min(groups, slots(need, resources, what))
    for key, amount in worker.items():
        if amount > largest(key):
            raise ResourceError(
                f"a worker of run {config.run!r} needs {amount:g} {key}, the largest node has {largest(key):g}; "
                "lower cpus or gpus, or add larger nodes"
            )
    if at_once > 1:  # Ray gives a range all that is free: the first domain would leave the others nothing
        most = max(least, min(most, slots(worker, resources, "a worker") // at_once))
    share = Share(at_once=at_once, most=most, private=PRIVATE in resources, together=together)
    return config.model_copy(update={"cpus": worker["CPU"]}), share


def _together(config: TrainConfig, workers: int) -> int:
    """Returns how many domains a worker trains where there is room for so many workers.

    `auto`: with a GPU, as many as would else wait for their turn, as far as the rollouts of a step are one batch of the
    engine: what goes into another batch shares nothing. On a CPU a pass costs what its rows cost (docs/scaling.md).
    """
    if config.domains_per_worker != "auto":
        return config.domains_per_worker
    settings = [config.domain_rl(domain) for domain in config.trains]
    if not config.gpus or config.span[1] > 1 or any(rl.engine == "vllm" for rl in settings):
        return 1
    return max(1, min(-(-len(config.trains) // workers), MAX_ROWS // max(rl.prompts * rl.samples for rl in settings)))


def _collect(config: TrainConfig) -> dict[str, Result]:
    """Puts the expert of each domain that is done into the registry, once, and returns the figures.

    An expert that has not beaten its base is left out, unless the job asks for all of them; and so is, until a resume,
    a classification expert that names one that is not there: `cls` could not use it, nor the one before it any more.
    """
    assert config.experts is not None
    registry, results, digest = Registry(config.experts), {}, open_weights(config.model).digest
    for domain in sorted(config.trains, key=lambda name: config.domains[name].others is not None):
        store = domain_store(config, domain)
        result = finished(store)
        if result is None:
            continue
        metrics = {"accuracy": result.accuracy, "base_accuracy": result.base_accuracy, "best_step": result.best_step}
        names = config.labels if config.domains[domain].others is not None else ()
        lacking = [name for name in names if name not in registry.names()]
        if lacking and result.beats_base:
            note(store, f"it names {', '.join(lacking)}, and no expert of that name is in the registry: --resume "
                        f"publishes it once there is, and with domains.{domain}.publish=always at once")  # fmt: skip
        wanted = (result.beats_base and not lacking) or config.domains[domain].publish == "always"
        if wanted and not _registered(config, domain, result):
            try:
                z = expert_of(store, result)
            except Damaged as error:
                raise RunError(f"{store.uri}: {error}; --resume makes it again from the last checkpoint") from None
            registry.save(
                domain, z, base_digest=digest, domain=domain, config=_origin(config, domain), metrics=metrics,
                seed=config.seed, adapter=config.trained,
            )  # fmt: skip
        results[domain] = result
    leftovers = Store(f"{config.out}/{config.run}/ray")
    if leftovers.local is not None:
        for name in leftovers.names():
            leftovers.delete(name)
    return {domain: results[domain] for domain in config.trains if domain in results}


def _registered(config: TrainConfig, domain: str, result: Result) -> bool:
    """Whether the newest expert of that name in the registry is what this run ended with."""
    assert config.experts is not None
    registry = Registry(config.experts)
    if domain not in registry.names():
        return False
    manifest = registry.manifest(domain)
    if None in (result.expert, manifest.digest):  # of an earlier version
        return manifest.config.get("run") == config.run and manifest.metrics.get("best_step") == result.best_step
    return manifest.config.get("run") == config.run and manifest.digest == result.expert


def _origin(config: TrainConfig, domain: str) -> dict[str, Any]:
    """Returns what the registry keeps of where the expert of a domain comes from."""
    run: dict[str, Any] = {"run": config.run, "digest": config.digest, "rl": config.domain_rl(domain).model_dump()}
    if config.domains[domain].others is not None:  # what a dispatcher must know of its classification expert
        run["labels"] = [*config.labels, OTHERS]
    return run
