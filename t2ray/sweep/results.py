"""The results of a sweep: its trials, its winner, a table, and `best.yaml`.

`trials.json` in the sweep's folder is the whole state of a sweep, from which one that was killed can go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from t2ray.config.files import dump_yaml, portable
from t2ray.config.search import SweepConfig, job_at, laid_over, value_at
from t2ray.core import RunError
from t2ray.store import Store
from t2ray.sweep.space import Point, trial_id

CONFIG, TRIALS, BEST = "sweep.json", "trials.json", "best.yaml"
_REMEDY = "put back a copy of it, or sweep again under another run=NAME"
Status = Literal["waiting", "running", "done", "stopped", "failed"]
ReportScore = Callable[[int, float], None]
"""What a running trial calls with its step and its score so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One trial: `Trial(point={"rl.lr": 0.01}, seed=0, status="done", score=0.83, step=30, seconds=41.0)`.

    `score` is the greedy validation accuracy (kind rl) or the accuracy on held-out prompts (kind cem), a mean over
    domains or tasks. `history` has (step, score) of each report. `final` says that it is a finalist on a further seed.
    A stopped trial fell behind; a failed one has an `error`.
    """

    point: Point
    seed: int
    final: bool = False
    status: Status = "waiting"
    score: float | None = None
    step: int = 0
    seconds: float = 0.0
    error: str | None = None
    history: tuple[tuple[int, float], ...] = field(default=())

    @property
    def id(self) -> str:
        return trial_id(self.point, self.seed)

    @property
    def settled(self) -> bool:
        return self.status in ("done", "stopped")


# --------------------------------------------------------------------------------------------------------------- state


def open_sweep(config: SweepConfig, *, resume: bool) -> dict[str, Trial]:
    """Returns the trials of a sweep so far, by id; of a new sweep, none.

    Raises:
        RunError: the sweep exists and `resume` is False, or it was started with another configuration.
    """
    store = Store(f"{config.out}/{config.run}")
    if not store.exists(CONFIG):
        return {}
    if not resume:
        raise RunError(
            f"sweep {config.run!r} exists in {store.uri}; go on with it by --resume, or choose another run=NAME"
        )
    before, now = portable(_read(store, CONFIG)), portable(config.model_dump(mode="json"))
    free = ("out", "at_once", "cpus", "gpus")
    differing = [key for key in now if key not in free and before.get(key) != now[key]]
    if differing:
        raise RunError(
            f"sweep {config.run!r} was started with another {differing[0]}: {json.dumps(before.get(differing[0]))}, "
            f"now {json.dumps(now[differing[0]])}; use another run=NAME"
        )
    try:
        trials = [Trial(**row | {"history": tuple(map(tuple, row["history"]))}) for row in read_rows(store)]
    except (TypeError, KeyError) as error:
        raise RunError(f"{store.uri}/{TRIALS} is damaged ({error}); {_REMEDY}") from None
    # a trial that was running or had failed is tried again, from its checkpoints if it has some
    trials = [t if t.settled else replace(t, status="waiting", error=None) for t in trials]
    return {trial.id: trial for trial in trials}


def read_rows(store: Store) -> list[dict[str, Any]]:
    """The trials in a sweep's folder, as they were written.

    Raises:
        RunError: `trials.json` is damaged.
    """
    rows = _read(store, TRIALS) if store.exists(TRIALS) else []
    if not isinstance(rows, list) or any(
        not isinstance(row, dict) or not {"point", "seed", "status", "score", "error"} <= row.keys() for row in rows
    ):
        raise RunError(f"{store.uri}/{TRIALS} is damaged; {_REMEDY}")
    return rows


def _read(store: Store, name: str) -> Any:
    try:
        return json.loads(store.read_bytes(name))
    except ValueError as error:
        raise RunError(f"{store.uri}/{name} is damaged ({error}); {_REMEDY}") from None


def save(config: SweepConfig, trials: Mapping[str, Trial]) -> None:
    """Writes the trials to `trials.json`."""
    rows = [asdict(trial) for trial in trials.values()]
    Store(f"{config.out}/{config.run}").write_text(TRIALS, json.dumps(rows))


def start(config: SweepConfig) -> None:
    """Writes the sweep's configuration; with it the sweep exists."""
    Store(f"{config.out}/{config.run}").write_text(CONFIG, config.model_dump_json(indent=1))


# ------------------------------------------------------------------------------------------------------------- winners


def finalists(trials: Sequence[Trial], count: int) -> list[Point]:
    """Returns the points of the best `count` trials of the search that ran to their end.

    Raises:
        RunError: no trial ran to its end.
    """
    ended = [trial for trial in trials if not trial.final and trial.status == "done" and trial.score is not None]
    if not ended:
        errors = sorted({trial.error for trial in trials if trial.error})
        raise RunError(f"no trial ran to its end; {errors[0] if errors else 'all were stopped'}")
    ended.sort(key=lambda trial: -(trial.score or 0.0))
    return [trial.point for trial in ended[:count]]


def standings(trials: Sequence[Trial]) -> list[tuple[Point, list[float]]]:
    """Returns the finalists' points with their scores on the further seeds alone, best mean first.

    The score that made a trial a finalist does not count, because it was the luckiest of many. A point is left out if
    it did not run to its end on all further seeds.
    """
    scores: dict[str, tuple[Point, list[Trial]]] = {}
    for trial in trials:
        if trial.final:
            scores.setdefault(trial_id(trial.point, 0), (trial.point, []))[1].append(trial)
    whole = [
        (point, [t.score for t in runs if t.score is not None])
        for point, runs in scores.values()
        if all(t.status == "done" and t.score is not None for t in runs)
    ]
    return sorted(whole, key=lambda row: (-fmean(row[1]), -min(row[1])))


# --------------------------------------------------------------------------------------------------------------- files


def write_results(config: SweepConfig, trials: Sequence[Trial]) -> Point:
    """Writes `results.parquet`, `results.md` and `best.yaml` into the sweep's folder; returns the winning point.

    Raises:
        RunError: no finalist ran to its end on all of its seeds.
    """
    ranked = standings(trials)
    if not ranked:
        error = next((trial.error for trial in trials if trial.final and trial.error), "none of them ran")
        raise RunError(f"no finalist ran to its end on {config.seeds} further seeds; {error}; go on with --resume")
    store = Store(f"{config.out}/{config.run}")
    sink = pa.BufferOutputStream()
    pq.write_table(table(config, trials), sink)
    store.write_bytes("results.parquet", bytes(sink.getvalue()))
    store.write_text("results.md", markdown(config, trials, ranked))
    store.write_text(BEST, best_yaml(config, *ranked[0]))
    return ranked[0][0]


def keys(config: SweepConfig) -> list[str]:
    """Returns the settings that tables show: those that were swept, and of a training job `rl.kl` and `rl.lr`."""
    return list(dict.fromkeys([*config.space, *(("rl.kl", "rl.lr") if config.kind == "rl" else ())]))


def table(config: SweepConfig, trials: Sequence[Trial]) -> pa.Table:
    """Returns a table with one row per trial and one column per setting."""
    columns: dict[str, list[Any]] = {
        "trial": [t.id for t in trials], "stage": ["final" if t.final else "search" for t in trials],
        "seed": [t.seed for t in trials], "status": [t.status for t in trials],
        "score": [t.score for t in trials], "step": [t.step for t in trials],
        "seconds": [t.seconds for t in trials], "error": [t.error for t in trials],
    }  # fmt: skip
    jobs = [job_at(config, trial.point) for trial in trials]
    for key in keys(config):
        values = [value_at(job, key) for job in jobs]
        # Other values, such as targets, become JSON; a number that the job leaves open is none.
        plain = {type(value) for value in values} <= {int, float, type(None)} and any(v is not None for v in values)
        columns[key] = [None if v is None else float(v) for v in values] if plain else [json.dumps(v) for v in values]
    return pa.table(columns)


def markdown(config: SweepConfig, trials: Sequence[Trial], ranked: Sequence[tuple[Point, list[float]]]) -> str:
    """Returns the tables of the finalists and of all trials as Markdown, best first."""
    names = keys(config)

    def row(cells: Sequence[Any]) -> str:
        return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"

    def head(cells: Sequence[str]) -> list[str]:
        return [row(cells), row(["---"] * len(cells))]

    def settings(point: Point) -> list[str]:
        job = job_at(config, point)
        return [_short(value_at(job, key)) for key in names]

    lines = [f"# Sweep {config.run}", "", f"{config.kind}, {config.sampler}, {len(trials)} trials.", ""]
    lines += ["## Finalists", "", f"Mean over {config.seeds} further seeds, which the search had not seen.", ""]
    lines += head([*names, "mean", "lowest", "highest"])
    lines += [
        row([*settings(point), *(f"{x:.4f}" for x in (fmean(scores), min(scores), max(scores)))])
        for point, scores in ranked
    ]
    lines += ["", "## Trials", "", *head(["trial", "stage", "seed", *names, "status", "score", "step", "seconds"])]
    for t in sorted(trials, key=lambda t: (t.final, t.status != "done", -(t.score or 0.0))):
        score = None if t.score is None else f"{t.score:.4f}"
        stage = "final" if t.final else "search"
        lines.append(row([t.id, stage, t.seed, *settings(t.point), t.status, score, t.step, f"{t.seconds:.1f}"]))
    lines += ["", *(f"{t.id} failed: {t.error}" for t in trials if t.error)]
    return "\n".join(lines).rstrip() + "\n"


def best_yaml(config: SweepConfig, point: Point, scores: Sequence[float]) -> str:
    """Returns the winner as a YAML file for `t2ray train` (kind rl) or `t2ray adapt --config` (kind cem)."""
    head = (
        f"# The winner of sweep {config.run}: {fmean(scores):.4f} over {len(scores)} further seeds "
        f"({', '.join(f'{score:.4f}' for score in scores)}).\n"
    )
    if config.kind == "rl":
        values = laid_over(config.job, point)
        return head + _dump(values | {"run": f"{config.run}-best"})
    job = job_at(config, point)
    values = {key: value_at(job, key) for key in ("shots", "per_layer", "only", "max_tokens")}
    settings = {k: v for k, v in value_at(job, "settings").items() if v is not None}
    run = {key: value_at(job, key) for key in ("run", "model", "factors", "experts")}
    given = {key: value for key, value in (values | run).items() if value is not None}
    tasks = config.job.get("tasks", [])
    task = tasks if isinstance(tasks, str) else tasks[0]
    return head + _dump(given | {"task": task, "name": f"{config.run}-best", "settings": settings})


def _dump(values: Mapping[str, Any]) -> str:
    return dump_yaml(portable(values))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value).replace("|", "\\|")
