"""`t2ray dispatch` measures how well pass 1 names the kinds of requests.

Not here: the figures (`t2ray.evals.dispatched`), and what an expert answers (`t2ray eval`).
"""

from __future__ import annotations

import argparse
import asyncio
import platform
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from t2ray.cli.options import Parser, add_job, add_json, add_model, at_least_one
from t2ray.cli.output import check_json_folder, console, write_json, write_whole
from t2ray.config.train import TrainConfig
from t2ray.core import ConfigError, DataError, Message, user
from t2ray.tasks import BUILTIN
from t2ray.tasks.build import task_named

if TYPE_CHECKING:
    from t2ray.evals.dispatched import Labelled


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument(
        "--tasks",
        metavar="NAMES",
        help="Built-in tasks or domains of the run, separated by commas, whose prompts are named; each has its own "
        "name as its right label, or LABEL in NAME:LABEL. Default: none with --rows; else the prompts of the run's "
        "classification domain, or the tasks with the labels' names.",
    )
    p.add_argument(
        "--rows",
        metavar="FILE",
        help="Labelled requests, alone or beside those of --tasks: a file with the columns prompt, label (several "
        "right ones as a|b) and group.",
    )
    p.add_argument(
        "--strategies",
        metavar="NAMES",
        help="Which strategies: prompt, cls, or both. Default: both, or prompt without a classification expert.",
    )
    p.add_argument(
        "--split", default="test", choices=["train", "validation", "test", "all"], help="Which of a task's rows."
    )
    p.add_argument("--limit", type=int, metavar="N", help="How many prompts per task. Default: all of them.")
    p.add_argument(
        "--orders", type=int, default=4, metavar="N", help="In how many random orders the labels are shown again."
    )
    p.add_argument(
        "--names",
        nargs="+",
        default=[],
        metavar="LABEL=NAME,...",
        help="Other names under which labels are shown again; each word is another way to ask.",
    )
    p.add_argument("--picture", metavar="FILE.svg", help="Also draw how often pass 1 is right, by how sure it is.")
    add_json(p)
    add_job(p)
    add_model(p)


def run(args: argparse.Namespace) -> None:
    """Names every request by every strategy, in every way; prints tables, and writes the figures and the picture."""
    at_least_one(args, "limit")
    check_json_folder(args.json)
    check_json_folder(args.picture, "--picture")
    strategies = args.strategies.split(",") if args.strategies else ["prompt", "cls"]
    names = {words: dict(_pair(word) for word in words.split(",")) for words in args.names}
    if unknown := {*strategies} - {"prompt", "cls"}:
        raise ConfigError(f"--strategies {args.strategies!r}: {', '.join(sorted(unknown))} is not prompt or cls")
    if args.orders < 0:
        raise ConfigError(f"--orders {args.orders}: give a number of orders, at least 0")

    from t2ray.adapt.strategies import Strategy, classify
    from t2ray.config.files import expanded
    from t2ray.evals.dispatched import changed, figures, name_all, told, variants
    from t2ray.workbench import open_workbench, place_or_shipped

    place = place_or_shipped(*(word and expanded(word) for word in (args.run, args.model, args.factors, args.experts)))
    bench = open_workbench(place)
    if not args.strategies and not bench.classifiers:
        strategies.remove("cls")
    found: dict[str, dict[str, Any]] = {}
    rows = _rows(args, bench.dispatch_labels(strategies[0]), place.run)
    for strategy in strategies:
        labels, mixture = bench.classifying(strategy)

        def of(shown: tuple[str, ...], strategy: str = strategy, mixture: Any = mixture) -> Strategy:
            return classify(bench.engine.score, shown, mixture, name=strategy)

        own = asyncio.run(name_all(of(labels), rows))
        other = asyncio.run(changed(of, rows, own, variants(labels, args.orders, names)))
        found[strategy] = figures(rows, own) | {"labels": labels, "asked": other}
    report = {"model": place.model, "machine": platform.platform(), "strategies": found}
    console.print(told(report), markup=False)
    write_json(args.json, report)
    if args.picture:
        from t2ray.evals.plots import by_itself, reliability

        picture = by_itself(reliability({name: one["bins"] for name, one in found.items()}))
        write_whole(args.picture, picture.encode(), "--picture")


def _pair(word: str) -> tuple[str, str]:
    label, equals, name = word.partition("=")
    if not (label and equals and name):
        raise ConfigError(f"--names: {word!r} is not LABEL=NAME, such as math=sums")
    return label, name


def _rows(args: argparse.Namespace, labels: Sequence[str], run: TrainConfig | None) -> list[Labelled]:
    """Returns the labelled requests of the tasks and of the file.

    Raises:
        ConfigError: a label that pass 1 does not choose from, or one without a task of its name where nothing is named.
        DataError: the file lacks a column.
    """
    from t2ray.evals.dispatched import Labelled
    from t2ray.tasks.files import read

    found: list[Labelled] = []
    domains = run.domains if run is not None else {}
    classifier = next((name for name, domain in domains.items() if domain.others is not None), None)
    if args.tasks is None and args.rows is None and classifier is not None:
        for row in task_named(classifier, run).rows(args.split):
            messages = tuple(Message(**message) for message in row["messages"])
            found.append(Labelled(messages=messages, labels=(row["label"],), group=row["label"]))
        shown = {label: [row for row in found if row.group == label][: args.limit] for label in labels}
        found = [row for rows in shown.values() for row in rows]
    else:
        for word in _words(args, labels, {*domains, *BUILTIN}):
            name, _, label = word.strip().partition(":")
            examples = task_named(name, run).examples(args.split, args.limit)
            found += [Labelled(messages=x.messages, labels=(label or name,), group=name) for x in examples]
    if args.rows:
        table = read(args.rows).need({"prompt": str, "label": str, "group": str})
        found += [
            Labelled(messages=user(row["prompt"]), labels=tuple(row["label"].split("|")), group=row["group"])
            for row in table.rows
        ]
    if unknown := {label for row in found for label in row.labels} - {*labels}:
        raise ConfigError(f"{', '.join(sorted(unknown))}: no label of pass 1; it chooses from {', '.join(labels)}")
    if not found:
        raise DataError("there are no requests to name; name tasks by --tasks or a file by --rows")
    return found


def _words(args: argparse.Namespace, labels: Sequence[str], known: Collection[str]) -> Sequence[str]:
    """Returns the tasks to ask, as `--tasks` names them; where nothing is named, those with the labels' names."""
    tasks: str | None = args.tasks
    if tasks is not None:
        return tasks.split(",")
    if args.rows is not None:
        return ()
    if unknown := [label for label in labels if label not in known]:
        raise ConfigError(
            f"no task is called {', '.join(unknown)}: name labelled requests by --tasks TASK:LABEL,... or --rows FILE"
        )
    return labels
