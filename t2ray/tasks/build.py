"""From a training job's configuration to its tasks. What a job does not ask for is not imported."""

from __future__ import annotations

from dataclasses import replace

from t2ray.config.files import nearest
from t2ray.config.train import TrainConfig
from t2ray.core import ConfigError
from t2ray.tasks import BUILTIN, builtin
from t2ray.tasks.task import LONGEST, Task


def build_task(config: TrainConfig, domain: str) -> Task:
    """Returns the task of one domain, with the domain's name.

    The classification domain takes its prompts from all other domains. The prompts that fit no domain come from its
    `others`: the name of a built-in task, or a file that is read with the domain's `prompt`.

    Raises:
        ConfigError: the task is unknown, the prompt names no column, or the reward cannot be imported.
        DataError: a data file is missing, empty or malformed.
    """
    settings = config.domains[domain]
    if settings.others is not None:
        rest = [build_task(config, name) for name in config.labels]
        if not rest:
            raise ConfigError(f"domains.{domain}: a classifier needs at least one other domain to tell apart")
        from t2ray.tasks.dispatch import dispatch

        task = dispatch(rest, _others(config, domain, settings.others))
    elif settings.task is not None:
        task = builtin(settings.task, settings.data)
    else:
        from t2ray.tasks.data import own

        task = own(domain, settings, config.code)
    of_task = settings.task is not None or settings.others is not None
    asked = settings.max_tokens or (None if of_task else config.domain_rl(domain).max_tokens)
    usual = task.max_tokens if of_task else LONGEST
    return replace(
        task, name=domain, max_tokens=asked or usual, to_end=asked is None, success_above=settings.success_above
    )


def task_named(name: str, config: TrainConfig | None = None, data: str | None = None) -> Task:
    """Returns a domain of a job, by its name there, or a built-in task.

    Args:
        data: a source of other rows with the columns of the task's own; every split of a domain has all of them.

    Raises:
        ConfigError: there is no such domain or task, or it takes no rows.
        DataError: the rows are missing, or do not have what the task needs.
    """
    domain = config.domains.get(name) if config is not None else None
    if config is None or domain is None:
        if config is not None and name not in BUILTIN:
            raise ConfigError(
                f"the run {config.run!r} has no domain {name!r}{nearest(name, [*config.domains, *BUILTIN])}"
            )
        return builtin(name, data)
    if data is None:
        return build_task(config, name)
    if domain.others is not None:
        raise ConfigError(f"the domain {name!r} takes its prompts from the other domains, and not from {data}")
    rows = {"data": data} | ({} if domain.task else {"validation": data, "test": data})
    return build_task(
        config.model_copy(update={"domains": {**config.domains, name: domain.model_copy(update=rows)}}), name
    )


def _others(config: TrainConfig, domain: str, others: str) -> Task:
    """The task that gives the prompts of no domain; the reward that `own` needs for it is never called."""
    from t2ray.tasks.data import own
    from t2ray.tasks.files import is_file_like

    settings = config.domains[domain]
    if settings.prompt is None and not is_file_like(others):
        return builtin(others)
    if settings.prompt is None:
        raise ConfigError(f'domains.{domain}: others: {others} also needs prompt, such as "{{prompt}}" for a column')
    rows = {"data": others, "reward": "t2ray.tasks.equal:reward", "gold": None}
    return own("others", settings.model_copy(update=rows), config.code)
