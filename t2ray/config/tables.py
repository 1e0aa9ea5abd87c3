"""What `t2ray tables` is configured by: a grid of models, methods and seeds over one training job, and its tables.

Not here: what a cell of the grid does (`cluster.train.cells`), and what tables show (`evals.tables`). No torch, no ray.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from t2ray.config.files import FilePath, Strict, expanded, nearest, override, read_yaml, validate
from t2ray.config.search import CEMConfig, laid_over
from t2ray.config.train import TrainConfig
from t2ray.config.train import resolve as resolve_job
from t2ray.core import ConfigError, check_name

BASE, EXPERT, FEWSHOT = "base", "expert", "fewshot"
_STRATEGY = re.compile(r"base|expert|prompt|cls|soft(/\d*\.?\d+)?|fewshot(/[1-9]\d*)?")
_OF_GRID = {"model": "models", "run": "run", "out": "out", "seed": "seeds", "experts": "run", "from": "methods"}
_SHOTS = 10


class UnseenTask(Strict):
    """A task that no expert was trained on."""

    expert: str = Field(description="Domain whose expert answers it under the strategy `expert`.")
    task: str | None = Field(None, description="Built-in task that it is; without one, that of its own name.")
    data: FilePath | None = Field(None, description="File of rows for the built-in task, in place of the hub's.")


class TextConfig(Strict):
    """A text that is read and not answered: what an expert changes in the model of other texts is its perplexity."""

    expert: str = Field(description="Domain whose expert reads it under the strategy `expert`.")
    data: FilePath = Field(
        description="File of rows, or the id of a data set on the Hugging Face hub; of the latter its test rows."
    )
    column: str = Field(description="Column of the texts, such as question.")


class TableConfig(Strict):
    """One table: a row per method and strategy, a column per task."""

    title: str = Field(description="Heading of the table.")
    methods: tuple[str, ...] = Field(min_length=1, description="Methods, each with its rows; names of `methods`.")
    strategies: tuple[str, ...] = Field(
        (BASE, EXPERT),
        min_length=1,
        description="What answers: base, expert (the task's own, or that of its sibling), prompt, cls, soft, soft/T "
        "with a temperature, fewshot, or fewshot/K with K shots.",
    )
    tasks: tuple[str, ...] = Field(min_length=1, description="Domains of the job, unseen tasks and texts.")
    against: str | None = Field(
        None,
        description='Row that the others are compared with, example by example, written "method/strategy"; without '
        "one, nothing is compared.",
    )

    @field_validator("strategies")
    @classmethod
    def _known(cls, strategies: tuple[str, ...]) -> tuple[str, ...]:
        for strategy in strategies:
            if not _STRATEGY.fullmatch(strategy):
                raise ValueError(f"base, expert, prompt, cls, soft, soft/T, fewshot or fewshot/K, not {strategy!r}")
        return strategies

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(method, strategy) of each row; the base model is a row of no method."""
        adapted = [(method, s) for method in self.methods for s in self.strategies if s != BASE]
        return [*([(BASE, BASE)] if BASE in self.strategies else []), *adapted]


class TablesConfig(Strict):
    """A grid of models, methods and seeds: each cell is a run of the job, and is measured on the tables' tasks."""

    run: str = Field("tables", description="Name of the grid, and of its folder under `out`.")
    out: FilePath = Field(
        "runs", description="Folder that receives the grid: a local one, or a URI that all nodes share."
    )
    models: dict[str, FilePath] = Field(
        min_length=1, description="Models by the names that tables show: local folders, hub ids, or tiny."
    )
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="Methods by their names, each with what it changes in the job, such as "
        "{adapter: {kind: lora}, rl.lr: 5e-4}.",
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="Seeds; each cell is trained once for each.")
    job: dict[str, Any] = Field(
        description="The training job of every cell: the name of its file, or its keys without model, run, out and "
        "seed. With workers: 0 cells run in this process, one after the other; else as many as fit on Ray, each with "
        "the job's cpus and gpus."
    )
    unseen: dict[str, UnseenTask] = Field({}, description="Tasks that no expert was trained on, by their names.")
    texts: dict[str, TextConfig] = Field(
        {}, description="Texts by their names; tables show their perplexity under base and expert."
    )
    limit: int | None = Field(
        None, ge=1, description="Number of test prompts per task, and of rows per text; without one, all of them."
    )
    search: CEMConfig = Field(CEMConfig(), description="Settings of the few-shot searches.")
    tables: dict[str, TableConfig] = Field(min_length=1, description="Tables by the names of their files.")

    @property
    def folder(self) -> str:
        """The folder of the grid."""
        return f"{self.out}/{self.run}"

    def measured(self, method: str) -> list[tuple[str, str]]:
        """Returns each (task, strategy) that the tables want of a method, or of the base, once."""
        wanted = (
            (task, strategy)
            for table in self.tables.values()
            for task in table.tasks
            for name, strategy in table.rows
            if name == method
        )
        return list(dict.fromkeys(wanted))


def shots_of(strategy: str) -> int:
    """Returns the number of shots of `fewshot` or `fewshot/K`."""
    return int(strategy.partition("/")[2] or _SHOTS)


def job_of(config: TablesConfig, model: str, method: str, seed: int) -> TrainConfig:
    """Returns the training job of a cell of the grid, which publishes every expert, better than its base or not.

    Raises:
        ConfigError: a key that a job does not have, or a value out of range.
    """
    where = f"tables {config.run!r}, method {method!r}"
    job = resolve_job(laid_over(config.job, config.methods.get(method, {})), where=where)
    domains = {name: domain.model_copy(update={"publish": "always"}) for name, domain in job.domains.items()}
    grid = {"model": config.models[model], "seed": seed, "out": f"{config.folder}/runs", "experts": None}
    return job.model_copy(update=grid | {"run": f"{model}.{method}.{seed}", "domains": domains})


def load(path: str | Path, overrides: Iterable[str] = ()) -> TablesConfig:
    """Returns the grid in a YAML file, with `seeds=[0]`-like overrides; the job of every method is checked.

    A `job` that is text names a training job's file, beside the grid's own or in the working folder.

    Raises:
        ConfigError: the file, a key, a value, or a name in a table is wrong.
    """
    path = Path(expanded(str(path)))
    values = read_yaml(path)
    if isinstance(values.get("job"), str):
        beside = path.parent / values["job"]
        values["job"] = read_yaml(beside if beside.is_file() else Path(expanded(values["job"])))
    values = override(values, overrides)
    if isinstance(values.get("job"), dict) and not values["job"].get("code"):
        values["job"] = values["job"] | {"code": str(path.resolve().parent)}
    config = validate(TablesConfig, values, where=str(path))
    for key, instead in _OF_GRID.items():
        if key in config.job:
            raise ConfigError(f"{path}: job.{key}: the grid says it, by {instead}; leave it out of the job")
    for name, what in [(config.run, "run"), *((n, "model") for n in config.models)]:
        check_name(name, what)
    for method in config.methods:
        check_name(method, "method")
        if method == BASE:
            raise ConfigError(f"{path}: methods: {BASE!r} is the model itself; give the method another name")
        domains = job_of(config, next(iter(config.models)), method, 0).domains
    _check_tables(config, [name for name, domain in domains.items() if domain.others is None], str(path))
    return config


def _check_tables(config: TablesConfig, domains: list[str], where: str) -> None:
    """Raises ConfigError for a table that names what there is not."""
    for name, other in (config.unseen | config.texts).items():
        if name in domains or name in config.unseen.keys() & config.texts.keys():
            raise ConfigError(
                f"{where}: {name!r} is a name of two tasks; a domain, an unseen task or a text has its own"
            )
        if other.expert not in domains:
            raise ConfigError(f"{where}: {name}.expert: no domain {other.expert!r}{nearest(other.expert, domains)}")
    tasks = [*domains, *config.unseen, *config.texts]
    for name, table in config.tables.items():
        check_name(name, "table")
        for method in table.methods:
            if method not in config.methods:
                raise ConfigError(f"{where}: tables.{name}: no method {method!r}{nearest(method, config.methods)}")
        for task in table.tasks:
            if task not in tasks:
                raise ConfigError(f"{where}: tables.{name}: no task {task!r}{nearest(task, tasks)}")
            if task in config.texts and {*table.strategies} - {BASE, EXPERT}:
                raise ConfigError(f"{where}: tables.{name}: {task!r} is a text; it is read under base and expert alone")
        rows = ["/".join(row) for row in table.rows]
        if table.against is not None and table.against not in rows:
            raise ConfigError(
                f"{where}: tables.{name}: against: no row {table.against!r}{nearest(table.against, rows)}"
            )
