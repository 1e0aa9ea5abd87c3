"""W&B and MLflow, where a job asks for them (`track`): each domain is one run there, grouped by the run's name.

A tracker is told every step once: `trackers.json` in the domain's folder holds its run there and the last step told.
A resumed run goes on with the same one, the steps that it repeats are not told again, and what a tracker could not be
told at the time it is told later: a server that is away never ends a training. Who writes, and where to, is the
tracker's own business and comes from its own environment (WANDB_PROJECT, WANDB_API_KEY, WANDB_MODE, WANDB_ENTITY,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME): no secret passes through here.

Not here: TensorBoard (`records`), which needs no choice.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from t2ray.config.train import TrainConfig
from t2ray.core import ConfigError
from t2ray.integrity import Damaged, seal, unseal
from t2ray.store import Store
from t2ray.training.metrics import StepMetrics

STATE = "trackers.json"
_PAUSE_S = 60.0  # before a tracker that could not be told is tried again: a server that is away must not slow the steps
_PROJECT = "t2ray"
_REMEDY = {
    "wandb": "log in with `wandb login` or WANDB_API_KEY where the workers run, or set WANDB_MODE=offline",
    "mlflow": "set MLFLOW_TRACKING_URI where the workers run to a server that answers, or to sqlite:////PATH/mlflow.db",
}
_SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """What one tracker has of a domain: `Track(id="3f9a", told=12, where="https://...", problem="")`.

    `told` is the last step told, `problem` why later ones could not be told yet.
    """

    id: str
    told: int
    where: str
    problem: str = ""


def check_trackers(config: TrainConfig) -> None:
    """Checks what can be seen of the trackers without loading them.

    Raises:
        ConfigError: a package is missing, with its remedy; or MLflow has no place.
    """
    for name in config.track:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, which W&B leaves behind, is no package
            raise ConfigError(
                f"track: {name} is not installed here; pip install 't2ray[{name}]', or leave it out of track"
            )
    if "mlflow" in config.track:
        _mlflow_uri(config)


def tracks(store: Store) -> dict[str, Track]:
    """Returns what each tracker has of the domain whose folder this is; nothing if the note of it is damaged."""
    try:
        return {name: Track(**values) for name, values in unseal(store.read_bytes(STATE)).items()}
    except (FileNotFoundError, Damaged, TypeError):
        return {}


class Trackers:
    """The trackers of a domain; what they were told stands in its folder."""

    def __init__(self, config: TrainConfig, domain: str, store: Store) -> None:
        """
        Raises:
            ConfigError: one that this run has not used before cannot be opened. One that it has is tried again later.
        """
        self.config, self.domain, self.store = config, domain, store
        self.tracks = tracks(store)
        self.opened: dict[str, _Wandb | _Mlflow] = {}
        self.again: dict[str, float] = {}  # when one that failed may be tried again
        check_trackers(config)
        for name in config.track:
            if name not in self.tracks:
                try:
                    self._open(name)
                except _errors(name) as error:
                    raise ConfigError(f"track: {name} does not start ({_plain(error)}); {_REMEDY[name]}") from None

    def tell(self, rows: Sequence[StepMetrics]) -> None:
        """Tells each tracker those of the run's steps that it does not have yet."""
        for name in self.config.track:
            if time.monotonic() >= self.again.get(name, 0.0):
                self._tell(name, rows)

    def close(self, rows: Sequence[StepMetrics], *, failed: bool) -> None:
        """Tells what is left to tell and ends the tracker runs; they are opened again if the training goes on."""
        self.again.clear()
        self.tell(rows)
        for name, tracker in self.opened.items():
            try:
                tracker.close(failed)
            except _errors(name) as error:
                self._note(name, replace(self.tracks[name], problem=_plain(error)))

    def _tell(self, name: str, rows: Sequence[StepMetrics]) -> None:
        try:
            tracker = self.opened.get(name) or self._open(name)
            for row in rows:
                if row.step > self.tracks[name].told:
                    tracker.log(row.step, row.values)
                    self._note(name, replace(self.tracks[name], told=row.step, problem=""))
        except _errors(name) as error:
            self.again[name] = time.monotonic() + _PAUSE_S
            self._note(name, replace(self.tracks[name], problem=_plain(error)))

    def _open(self, name: str) -> _Wandb | _Mlflow:
        before = self.tracks.get(name)
        tracker = (_Wandb if name == "wandb" else _Mlflow)(
            self.config, self.domain, self.store, before.id if before else None
        )
        self.opened[name] = tracker
        told = tracker.told if tracker.told is not None else before.told if before else 0
        self._note(name, Track(id=tracker.id, told=told, where=_plain(tracker.where)))
        return tracker

    def _note(self, name: str, track: Track) -> None:
        if self.tracks.get(name) != track:
            self.tracks[name] = track
            self.store.write_text(STATE, seal({name: asdict(t) for name, t in self.tracks.items()}, indent=1))


class _Wandb:
    """A W&B run; its files are in the domain's folder, for `wandb sync` where it is offline."""

    def __init__(self, config: TrainConfig, domain: str, store: Store, run_id: str | None) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.id = run_id or uuid.uuid4().hex[:12]
        self.run = wandb.init(
            id=self.id, resume="allow", project=os.environ.get("WANDB_PROJECT", _PROJECT), group=config.run,
            name=f"{config.run}/{domain}", job_type="train", config=_settings(config, domain),
            reinit="create_new",  # each of a worker's domains has its own
            dir=str(store.local or tempfile.mkdtemp(prefix="wandb-")),
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False,  # what a process prints is its run's own
                init_timeout=30, x_transaction_log_flush_interval=0.1,  # a kill loses what is not flushed
            ),
        )  # fmt: skip
        self.where = str(Path(self.run.settings.sync_dir).parent) if self.run.offline else self.run.url
        # a server knows what arrived before a kill; a file does not, and the note is believed
        self.told = self.run.starting_step - 1 if self.run.resumed and not self.run.offline else None

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step, commit=True)  # at once: else a step waits for the next one

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _Mlflow:
    """An MLflow run, tagged with the run's name and the domain's."""

    def __init__(self, config: TrainConfig, domain: str, store: Store, run_id: str | None) -> None:
        for key, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # what cannot be told now is told later, as a whole
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        }.items():
            os.environ.setdefault(key, value)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        for chatty in ("mlflow", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        uri = _mlflow_uri(config)
        self.metric, self.client = Metric, MlflowClient(uri)
        if run_id is None:
            experiment = _experiment(self.client, config)
            tags = {"t2ray.run": config.run, "t2ray.domain": domain}
            run = self.client.create_run(experiment, tags=tags, run_name=f"{config.run}/{domain}")
            run_id = str(run.info.run_id)
            settings = _settings(config, domain).items()
            self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in settings])
        else:
            self.client.update_run(run_id, status="RUNNING")
        self.id, self.where = run_id, uri
        self.told = max((metric.step for metric in self.client.get_metric_history(run_id, "seconds")), default=0)

    def log(self, step: int, values: dict[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        self.client.log_batch(self.id, metrics=[self.metric(key, value, now, step) for key, value in values.items()])

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


def _experiment(client: Any, config: TrainConfig) -> str:
    """Returns the id of the experiment, which it makes if there is none; domains that start together get the same."""
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
    try:
        if (found := client.get_experiment_by_name(name)) is not None:
            return str(found.experiment_id)
        local = None if os.environ.get("MLFLOW_TRACKING_URI") else Path(config.out, "mlflow-artifacts").as_uri()
        return str(client.create_experiment(name, artifact_location=local))
    except MlflowException:
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return str(found.experiment_id)


def _mlflow_uri(config: TrainConfig) -> str:
    """Returns where MLflow writes: MLFLOW_TRACKING_URI, or a database beside the runs."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and "://" in config.out:
        raise ConfigError(f"track: mlflow cannot write into {config.out}; {_REMEDY['mlflow']}")
    return uri or f"sqlite:///{config.out}/mlflow.db"


def _settings(config: TrainConfig, domain: str) -> dict[str, Any]:
    """Returns the settings that runs are compared by."""
    own = {"run": config.run, "domain": domain, "model": config.model, "seed": config.seed, "workers": config.workers}
    matrices = {"targets": config.trained.targets, "layers": config.trained.layers}
    return own | matrices | {f"rl.{key}": value for key, value in config.domain_rl(domain).model_dump().items()}


def _errors(name: str) -> tuple[type[Exception], ...]:
    """Returns the errors that a tracker raises if its server or its files cannot be reached."""
    if name == "wandb":
        from wandb.errors import Error

        return (Error, OSError)
    from mlflow.exceptions import MlflowException

    return (MlflowException, OSError)


def _plain(what: object) -> str:
    """Returns an error or an address in one line, without a password."""
    text = re.sub(r"(?<=//)[^/@\s]+@", "", " ".join(str(what).split()))
    for name in _SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "...")
    return text[:300]
