"""`t2ray tables` trains and measures a grid of models, methods and seeds, and writes its tables.

Not here: what a cell does (`cluster.train.cells`), and what the tables say (`evals.tables`).
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t2ray.cli.options import Parser
from t2ray.cli.output import console
from t2ray.config.tables import BASE, FEWSHOT, TablesConfig, job_of, load, search_of

if TYPE_CHECKING:
    from t2ray.evals.cells import GridCell
    from t2ray.runs.memory import ModelShape

_ROWS = 1000
"""The test prompts of a task, as the estimate of hours takes them where the grid sets no limit."""


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument("config", metavar="CONFIG.yaml", help="The file of the grid.")
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Keys that win over the file's, such as run=second seeds=[0] job.rl.steps=20; `t2ray config tables` lists "
        "every key.",
    )
    p.add_argument(
        "--dry-run", action="store_true", help="Show the cells and the GPU hours that they may take, and end."
    )
    p.add_argument(
        "--write", action="store_true", help="Write the tables of the cells that are there, and make no others."
    )


def run(args: argparse.Namespace) -> int:
    """Makes the cells that are missing, tells of each, and writes the tables; returns 2 if any figure is missing."""
    config = load(args.config, args.overrides)
    local = "://" not in config.out
    config = config.model_copy(update={"out": str(Path(config.out).absolute()) if local else config.out})

    from t2ray.evals.cells import load_cells

    cells = load_cells(config)
    if not args.write:
        from t2ray.cluster.train.lent import check_lenders

        check_lenders(config)
        lacking = [cell for cell in cells if cell.lacks(config)]
        console.print(f"{len(lacking)} of {len(cells)} cells are to be made, in {config.folder}", markup=False)
        if lacking:
            _tell_hours(config, lacking)
    if args.dry_run:
        return 0
    if not args.write:
        from t2ray.cluster.train.cells import make_cells

        cells = make_cells(config, lambda cell: console.print(_line(config, cell), markup=False))
    return write(config, cells)


def write(config: TablesConfig, cells: Sequence[GridCell]) -> int:
    """Writes and prints the tables of cells, as they are; returns 2 if a figure is missing, else 0."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from t2ray.evals.pictures import pictures
    from t2ray.evals.tabled import markdown
    from t2ray.evals.tables import flat, summary
    from t2ray.store import Store

    found, store = summary(config, cells), Store(config.folder)
    drawn = pictures(config, cells, found)
    text = markdown(found, tuple(drawn))
    store.write_text("tables.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    store.write_text("tables.md", text)
    if rows := flat(cells):
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        store.write_bytes("tables.parquet", sink.getvalue())
    for name, svg in drawn.items():
        store.write_text(name, svg)
    console.print(text, markup=False)
    console.print(f"{config.folder}/tables.md (also .json, .parquet, and pictures as .svg)", markup=False)
    return 2 if found["missing"] else 0


def _line(config: TablesConfig, cell: GridCell) -> str:
    """Returns what became of a cell: `tiny.svf.0: math 0.930 (base 0.036); 41 s`, and what it lacks."""
    trained = [f"{name} {one['validation']:.3f} (base {one['base']:.3f})" for name, one in cell.trained.items()]
    lacks = [f"no {'/'.join(key)}: {cell.missing.get('/'.join(key), 'cut off')}" for key in cell.lacks(config)]
    return f"{cell.name}: {'; '.join([*trained, f'{cell.seconds:.0f} s', *lacks])}"


def _tell_hours(config: TablesConfig, cells: Sequence[GridCell]) -> None:
    """Prints how many GPU hours the cells may take, by model, where they take GPUs."""
    job = job_of(config, next(iter(config.models)), next(iter(config.methods)), 0)
    if not job.gpus:
        return
    from t2ray.runs.hours import GPU, PROMPT
    from t2ray.runs.memory import shape_of

    total = 0.0
    for model, ref in config.models.items():
        shape = shape_of(ref)
        hours = job.gpus * sum(_hours(config, cell, shape) for cell in cells if cell.model == model)
        total += hours
        console.print(
            f"{model}: {shape.parameters:,} parameters, {job.gpus:g} GPUs a cell, about {hours:,.0f} GPU hours",
            markup=False,
        )
    rows = "" if config.limit else f", {_ROWS:,} test prompts of each task"
    console.print(
        f"about {total:,.0f} hours of an {GPU} in all, for prompts of {PROMPT} tokens{rows} and answers of the "
        "greatest length; real ones are shorter",
        markup=False,
    )


def _hours(config: TablesConfig, cell: GridCell, shape: ModelShape) -> float:
    """Returns the hours of one cell on one GPU: its trainings, its searches, its answers."""
    from t2ray.runs.hours import answering_hours, training_hours
    from t2ray.tasks import builtin

    job = job_of(config, cell.model, cell.method if cell.method != BASE else next(iter(config.methods)), cell.seed)
    hours = 0.0
    longest = max((domain.max_tokens or job.rl.max_tokens or 512 for domain in job.domains.values()), default=512)
    if cell.method != BASE:
        for rl in job.domain_settings.values():
            asked = rl.max_tokens or longest
            hours += training_hours(shape, steps=rl.steps, rollouts=rl.prompts * rl.samples, tokens=asked)
    for task, strategy in cell.lacks(config):
        prompts, named = config.limit or _ROWS, config.unseen.get(task)
        tokens = builtin(named.task or task).max_tokens if named else longest
        if strategy.startswith(FEWSHOT):
            shots, search = search_of(config, strategy)
            prompts += shots * search.population * search.iterations
        hours += answering_hours(shape, prompts=prompts, tokens=tokens)
    return hours
