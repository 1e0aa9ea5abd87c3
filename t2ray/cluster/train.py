"""Training on a cluster: a Ray Train job a domain, as many at once as the cluster fits; experts go to the registry.

Not here: what a worker does (`rl.job`). Called by `t2ray train`, `jobs/train.py` and the demo. Ray restarts a worker
that dies; a run whose driver died goes on with `--resume`: both find the newest checkpoint in the run folder.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import ray
from ray import train as ray_train
from ray._private.state import state
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from t2ray.cluster.faults import FaultLog, diagnosis
from t2ray.cluster.session import check_lasting, check_shared, session, slots
from t2ray.config import TrainConfig
from t2ray.core import ResourceError, T2RayError
from t2ray.experts import Registry
from t2ray.prompts import OTHERS
from t2ray.rl.checkpoint import FOLDER as CHECKPOINTS
from t2ray.rl.job import EXPERT, Result, domain_store, finished, train_domain
from t2ray.rl.run import CONFIG, open_run, prepare
from t2ray.rl.status import beats, heart, note_fault
from t2ray.store import Store
from t2ray.svd import decompose
from t2ray.weights import Weights, resolve

Tick = Callable[[TrainConfig], None]
_RESTARTS = 3
_POLL_S = 0.5


def train(config: TrainConfig, *, resume: bool = False, tick: Tick = lambda config: None) -> dict[str, Result]:
    """Trains every domain of a job and saves its expert; `tick` is called about twice a second for a live display.

    Returns:
        The result of each domain, in the job's order; its expert is in the registry under the domain's name.

    Raises:
        T2RayError: a mistake in the job or its data, a run that exists, a cluster too small; nothing is half-written.
        KeyboardInterrupt: the run's checkpoints stand and no process is left.
    """
    config = prepare(config, resume=resume)
    check_lasting([config.out, str(config.factors)])
    if config.workers == 0:
        config = config.model_copy(update={"cpus": config.cpus or 1.0})
        _start(config)
        for domain in _unfinished(config):
            _train_here(config, domain, tick)
    else:
        with session() as resources:
            config, at_once, most = _fit(config, resources)
            check_shared([config.out, str(config.factors)])
            _start(config)
            _on_ray(config, _unfinished(config), (at_once, most), tick)
    tick(config)
    return _collect(config)


def _train_here(config: TrainConfig, domain: str, tick: Tick) -> None:
    """One domain in this process."""
    store = domain_store(config, domain)
    beat = heart(store, 0)

    def report(row: dict[str, Any]) -> None:
        beat(row["step"])
        tick(config)

    try:
        train_domain(config, domain, report)
    except T2RayError as error:
        note_fault(store, str(error), ended=True)
        raise


def _start(config: TrainConfig) -> None:
    """What a job that fits begins with: its model's factors, which may take long, and its run folder."""
    assert config.factors is not None
    decompose(config.model, config.factors, targets=config.targets, layers=config.layers)
    open_run(config)


def _unfinished(config: TrainConfig) -> list[str]:
    return [domain for domain in config.domains if finished(domain_store(config, domain)) is None]


def _fit(config: TrainConfig, resources: dict[str, float]) -> tuple[TrainConfig, int, int]:
    """The job with its CPUs a worker decided, how many domains run at once, and with how many workers at most."""
    least, most = config.span
    # A core is left to Ray, the driver and the verifiers: threads that share one wait for each other at every step.
    share = max(1.0, (resources.get("CPU", 0.0) - 1) // (len(config.domains) * most))
    largest = {key: _largest(key) for key in ("CPU", "GPU")}
    worker = {"CPU": config.cpus or min(share, max(1.0, largest["CPU"])), "GPU": config.gpus}
    need = {key: amount * least for key, amount in worker.items()}
    at_once = min(len(config.domains), slots(need, resources, f"a domain of run {config.run!r}"))
    for key, amount in worker.items():
        if amount > largest[key]:
            raise ResourceError(
                f"a worker of run {config.run!r} needs {amount:g} {key}, the largest node has {largest[key]:g}; "
                "lower cpus or gpus, or add larger nodes"
            )
    if at_once > 1:  # Ray gives a range all that is free: the first domain would leave the others nothing
        most = max(least, min(most, slots(worker, resources, "a worker") // at_once))
    return config.model_copy(update={"cpus": worker["CPU"]}), at_once, most


def _largest(key: str) -> float:
    """The most that one node has of a resource, or will have where nodes come on demand."""
    groups = getattr(state.get_cluster_config(), "node_group_configs", ())
    nodes = [*(node["Resources"] for node in ray.nodes() if node["Alive"]), *(group.resources for group in groups)]
    return max(float(dict(resources).get(key, 0.0)) for resources in nodes)


def _on_ray(config: TrainConfig, domains: Sequence[str], most: tuple[int, int], tick: Tick) -> None:
    """Runs the domains, and raises what the first that fails raises; whatever ends it ends them all."""
    # Beside the driver, as Ray Train's controllers are beside it: the run outlives every other node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    launcher = ray.remote(num_cpus=0)(_Launcher).options(scheduling_strategy=here).remote()
    running = launcher.run.remote(config, domains, *most)
    try:
        while not ray.wait([running], timeout=_POLL_S)[0]:
            tick(config)
        error = ray.get(running)
    except RayActorError as dead:
        raise ResourceError(f"the training's launcher died ({dead}); the run goes on with --resume") from dead
    finally:
        ray.kill(launcher)
    if error is not None:
        raise error


class _Launcher:
    """Waits for the Ray Train jobs, in a process of its own, which can be killed and takes them with it.

    Threads that wait in the driver would touch Ray after an interrupt has shut it down, and Ray then ends the driver.
    """

    def run(self, config: TrainConfig, domains: Sequence[str], at_once: int, most: int) -> T2RayError | None:
        """Trains the domains, `at_once` at a time with at most so many workers each; the error of the first to fail."""
        pool = ThreadPoolExecutor(at_once)
        ended = as_completed([pool.submit(_fit_domain, config, domain, most) for domain in domains])
        return next((error for error in (future.result() for future in ended) if error is not None), None)


def _fit_domain(config: TrainConfig, domain: str, most: int) -> T2RayError | None:
    """One domain's training to its end; the error that it ended with.

    Over days, more nodes may go than Ray restarts workers for: a job that got to another checkpoint has a new count.
    """
    store = domain_store(config, domain)
    while True:
        before = store.names(CHECKPOINTS)[-1:]
        try:
            error: T2RayError | None = _trainer(config, domain, most).fit().return_value
        except TrainingFailedError as failure:
            if store.names(CHECKPOINTS)[-1:] != before:
                continue
            error = ResourceError(_diagnosis(config, domain, failure))
        if error is not None:
            note_fault(store, str(error), ended=True)
        return error


def _trainer(config: TrainConfig, domain: str, most: int) -> TorchTrainer:
    """One domain's Ray Train job."""
    threads, least = str(max(1, int(config.cpus or 1))), config.span[0]
    return TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(mode="json"), "domain": domain},
        # Sums of z's gradient (under 1 M numbers) and of scalars on the CPU: nccl refuses the latter.
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=(least, most) if least < most else most,
            use_gpu=config.gpus > 0,
            resources_per_worker={"CPU": config.cpus} | ({"GPU": config.gpus} if config.gpus else {}),
        ),
        run_config=RunConfig(
            # Ray resumes a name silently: a new one each time leaves the resuming to the run folder's checkpoints.
            name=f"{domain}-{uuid.uuid4().hex[:8]}",
            storage_path=f"{config.out}/{config.run}/ray",
            failure_config=FailureConfig(max_failures=_RESTARTS, controller_failure_limit=_RESTARTS),
            callbacks=[FaultLog(domain, domain_store(config, domain).uri)],
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}},
        ),
    )


def _worker(job: dict[str, Any]) -> T2RayError | None:
    """Runs in each Ray Train worker. A mistake of the user's is returned: raised, it would be retried.

    Only the first worker's result counts, and it may wait for the others: theirs are raised.
    """
    config = TrainConfig.model_validate(job["config"])
    run = f"{config.out}/{config.run}"
    if not Store(run).exists(CONFIG):  # a node that came after `check_shared`
        node = ray.util.get_node_ip_address()
        return ResourceError(f"{run} is not shared: node {node} does not see it; name a folder that all nodes mount")

    rank = ray_train.get_context().get_world_rank()
    beat = heart(domain_store(config, job["domain"]), rank)

    def report(row: dict[str, Any]) -> None:
        beat(row["step"])
        if "validation" in row:
            ray_train.report(row)

    try:
        train_domain(config, job["domain"], report)
    except T2RayError as error:
        if rank > 0:
            raise
        return error
    return None


def _diagnosis(config: TrainConfig, domain: str, error: TrainingFailedError) -> str:
    causes = error.worker_failures if isinstance(error, WorkerGroupError) else {0: error}
    what = diagnosis(domain, causes, beats(domain_store(config, domain)))
    return f"{what}; it was started {_RESTARTS + 1} times and came to no new checkpoint; the run goes on with --resume"


def _collect(config: TrainConfig) -> dict[str, Result]:
    """Puts each domain's expert into the registry, once, and returns the figures."""
    assert config.experts is not None
    registry, results, digest = Registry(config.experts), {}, Weights(resolve(config.model)).digest
    for domain in config.domains:
        store = domain_store(config, domain)
        result = finished(store)
        assert result is not None, domain
        metrics = {"accuracy": result.accuracy, "base_accuracy": result.base_accuracy, "best_step": result.best_step}
        run: dict[str, Any] = {"run": config.run, "digest": config.digest, "rl": config.domain_rl(domain).model_dump()}
        if config.domains[domain].others is not None:  # what a dispatcher must know of its classification expert
            run["labels"] = [*(name for name, other in config.domains.items() if other.others is None), OTHERS]
        if domain not in registry.names() or registry.manifest(domain).config != run:
            registry.save(
                domain, store.read_tensors(EXPERT), base_digest=digest, domain=domain, config=run,
                metrics=metrics, seed=config.seed,
            )  # fmt: skip
        results[domain] = result
    leftovers = Store(f"{config.out}/{config.run}/ray")
    if leftovers.local is not None:
        for name in leftovers.names():
            leftovers.delete(name)
    return results
