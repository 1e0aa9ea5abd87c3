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
from t2ray.core import NAME, ConfigError, check_name

BASE, EXPERT, FEWSHOT, SHUFFLED = "base", "expert", "fewshot", "shuffled"
_PLAIN = re.compile(r"base|expert|prompt|cls|soft(/\d*\.?\d+)?")
_LENT = re.compile(rf"(?:transfer|{SHUFFLED})/(?P<lender>{NAME.pattern})")
_SEARCHED = re.compile(
    rf"{FEWSHOT}(?:/(?P<shots>[1-9]\d*)(?:/(?P<population>\d+)x(?P<iterations>\d+))?)?(?:\+(?P<lender>{NAME.pattern}))?"
)
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
        "with a temperature; fewshot, fewshot/K with K shots, fewshot/K/PxI with I rounds of P mixtures; of experts of "
        "another MODEL of the grid transfer/MODEL, shuffled/MODEL (the components of each z in another order), or a "
        "few-shot strategy with +MODEL, which searches those of both.",
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
            if not any(known.fullmatch(strategy) for known in (_PLAIN, _LENT, _SEARCHED)):
                raise ValueError(
                    "base, expert, prompt, cls, soft, soft/T, fewshot, fewshot/K, fewshot/K/PxI, fewshot+MODEL, "
                    f"transfer/MODEL or shuffled/MODEL, not {strategy!r}"
                )
        return strategies

    def rows(self, model: str) -> list[tuple[str, str]]:
        """Returns (method, strategy) of each row of a model; the base is a row of no method, and none lends itself."""
        strategies = [s for s in self.strategies if s != BASE and lender_of(s) != model]
        adapted = [(method, s) for method in self.methods for s in strategies]
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

    def measured(self, model: str, method: str) -> list[tuple[str, str]]:
        """Returns each (task, strategy) that the tables want of a model's method, or of its base, once."""
        wanted = (
            (task, strategy)
            for table in self.tables.values()
            for task in table.tasks
            for name, strategy in table.rows(model)
            if name == method
        )
        return list(dict.fromkeys(wanted))


def lender_of(strategy: str) -> str | None:
    """Returns the model whose experts a strategy uses on another; None where a model has its own alone."""
    found = _LENT.fullmatch(strategy) or _SEARCHED.fullmatch(strategy)
    return found["lender"] if found else None


def lent_name(lender: str, expert: str) -> str:
    """Returns the name of an expert on a model that it is lent to: `other.math`."""
    return f"{lender}.{expert}"


def search_of(config: TablesConfig, strategy: str) -> tuple[int, CEMConfig]:
    """Returns the number of shots of a few-shot strategy, and the settings of its search.

    Raises:
        ConfigError: its population or its number of rounds is out of range.
    """
    found = _SEARCHED.fullmatch(strategy)
    assert found, strategy
    budget = {key: int(found[key]) for key in ("population", "iterations") if found[key]}
    values = config.search.model_dump() | budget
    return int(found["shots"] or _SHOTS), validate(CEMConfig, values, where=f"strategy {strategy!r}")


def job_of(config: TablesConfig, model: str, method: str, seed: int) -> TrainConfig:
    """Returns the training job of a cell of the grid, which publishes every expert, better than its base or not.

    Its rollouts are sampled by transformers, unless it says otherwise: methods are compared by one sampler.

    Raises:
        ConfigError: a key that a job does not have, or a value out of range.
    """
    where = f"tables {config.run!r}, method {method!r}"
    job = resolve_job(laid_over(config.job, config.methods.get(method, {})), where=where)
    domains = {name: domain.model_copy(update={"publish": "always"}) for name, domain in job.domains.items()}
    rl = job.rl.model_copy(update={"engine": "transformers"}) if job.rl.engine == "auto" else job.rl
    grid = {"model": config.models[model], "seed": seed, "out": f"{config.folder}/runs", "experts": None}
    return job.model_copy(update=grid | {"run": f"{model}.{method}.{seed}", "domains": domains, "rl": rl})


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
    _check_strategies(config, domains, str(path))
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
        rows = list(dict.fromkeys("/".join(row) for model in config.models for row in table.rows(model)))
        if table.against is not None and table.against not in rows:
            raise ConfigError(
                f"{where}: tables.{name}: against: no row {table.against!r}{nearest(table.against, rows)}"
            )


def _check_strategies(config: TablesConfig, domains: Iterable[str], where: str) -> None:
    """Raises ConfigError for a search that cannot be, and for a model that lends and is not there, or is alone."""
    for name, table in config.tables.items():
        for strategy in table.strategies:
            if strategy.startswith(FEWSHOT):
                search_of(config, strategy)
            lender = lender_of(strategy)
            if lender is None:
                continue
            if lender not in config.models:
                raise ConfigError(
                    f"{where}: tables.{name}: {strategy}: no model {lender!r}{nearest(lender, config.models)}"
                )
            if len(config.models) == 1:
                raise ConfigError(f"{where}: tables.{name}: {strategy}: the grid has no other model than {lender!r}")
            for domain in domains:
                if check_name(lent_name(lender, domain)) in domains:
                    raise ConfigError(
                        f"{where}: {lent_name(lender, domain)!r} is a domain, and what {lender!r} lends is called so; "
                        "give the model another name"
                    )
