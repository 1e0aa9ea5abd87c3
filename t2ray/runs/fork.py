"""A run that goes on from another one's experts: `from: runs/a`."""

from __future__ import annotations

from torch import Tensor

from t2ray.config.files import nearest
from t2ray.config.train import TrainConfig
from t2ray.core import ConfigError, ExpertError, RunError
from t2ray.integrity import Damaged
from t2ray.models.weights import open_weights
from t2ray.runs.folder import read_run
from t2ray.store import Store
from t2ray.training.domain import expert_of, finished


def starts(config: TrainConfig) -> dict[str, dict[str, Tensor]]:
    """Returns what each domain of a job starts from: the vectors, by target, of the source's expert of its name.

    Raises:
        RunError: there is no such run, or one of the domains is not done there.
        ConfigError: the source has no domain of that name, or trained another adapter.
        ExpertError: the source belongs to another base model.
    """
    assert config.source is not None
    source = read_run(config.source)
    digest = open_weights(config.model).digest
    if (theirs := source.adapter.method) != (ours := config.adapter.method):
        raise ConfigError(f"from: {config.source} trained {theirs}, this job trains {ours}; give it the same adapter")
    found = {}
    for domain in config.trains:
        if domain not in source.domains:
            raise ConfigError(f"from: {config.source} has no domain {domain!r}{nearest(domain, source.domains)}")
        store = Store(f"{config.source}/domains/{domain}")
        result = finished(store)
        if result is None:
            raise RunError(f"from: domain {domain!r} of {config.source} is not done; `t2ray train --resume` ends it")
        try:
            found[domain] = expert_of(store, result)
        except Damaged as error:
            raise RunError(f"from: {store.uri}: {error}; `t2ray train --resume` makes it again") from None
    if open_weights(source.model).digest != digest:
        raise ExpertError(f"from: {config.source} belongs to another base model: {source.model}, not {config.model}")
    return found
