"""`t2ray verify` runs the verifier of a task over the right answers of the task, which should all score +1."""

from __future__ import annotations

import argparse
from typing import Any

from t2ray.cli.options import Parser, add_json, add_unsafe_code, at_least_one
from t2ray.cli.output import bar, check_json_folder, console, write_json
from t2ray.config.files import nearest
from t2ray.config.train import load
from t2ray.core import ConfigError
from t2ray.tasks import builtin
from t2ray.tasks.build import build_task
from t2ray.tasks.task import Task
from t2ray.tasks.verifier import Verifier, verify

_ROWS_AT_ONCE = 64


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument("--task", metavar="NAME", help="A built-in task, or a domain of the job that --config names.")
    p.add_argument("--data", metavar="FILE", help="The file of a built-in task's rows, in place of the hub.")
    p.add_argument(
        "--config",
        metavar="CONFIG.yaml",
        help="The file of a training job, to verify a domain of one's own that has a gold column.",
    )
    p.add_argument("--workers", type=int, default=2, metavar="N", help="How many verifier processes run.")
    add_unsafe_code(p)
    add_json(p)


def run(args: argparse.Namespace) -> int:
    """Grades the right answer of every row; returns 1 if one does not score +1."""
    check_json_folder(args.json)
    at_least_one(args, "workers")
    task, code = _task(args)
    rows = task.rows("all")
    result: dict[str, Any] = {"rows": 0, "passed": 0, "failed": []}
    verifier = Verifier(task.reward, workers=args.workers, path=code, unsafe_code=args.unsafe_code)
    with verifier, bar(f"verify {task.name}") as progress:
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            part = verify(task, verifier, rows[first : first + _ROWS_AT_ONCE])
            result["rows"] += part["rows"]
            result["passed"] += part["passed"]
            result["failed"] += [row | {"row": first + row["row"]} for row in part["failed"]]
            progress(result["rows"], len(rows), "")
    result["failed"] = result["failed"][:10]
    console.print(f"{task.name}: {result['passed']} of {result['rows']} right answers score +1")
    for row in result["failed"]:
        score = "none" if row["reward"] is None else f"{row['reward']:+g}"
        console.print(f"  row {row['row']}: {score} for {row['gold'][:100]!r}", markup=False)
    write_json(args.json, result)
    return int(result["passed"] < result["rows"])


def _task(args: argparse.Namespace) -> tuple[Task, str | None]:
    """Returns the task and the folder of its reward function."""
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
