"""From a training job's configuration to its tasks. What a job does not ask for is not imported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from t2ray.config.train import TrainConfig
from t2ray.core import ConfigError
from t2ray.tasks import builtin
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
        rest = [build_task(config, name) for name, other in config.domains.items() if other.others is None]
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


def _others(config: TrainConfig, domain: str, others: str) -> Task:
    """The task that gives the prompts of no domain; the reward that `own` needs for it is never called."""
    from t2ray.tasks.data import FORMATS, own

    settings = config.domains[domain]
    if settings.prompt is None and Path(others).suffix not in FORMATS:
        return builtin(others)
    if settings.prompt is None:
        raise ConfigError(f'domains.{domain}: others: {others} also needs prompt, such as "{{prompt}}" for a column')
    rows = {"data": others, "reward": "t2ray.tasks.equal:reward", "gold": None}
    return own("others", settings.model_copy(update=rows), config.code)
