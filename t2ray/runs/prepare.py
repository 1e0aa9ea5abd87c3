"""A training job before it starts: absolute paths, and every check that needs no cluster and no computation.

A run is only resumed if it is asked for.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

from t2ray.adapters.baselines import check_baseline
from t2ray.adapters.factors import MANIFEST as FACTORS
from t2ray.adapters.factors import Factors, factors_folder
from t2ray.config.resume import sampler
from t2ray.config.train import TrainConfig
from t2ray.core import ConfigError, RunError, user
from t2ray.engine.choose import choose
from t2ray.experts.registry import Registry
from t2ray.models.load import load_chat
from t2ray.models.skeleton import skeleton
from t2ray.models.targets import select_targets
from t2ray.models.weights import PACKAGED, open_weights, resolve
from t2ray.runs.folder import begun, read_run
from t2ray.runs.fork import starts
from t2ray.runs.rows import check_lengths
from t2ray.store import Store
from t2ray.tasks.build import build_task
from t2ray.tasks.files import absolute
from t2ray.tasks.task import Task
from t2ray.training.checkpoint import steps
from t2ray.training.domain import CONFIG, domain_store
from t2ray.training.trackers import check_trackers

_FORMER_LONGEST = 48
_FORMER_LR = 0.02


def prepare(config: TrainConfig, *, resume: bool) -> TrainConfig:
    """Checks a job as far as possible without a cluster and without computation; returns it with absolute paths.

    Raises:
        RunError: the run exists and `resume` is False, or the run was started with another configuration.
        T2RayError: the job, its data, its rewards or its model have a mistake.
    """
    config = _with_sampler(_as_begun(_absolute(config)))
    check_run(config, resume)
    _check_base(config)
    check_trackers(config)
    tasks = job_tasks(config)
    for domain, task in tasks.items():
        rl = config.domain_rl(domain)
        if rl.objective == "sft" and task.gold is None:
            raise ConfigError(f"domain {domain!r} has no right answers to train on; name their column by gold")
        if rl.engine == "vllm" and (rl.objective == "sft" or config.adapter.kind != "svf"):
            raise ConfigError(f"domain {domain!r}: vLLM samples for SVF alone, not for sft; use engine: transformers")
        if rl.engine == "vllm" and config.domains_per_worker not in (1, "auto"):
            raise ConfigError(f"domain {domain!r}: vLLM samples for one domain; use domains_per_worker: 1")
    check_lengths(config, tasks)
    if config.source is not None and not resume:
        starts(config)
    return config


def job_tasks(config: TrainConfig) -> dict[str, Task]:
    """Returns the task of each domain that a job trains."""
    return {domain: build_task(config, domain) for domain in config.trains}


def check_run(config: TrainConfig, resume: bool) -> None:
    """Checks that a run may begin, or go on. One that has not come to its first step does not count: its name is free.

    Raises:
        RunError: the run exists and `resume` is False; or it was started with another configuration, as far as that
            changes z, or has made more steps.
    """
    folder = f"{config.out}/{config.run}"
    if not Store(folder).exists(CONFIG) or not begun(folder):
        return
    if not resume:
        raise RunError(f"run {config.run!r} exists in {folder}; go on with it by --resume, or choose another run=NAME")
    first = read_run(folder)
    differing = _differing(first.resume_fields(), config.resume_fields())
    for domain in config.trains:
        asked, made = config.domain_rl(domain).steps, max(steps(domain_store(config, domain)), default=0)
        if asked < made:
            differing.append(f"rl.steps of {domain}: {made} were made, now {asked}")
    if _support(first) != _support(config):
        differing.append(f"factors: {first.factors}, now {config.factors}, of another support")
    if differing:
        raise RunError(
            f"run {config.run!r} was started with another configuration: {'; '.join(differing)}; use another run=NAME"
        )


def _as_begun(config: TrainConfig) -> TrainConfig:
    """Returns the job with the day that its run began, and with what it began with by an earlier default."""
    store = Store(f"{config.out}/{config.run}")
    first = read_run(store.uri) if store.exists(CONFIG) and begun(store.uri) else None
    day = config.date or (first and first.date) or date.today().isoformat()
    rl = config.rl
    if rl.max_tokens is None and first is not None and first.rl.max_tokens == _FORMER_LONGEST:
        rl = rl.model_copy(update={"max_tokens": _FORMER_LONGEST})
    if rl.lr is None and first is not None and first.rl.lr == _FORMER_LR:
        rl = rl.model_copy(update={"lr": _FORMER_LR})
    if rl.engine == "auto" and first is not None:
        rl = rl.model_copy(update={"engine": sampler(first.rl.engine)})
    domains = {
        name: domain.model_copy(update={"rl": domain.rl | {"engine": sampler(first.domain_rl(name).engine)}})
        if first is not None and name in first.domains and domain.rl.get("engine") == "auto"
        else domain
        for name, domain in config.domains.items()
    }
    return config.model_copy(update={"date": day, "rl": rl, "domains": domains})


def _with_sampler(config: TrainConfig) -> TrainConfig:
    """Returns the job with what samples its rollouts, where it leaves that open: its runs go on with the same."""
    settings, asked = config.domain_settings, config.rl.engine
    if "auto" not in (asked, *(rl.engine for rl in settings.values())):
        return config
    against = ""
    if config.adapter.kind != "svf" or any(rl.objective == "sft" for rl in settings.values()):
        against = "vLLM samples for SVF alone, and not for sft"
    elif config.gpus != 1:
        against = f"vLLM needs a GPU of its own for each worker, and this job has gpus: {config.gpus:g}"
    elif config.domains_per_worker != 1 and (len(config.domains) > 1 or config.domains_per_worker != "auto"):
        against = "vLLM samples for one domain, and domains may share a worker's model here"
    elif {entry.dtype for entry in open_weights(config.model).entries.values()} != {"F32"}:
        against = "a fold into weights in half precision would lose small changes of z"
    kind = choose("auto", config.model, config.factors, gpu=config.gpus > 0, against=against)
    rl = config.rl.model_copy(update={"engine": kind if asked == "auto" else asked})
    domains = {
        name: domain.model_copy(update={"rl": domain.rl | {"engine": kind}})
        if settings[name].engine == "auto" and "engine" in domain.rl
        else domain
        for name, domain in config.domains.items()
    }
    return config.model_copy(update={"rl": rl, "domains": domains})


def _support(config: TrainConfig) -> str | None:
    """Returns which components a job's factors hold, if they are sparse: it changes z, and other factors do not."""
    there = config.factors is not None and Path(config.factors, FACTORS).exists()
    return Factors.open(config.factors).manifest.support if there and config.factors else None


def _check_base(config: TrainConfig) -> None:
    """Raises a T2RayError if the factors or the registry belong to another model than the job's, if a baseline does not
    fit it, or if a classification expert would name an expert that there will not be."""
    assert config.factors is not None and config.experts is not None
    digest, registry = open_weights(config.model).digest, Registry(config.experts)
    chat, _ = load_chat(resolve(config.model))
    chat.template = config.chat_template_kwargs
    chat.encode(user("?"))
    if config.adapter.kind == "svf" and Path(config.factors, FACTORS).exists():
        Factors.open(config.factors, digest)
    if config.adapter.kind != "svf":  # as decomposing does of SVF's
        chosen = select_targets(skeleton(config.model), config.trained.targets, config.trained.layers)
        check_baseline(config.trained, chosen.targets)
    names = registry.names()
    for name in names[:1]:  # a registry is refused as a whole if one expert has another base
        registry.load(name, base_digest=digest)
    for classifier in (name for name in config.trains if config.domains[name].others is not None):
        if lacking := [name for name in config.labels if name not in (*config.trains, *names)]:
            raise ConfigError(
                f"domains.{classifier} would name {', '.join(lacking)}, of which {registry.store.uri} has no expert; "
                "name the registry that has it by experts=, or leave out train: false there"
            )


def _differing(before: object, now: object, path: str = "") -> list[str]:
    """Returns one line per key that differs, such as `rl.lr: 0.01, now 0.02`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now}]
        return [
            line for key in keys for line in _differing(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == now else [f"{path}: {json.dumps(before)}, now {json.dumps(now)}"]


def _absolute(config: TrainConfig) -> TrainConfig:
    """Makes paths absolute, because workers run in other folders, and fills in defaults that depend on other values."""
    model = resolve(config.model)
    out = config.out if "://" in config.out else str(Path(config.out).absolute())
    factors = config.factors or factors_folder(
        "runs" if "://" in out else out, open_weights(model).digest, config.trained.targets, config.trained.layers
    )
    experts = config.experts or f"{out}/{config.run}/experts"
    domains = {
        name: domain.model_copy(
            update={key: _sources(getattr(domain, key)) for key in ("data", "validation", "others")}
        )
        for name, domain in config.domains.items()
    }
    return config.model_copy(
        update={
            "model": config.model if config.model in PACKAGED else str(model),  # each node has its own
            "out": out,
            "factors": str(Path(factors).absolute()),
            "code": config.code and str(Path(config.code).absolute()),
            "source": config.source
            and (config.source if "://" in config.source else str(Path(config.source).absolute())),
            "experts": experts if "://" in experts else str(Path(experts).absolute()),
            "domains": domains,
        }
    )


def _sources(named: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    return tuple(map(absolute, named)) if isinstance(named, tuple) else named and absolute(named)
