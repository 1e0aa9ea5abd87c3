"""`t2ray eval` measures the accuracy of strategies on tasks.

Not here: how an example is answered and counted (`t2ray.evals.evaluate`).
"""

from __future__ import annotations

import argparse
import asyncio
import platform
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from t2ray.adapt.strategies import Strategy, fixed
from t2ray.cli.options import Parser, add_job, add_json, add_model, add_unsafe_code, at_least_one, locate
from t2ray.cli.output import bar, check_json_folder, console, write_json, write_whole
from t2ray.config.train import TrainConfig
from t2ray.core import ConfigError, Example, Generate, Mixture, SamplingParams
from t2ray.tasks.build import task_named
from t2ray.tasks.table import kind_of
from t2ray.tasks.task import Task
from t2ray.tasks.verifier import Verifier

if TYPE_CHECKING:
    from t2ray.evals.answers import Answered
    from t2ray.evals.evaluate import Cell
    from t2ray.workbench import Workbench

_VERIFIERS = 2


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument(
        "--tasks",
        required=True,
        metavar="NAMES",
        help="Built-in tasks or domains of the run, separated by commas. NAME=FILE asks the rows of that file, which "
        "has the columns of the task or the domain; NAME=FOLDER is a domain of another run.",
    )
    p.add_argument(
        "--strategies",
        default="base",
        metavar="NAMES",
        help="What answers, separated by commas: base, oracle, prompt, cls, soft or soft/T (every expert with its "
        "label's probability as its weight, at temperature T), fewshot (the mixture that has the task's name), "
        "fewshot/NAME, or the name of an expert.",
    )
    p.add_argument(
        "--against",
        metavar="NAME",
        help="One of the strategies, with which the others are compared example by example: the difference in points, "
        "its interval, and p of a paired test.",
    )
    p.add_argument(
        "--split",
        default="test",
        choices=["train", "validation", "test", "all"],
        help="Which of a task's rows are asked.",
    )
    p.add_argument("--limit", type=int, metavar="N", help="How many prompts per task. Default: all of them.")
    p.add_argument(
        "--max-tokens", type=int, metavar="N", help="The greatest number of tokens per answer. Default: the task's own."
    )
    p.add_argument(
        "--generate-label",
        action="store_true",
        help="Let pass 1 write the label, as in the paper, instead of scoring all labels.",
    )
    p.add_argument(
        "--engine",
        default="auto",
        choices=["auto", "transformers", "vllm"],
        help="What computes. vllm has to be installed; auto is vllm on a GPU where it is and fits, else transformers. "
        "Default: auto.",
    )
    _add_form(p)
    add_unsafe_code(p)
    add_json(p)
    add_job(p)
    add_model(p)


def _add_form(p: Parser) -> None:
    """Adds the options of how the prompts and answers look."""
    p.add_argument(
        "--form",
        default="generated",
        choices=["generated", "scored"],
        help="How multiple choice is answered: in words, which the verifier reads, or by the likeliest of the choices.",
    )
    p.add_argument(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="Shuffle the choices of multiple choice by this seed. Default: the order of the file.",
    )
    p.add_argument(
        "--shots",
        type=int,
        default=0,
        metavar="K",
        help="How many solved rows of the training split stand before each prompt. Default: 0.",
    )
    p.add_argument("--shots-seed", type=int, default=0, metavar="S", help="Which rows those are. Default: 0.")
    p.add_argument(
        "--answers",
        metavar="FILE.parquet",
        help="File that receives every answer: prompt, completion, reading, gold, reward.",
    )


def run(args: argparse.Namespace) -> None:
    """Measures every task under every strategy; prints a table, and writes the figures to the file of `--json`."""
    files, strategies = _tasks(args.tasks), _words(args.strategies, "--strategies")
    at_least_one(args, "limit")
    if args.shots < 0:
        raise ConfigError(f"--shots {args.shots}: give a number of solved rows, at least 0")
    if args.against is not None and (args.against not in strategies or args.against == "oracle"):
        raise ConfigError(f"--against {args.against!r}: name one of the strategies but the oracle: {args.strategies}")
    check_json_folder(args.json)
    check_json_folder(args.answers, "--answers")

    from t2ray.evals.answers import Baseline, parquet
    from t2ray.evals.measured import result_of, table
    from t2ray.workbench import open_workbench

    place = locate(args)
    found = {name: _task(name, named, place.run) for name, named in files.items()}
    examples = {name: _examples(task, args) for name, (task, _) in found.items()}
    bench = open_workbench(place, bar, args.engine)
    plans = {name: _plan(bench, name, strategies, args.generate_label) for name in found}
    total = sum(len(plans[name]) * len(examples[name]) for name in found)
    results: dict[str, Any] = {}
    kept: list[Answered] = []
    with bar("evaluate") as progress:
        done = 0
        for name, (task, code) in found.items():
            sampling = bench.sampling(args.max_tokens, task)
            with Verifier(
                task.reward, workers=_VERIFIERS, path=code, unsafe_code=args.unsafe_code,
                success_above=task.success_above,
            ) as verify:  # fmt: skip
                asyncio.run(_check(task, examples[name], verify))
                cells = {}
                for key, strategy in plans[name].items():
                    tell = partial(_tell, progress, done, total, f"{name} {key}")
                    keep = kept if args.answers else None
                    job = _cell(bench, task, examples[name], strategy, key, verify, sampling, args.form, keep, tell)
                    cells[key] = asyncio.run(job)
                    done += len(examples[name])
            unseen = args.split != "test" or task.test_is_unseen
            baseline = Baseline.of(task.gold_readings(examples[name]), task.options(examples[name]))
            limit = sampling.max_tokens
            results[name] = result_of(
                task.name, strategies, cells, baseline, bench.experts, limit, unseen, args.against
            )
    console.print(table(results, strategies), markup=False)
    if args.answers:
        write_whole(args.answers, parquet(kept), "--answers")
    write_json(args.json, {"tasks": results, "model": place.model, "split": args.split, "machine": platform.platform()})


# ------------------------------------------------------------------------------------------------------------- options


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words) or len(set(words)) < len(words):
        raise ConfigError(f"{option} {text!r}: write names separated by commas, each once")
    return words


def _tasks(text: str) -> dict[str, str | None]:
    """Returns `{"gsm8k": "train.jsonl", "math": None}` for `gsm8k=train.jsonl,math`."""
    pairs = [word.partition("=") for word in _words(text, "--tasks")]
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ConfigError(f"--tasks {text!r} names a task twice; name each once")
    for name, equals, file in pairs:
        if equals and not file:
            raise ConfigError(f"--tasks {text!r}: {name}= names no file; write {name}=FILE or {name} alone")
    return {name: file or None for name, _, file in pairs}


def _task(name: str, named: str | None, run: TrainConfig | None) -> tuple[Task, str | None]:
    """Returns a task and the folder of its reward; `named` are its rows, or another run that it is a domain of."""
    from t2ray.runs.folder import read_run
    from t2ray.store import Store
    from t2ray.training.domain import CONFIG

    if named is not None and not kind_of(named) and Store(named).exists(CONFIG):
        run, named = read_run(named), None
    return task_named(name, run, named), (run.code or None if run else None)


# ----------------------------------------------------------------------------------------------------------- measuring


def _plan(bench: Workbench, task: str, strategies: Sequence[str], generate_label: bool) -> dict[str, Strategy]:
    """Returns what to run for a task: each strategy once. The oracle needs the base and every expert alone.

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


def _examples(task: Task, args: argparse.Namespace) -> list[Example]:
    """Returns what a task is asked, with the choices in the order that was asked for.

    Raises:
        ConfigError: the task has no choices to score.
    """
    if args.form == "scored" and task.choices is None:
        raise ConfigError(f"--form scored: {task.name} is no multiple choice; leave out the task or the option")
    task = task.with_shots(args.shots, args.shots_seed) if args.shots else task
    examples = task.examples(args.split, args.limit)
    if args.shuffle is None:
        return examples
    return [task.shuffled(example, f"{args.shuffle}/{example.id}") for example in examples]


async def _check(task: Task, examples: Sequence[Example], verify: Verifier) -> None:
    """Grades one right answer, so that a verifier that cannot run says so before the answers are generated."""
    if task.gold is not None:
        await verify([task.gold(examples[0].row)], [examples[0].row])


async def _cell(
    bench: Workbench, task: Task, examples: Sequence[Example], strategy: Strategy, name: str, verify: Verifier,
    sampling: SamplingParams, form: str, keep: list[Answered] | None, progress: Callable[[int], None],
) -> Cell:  # fmt: skip
    from t2ray.evals.answers import Answers, choosing
    from t2ray.evals.evaluate import evaluate

    least = 1 if sampling.to_end else sampling.max_tokens
    generate: Generate = bench.engine.generate
    if form == "scored":
        assert task.choices is not None, task
        generate = choosing(bench.engine.score, {x.messages: tuple(task.choices(x.row)) for x in examples})
    answers = Answers(task.name, name, task.reading, task.gold, keep=keep is not None)
    cell = await evaluate(
        task.name, examples, strategy, generate, verify, sampling,
        fits=lambda messages: bench.engine.fits(messages, least), batch_tokens=bench.batch_tokens, answers=answers,
        progress=progress,
    )  # fmt: skip
    if keep is not None:
        order = {example.id: i for i, example in enumerate(examples)}
        keep += sorted(answers.rows, key=lambda answer: order[answer.id])
    return cell


def _tell(progress: Callable[[int, int, str], None], before: int, total: int, what: str, done: int) -> None:
    progress(before + done, total, what)
