"""`t2ray adapt` searches a mixture of experts for a few labelled prompts, and saves it in the registry.

Not here: the search (`t2ray.adapt`).
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from t2ray.adapt.strategies import FEWSHOT
from t2ray.cli.options import Parser, add_job, add_model, add_unsafe_code, at_least_one, locate
from t2ray.cli.output import bar, console, weight_bars
from t2ray.config.domain import DomainConfig
from t2ray.config.files import nearest, override, validate
from t2ray.config.search import CEMConfig
from t2ray.config.train import TrainConfig
from t2ray.core import ConfigError, DataError, Example, SamplingParams, UnknownExpert, check_name
from t2ray.tasks.build import task_named
from t2ray.tasks.data import own
from t2ray.tasks.files import is_file_like, read
from t2ray.tasks.task import Task
from t2ray.tasks.verifier import Verifier

if TYPE_CHECKING:
    from t2ray.adapt.cem import Round
    from t2ray.adapt.fewshot import FewShotResult
    from t2ray.workbench import Workbench

_VERIFIERS = 2


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument(
        "--task",
        required=True,
        metavar="FILE|TASK",
        help="A file of rows, a domain of the run, or a built-in task.",
    )
    p.add_argument("--name", required=True, metavar="NAME", help="The name of the mixture in the registry.")
    p.add_argument("--data", metavar="FILE", help="A file of rows for the task or the domain, in place of its own.")
    p.add_argument(
        "--prompt",
        metavar="TEMPLATE",
        help="For a file: a template of its columns, or the name of a column of messages. "
        'Default: the column "prompt", else "messages".',
    )
    p.add_argument(
        "--reward",
        metavar="MODULE:FUNCTION",
        help="For a file: the reward function. Default: +1 for an answer that equals the column of --gold.",
    )
    p.add_argument(
        "--gold",
        metavar="COLUMN",
        help='For a file: the column of the right answers. Default: "answer", else what messages end with.',
    )
    p.add_argument("--shots", type=int, default=10, metavar="K", help="How many labelled prompts are used.")
    p.add_argument(
        "--per-layer", action="store_true", help="Search a weight for each expert and layer, and not for each expert."
    )
    p.add_argument(
        "--only",
        metavar="NAMES",
        help="The experts to mix, separated by commas. Default: all but the classification expert.",
    )
    p.add_argument(
        "--max-tokens", type=int, metavar="N", help="The greatest number of tokens per answer. Default: the task's own."
    )
    add_unsafe_code(p)
    p.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="Settings of the search, such as population=16 or budget_s=60; `t2ray config adapt` lists them.",
    )
    add_job(p)
    add_model(p)


def run(args: argparse.Namespace) -> None:
    """Searches a mixture, draws its weights as bars, and saves it."""
    check_name(args.name, "mixture")
    settings = settings_of(args)
    at_least_one(args, "shots")

    from t2ray.workbench import open_workbench

    place = locate(args)
    task, examples, code = _labelled(args, place.run)
    bench = open_workbench(place, bar)
    experts = _experts(bench, args.only)
    sampling = bench.sampling(args.max_tokens, task)
    _check_lengths(bench, replace(task, max_tokens=sampling.max_tokens, to_end=sampling.to_end), examples)
    console.print(
        f"{len(examples)} labelled prompts, experts {', '.join(experts)}, population {settings.population}, "
        f"at most {settings.iterations} rounds"
    )
    with Verifier(task.reward, workers=_VERIFIERS, path=code, unsafe_code=args.unsafe_code) as verify:
        result = asyncio.run(
            _search(bench, task, examples, experts, verify, settings, sampling, per_layer=args.per_layer)
        )
    if not result.accuracy:
        answer = asyncio.run(bench.engine.generate(examples[0].messages, result.mixture, sampling)).text
        right = f", and the right answer {task.gold(examples[0].row)!r}" if task.gold else ""
        console.print(f"the first prompt's answer is {answer[:200]!r}{right}", markup=False)
    result.check()
    last = result.history[-1]
    meta = {
        "task": args.task, "data": args.data, "shots": len(examples), "experts": list(experts),
        "accuracy": result.accuracy, "log_likelihood": result.log_likelihood, "rounds": len(result.history),
        "prompts": last.prompts, "seconds": last.seconds, "per_layer": args.per_layer,
        "max_tokens": sampling.max_tokens, "base_digest": bench.engine.base_digest,
        "settings": settings.model_dump(),
    }  # fmt: skip
    registry = bench.place.registry()
    registry.save_mixture(args.name, result.mixture, meta)
    console.print(
        f"accuracy {result.accuracy:.3f} on the {len(examples)} prompts, after {len(result.history)} rounds, "
        f"{last.prompts} answers, {last.seconds:.1f} s"
    )
    console.print(weight_bars(result.mixture, experts), markup=False)
    console.print(f"saved in {registry.store.uri}; use it by --strategy {FEWSHOT}{args.name}", markup=False)


def _check_lengths(bench: Workbench, task: Task, examples: list[Example]) -> None:
    """Raises DataError for prompts that are too long, by the rule of training and evaluation."""
    from t2ray.tasks.fits import long_prompts

    split = examples[0].id.split("/")[-2]
    chat = bench.engine.chat
    long = long_prompts(task, lambda turns: len(chat.ids(tuple(turns))), bench.engine.context, {split: len(examples)})
    if long is not None:
        raise DataError(f"{long.text}; shorten them, lower --max-tokens, or take others")


def settings_of(args: argparse.Namespace) -> CEMConfig:
    """Returns the settings of the search, which the key=value words give.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    return validate(CEMConfig, override({}, args.settings), where="settings of the search")


def _labelled(args: argparse.Namespace, run: TrainConfig | None) -> tuple[Task, list[Example], str]:
    """Returns the task, its first `--shots` labelled prompts, and the folder of its reward function.

    They are any rows of a file, and training rows of a built-in task or of a domain of the run.
    """
    here = str(Path.cwd())
    if not is_file_like(args.task) and not Path(args.task).exists():
        task = task_named(args.task, run, args.data)
        return task, task.examples("train", args.shots), (run.code if run else "") or here
    if args.data is not None:
        raise ConfigError(
            f"--data {args.data} is for a built-in task or a domain of the run; --task {args.task} is a file already"
        )
    columns = read(args.task).columns
    prompt = args.prompt or ("messages" if "prompt" not in columns and "messages" in columns else "{prompt}")
    # what messages end with is the right answer, where there is no column of that name
    gold = args.gold or ("answer" if "answer" in columns or "{" in prompt else None)
    domain = DomainConfig(data=args.task, prompt=prompt, gold=gold, reward=args.reward or "t2ray.tasks.equal:reward")
    task = own("task", domain, here)
    if (right := task.gold) is None:
        raise ConfigError(f"{args.task} has no right answers; name their column by --gold COLUMN")
    if args.reward is None:
        rows = [{**row, "answer": right(row)} for row in task.rows("all")]
        task = replace(task, rows=lambda split: rows)
    return task, task.examples("all", args.shots), here


def _experts(bench: Workbench, only: str | None) -> tuple[str, ...]:
    bench.dispatch_labels("fewshot")  # there must be some
    if only is None:
        return bench.experts
    names = tuple(name.strip() for name in only.split(","))
    for name in names:
        if name not in bench.engine.experts:
            raise UnknownExpert(f"--only {only!r}: no expert {name!r}{nearest(name, bench.engine.experts)}")
    return names


async def _search(
    bench: Workbench,
    task: Task,
    examples: Sequence[Example],
    experts: Sequence[str],
    verify: Verifier,
    settings: CEMConfig,
    sampling: SamplingParams,
    *,
    per_layer: bool,
) -> FewShotResult:
    from t2ray.adapt.fewshot import fewshot

    engine, rounds = bench.engine, settings.iterations
    if settings.budget_prompts is not None:
        rounds = min(rounds, max(1, settings.budget_prompts // (settings.population * len(examples))))
    with bar("search") as progress:

        def tell(done: Round) -> None:
            progress(done.iteration + 1, rounds, f"accuracy {done.best.accuracy:.2f}, mean {done.mean_accuracy:.2f}")

        progress(0, rounds, "")
        return await fewshot(
            engine.generate, engine.score, verify, examples, experts,
            settings=settings, sampling=sampling, gold=task.gold, progress=tell,
            n_layers=max(target.depth for target in engine.layout) + 1 if per_layer else None,
        )  # fmt: skip
