"""`t2ray eval` and `t2ray verify`: accuracy of strategies on tasks, and the verifiers over their right answers.

Not here: how an example is answered and counted (`t2ray.evals.evaluate`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2ray.adapt.strategies import Strategy, fixed
from t2ray.cli.output import bar, console
from t2ray.config.files import nearest
from t2ray.config.train import TrainConfig, load
from t2ray.core import ConfigError, Example, Mixture, ResourceError, SamplingParams
from t2ray.evals.evaluate import Cell, oracle_choice
from t2ray.evals.evaluate import evaluate as measure
from t2ray.tasks import builtin
from t2ray.tasks.build import build_task
from t2ray.tasks.task import Task
from t2ray.tasks.verifier import Verifier
from t2ray.tasks.verifier import verify as verify_golds

if TYPE_CHECKING:
    from t2ray.workbench import Workbench

_VERIFIERS = 2
_ROWS_AT_ONCE = 64


def evaluate(args: argparse.Namespace) -> None:
    """Every task under every strategy: a table on the terminal, and `--json`."""
    from t2ray.workbench import locate, open_workbench

    files, strategies = _tasks(args.tasks), _words(args.strategies, "--strategies")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit is {args.limit}; it must be at least 1")
    _writable(args.json)
    place = locate(args)
    tasks = {name: _task(name, file, place.run) for name, file in files.items()}
    examples = {name: task.examples(args.split, args.limit) for name, task in tasks.items()}
    bench = open_workbench(place, bar)
    plans = {name: _plan(bench, name, strategies, args.generate_label) for name in tasks}
    total = sum(len(plans[name]) * len(examples[name]) for name in tasks)
    results: dict[str, Any] = {}
    with bar("evaluate") as progress:
        done = 0
        for name, task in tasks.items():
            tokens = bench.answer_tokens(args.max_tokens, task.max_tokens)
            code = place.run.code or None if place.run else None
            with Verifier(task.reward, workers=_VERIFIERS, path=code, unsafe_code=args.unsafe_code) as verify:
                asyncio.run(_check(task, examples[name], verify))
                cells = {}
                for key, strategy in plans[name].items():
                    tell = partial(_tell, progress, done, total, f"{name} {key}")
                    cells[key] = asyncio.run(_cell(bench, task, examples[name], strategy, key, verify, tokens, tell))
                    done += len(examples[name])
            results[name] = _result(strategies, cells, bench.experts, tokens)
    console.print(_table(results, strategies), markup=False)
    _save(args.json, {"tasks": results, "model": place.model, "split": args.split, "machine": platform.platform()})


def verify(args: argparse.Namespace) -> int:
    """Grades the right answer of every row; the exit code is 1 where one does not score +1."""
    _writable(args.json)
    if args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}; it must be at least 1")
    task, code = _task_to_verify(args)
    rows = task.rows("all")
    result: dict[str, Any] = {"rows": 0, "passed": 0, "failed": []}
    verifier = Verifier(task.reward, workers=args.workers, path=code, unsafe_code=args.unsafe_code)
    with verifier, bar(f"verify {task.name}") as progress:
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            part = verify_golds(task, verifier, rows[first : first + _ROWS_AT_ONCE])
            result["rows"] += part["rows"]
            result["passed"] += part["passed"]
            result["failed"] += [row | {"row": first + row["row"]} for row in part["failed"]]
            progress(result["rows"], len(rows), "")
    result["failed"] = result["failed"][:10]
    console.print(f"{task.name}: {result['passed']} of {result['rows']} right answers score +1")
    for row in result["failed"]:
        console.print(f"  row {row['row']}: {row['reward']:+g} for {row['gold'][:100]!r}", markup=False)
    _save(args.json, result)
    return int(result["passed"] < result["rows"])


# ------------------------------------------------------------------------------------------------------------- options


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words) or len(set(words)) < len(words):
        raise ConfigError(f"{option} {text!r}: write names separated by commas, each once")
    return words


def _tasks(text: str) -> dict[str, str | None]:
    """`{"gsm8k": "train.jsonl", "math": None}` from `gsm8k=train.jsonl,math`."""
    pairs = [word.partition("=") for word in _words(text, "--tasks")]
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ConfigError(f"--tasks {text!r} names a task twice; name each once")
    for name, equals, file in pairs:
        if equals and not file:
            raise ConfigError(f"--tasks {text!r}: {name}= names no file; write {name}=FILE or {name} alone")
    return {name: file or None for name, _, file in pairs}


def _task(name: str, file: str | None, run: TrainConfig | None) -> Task:
    """A domain of the run, by its name there, or a built-in task."""
    if file is None and run is not None and name in run.domains:
        return build_task(run, name)
    return builtin(name, file)


def _task_to_verify(args: argparse.Namespace) -> tuple[Task, str | None]:
    """The task and the folder of its reward function."""
    if args.config is None:
        if args.task is None:
            raise ConfigError("name a built-in task by --task, or a training job by --config")
        return builtin(args.task, args.data), None
    if args.data is not None:
        raise ConfigError(f"--data {args.data} is for a built-in task; with --config the job names the data")
    config = load(args.config)
    name = args.task or next(iter(config.domains))
    if args.task is None and len(config.domains) > 1:
        raise ConfigError(f"{args.config} has several domains; name one by --task: {', '.join(config.domains)}")
    if name not in config.domains:
        raise ConfigError(f"{args.config} has no domain {name!r}{nearest(name, config.domains)}")
    return build_task(config, name), config.code or None


def _writable(path: str | None) -> None:
    """Refuses a `--json` that cannot be written before anything is computed."""
    if path is not None and Path(path).is_dir():
        raise ConfigError(f"--json {path} is a folder; name a file")
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--json {path}: there is no folder {Path(path).absolute().parent}; make it first")


def _save(path: str | None, result: Mapping[str, Any]) -> None:
    if path is None:
        return
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"cannot write {path} ({error.strerror}); name another file by --json") from None


# ----------------------------------------------------------------------------------------------------------- measuring


def _plan(bench: Workbench, task: str, strategies: Sequence[str], generate_label: bool) -> dict[str, Strategy]:
    """What to run for a task: each strategy once; the oracle is the best of the base and every expert alone.

    Raises:
        ConfigError, UnknownExpert: a strategy that does not exist, or cannot be had here.
    """
    plan: dict[str, Strategy] = {}
    for name in strategies:
        if name == "oracle":
            bench.dispatch_labels(name)
            plan |= {single: fixed(Mixture.parse(single), name=single) for single in ("base", *bench.experts)}
        elif name == "fewshot":
            plan[name] = fixed(bench.mixture(task), name=name)
        else:
            plan[name] = bench.strategy(name, generate_label=generate_label)
    return plan


async def _check(task: Task, examples: Sequence[Example], verify: Verifier) -> None:
    """Grades one right answer, so that a verifier that cannot run says so before the answers are generated."""
    if task.gold is not None:
        await verify([task.gold(examples[0].row)], [examples[0].row])


async def _cell(
    bench: Workbench, task: Task, examples: Sequence[Example], strategy: Strategy, name: str, verify: Verifier,
    tokens: int, progress: Callable[[int], None],
) -> Cell:  # fmt: skip
    labels = bench.dispatch_labels(name) if name in ("prompt", "cls") else ()
    return await measure(
        task.name, examples, strategy, bench.engine.generate, verify, SamplingParams(max_tokens=tokens),
        fits=lambda messages: bench.fits(messages, tokens, labels), progress=progress,
    )  # fmt: skip


def _tell(progress: Callable[[int, int, str], None], before: int, total: int, what: str, done: int) -> None:
    progress(before + done, total, what)


def _result(
    strategies: Sequence[str], cells: Mapping[str, Cell], experts: Sequence[str], tokens: int
) -> dict[str, Any]:
    """A task's row: `{"n": 200, "max_tokens": 24, "oracle": "math", "strategies": {"base": {"acc": ...}, ...}}`."""
    rows = {name: _row(cell) for name, cell in cells.items()}
    n = next(iter(cells.values())).n
    result: dict[str, Any] = {"n": n, "max_tokens": tokens}
    if "oracle" in strategies:
        result["oracle"] = oracle_choice({name: cells[name] for name in ("base", *experts)})
        rows["oracle"] = rows[result["oracle"]]
    return result | {"strategies": rows}


def _row(cell: Cell) -> dict[str, Any]:
    return cell.row() | {
        "truncated": cell.truncated, "too_long": cell.too_long, "labels": dict(cell.labels), "pass1_s": cell.pass1_s,
        "pass2_s": cell.pass2_s,
    }  # fmt: skip


def _table(results: Mapping[str, Any], strategies: Sequence[str]) -> str:
    """Accuracy in % with its 95 % Wilson interval, a line a task; below it what went unanswered."""
    head = ["task", "n", *strategies]
    body, notes = [], []
    for task, result in results.items():
        cells = []
        for name in strategies:
            row = result["strategies"][name]
            low, high = row["ci95"]
            chosen = f" {result['oracle']}" if name == "oracle" else ""
            cells.append(f"{100 * row['acc']:.1f} ({100 * low:.0f}-{100 * high:.0f}){chosen}")
            for key, meaning in (
                ("too_long", "prompts exceed the model's context"),
                ("truncated", "answers were cut off"),
            ):
                if row[key] and name != "oracle":
                    notes.append(
                        f"{task} {name}: {row[key]} of {result['n']} {meaning} (max_tokens {result['max_tokens']})"
                    )
        body.append([task, str(result["n"]), *cells])
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *body]]
    return "\n".join(line.rstrip() for line in [*lines, *notes])
