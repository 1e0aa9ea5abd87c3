"""A run folder: `<out>/<run>/config.json` and one folder per domain."""

from __future__ import annotations

from pydantic import ValidationError

from t2ray.config.train import TrainConfig
from t2ray.core import RunError
from t2ray.integrity import Damaged
from t2ray.store import Store
from t2ray.training.checkpoint import FOLDER as CHECKPOINTS
from t2ray.training.domain import CONFIG, RESULT
from t2ray.training.metrics import METRICS

DOMAINS = "domains"


def open_run(config: TrainConfig) -> None:
    """Writes the configuration; with it the run exists."""
    Store(f"{config.out}/{config.run}").write_text(CONFIG, config.model_dump_json(indent=1))


def free_name(folder: str) -> bool:
    """Deletes what a run left that never began. Returns whether there is no run of that name, or no longer."""
    store = Store(folder)
    if begun(folder):
        return False
    for name in (DOMAINS, CONFIG):
        if store.exists(name):
            store.delete(name)
    return True


def begun(folder: str) -> bool:
    """Whether a run has come to where there is something to lose: to a step of a domain, or a checkpoint."""
    store = Store(folder)
    domains = [f"{DOMAINS}/{name}" for name in store.names(DOMAINS)]
    files = [f"{domain}/{name}" for domain in domains for name in (METRICS, RESULT) if store.exists(f"{domain}/{name}")]
    return any(store.names(f"{domain}/{CHECKPOINTS}") for domain in domains) or any(
        store.is_folder(file) or store.read_bytes(file) for file in files
    )


def read_run(folder: str) -> TrainConfig:
    """Reads the configuration of a run.

    Raises:
        RunError: there is no run in that folder, or its configuration is damaged.
    """
    store = Store(folder)
    if not store.exists(CONFIG):
        raise RunError(f"no run in {folder}; `t2ray train` makes one")
    try:
        return TrainConfig.model_validate_json(store.read_bytes(CONFIG))
    except (ValidationError, Damaged) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise RunError(
            f"{folder}/{CONFIG} is not a configuration that this t2ray wrote ({why}); name another run, or train again"
        ) from None
