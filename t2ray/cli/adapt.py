"""`t2ray adapt`: a few labelled prompts of a task become a named mixture of experts in the registry.

Not here: the search (`t2ray.adapt`). Called by the command line and `jobs/adapt.py`.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from t2ray.adapt.cem import Round
from t2ray.adapt.fewshot import FewShotResult, fewshot
from t2ray.adapt.strategies import FEWSHOT
from t2ray.cli.output import bar, console, weight_bars
from t2ray.config.files import nearest, override, validate
from t2ray.config.search import CEMConfig
from t2ray.config.train import DomainConfig
from t2ray.core import ConfigError, Example, SamplingParams, UnknownExpert, check_name
from t2ray.tasks import builtin, own
from t2ray.tasks.data import FORMATS, read
from t2ray.tasks.task import Task
from t2ray.tasks.verifier import Verifier

if TYPE_CHECKING:
    from t2ray.workbench import Workbench

_VERIFIERS = 2


def adapt(args: argparse.Namespace) -> None:
    """Searches, draws the weights, saves the mixture."""
    check_name(args.name, "mixture")
    settings = validate(CEMConfig, override({}, args.settings), where="settings of the search")
    if args.shots < 1:
        raise ConfigError(f"--shots is {args.shots}; it must be at least 1")
    task, examples = _labelled(args)

    from t2ray.workbench import locate, open_workbench

    bench = open_workbench(locate(args), bar)
    experts = _experts(bench, args.only)
    sampling = SamplingParams(max_tokens=bench.answer_tokens(args.max_tokens, task.max_tokens))
    console.print(
        f"{len(examples)} labelled prompts, experts {', '.join(experts)}, population {settings.population}, "
        f"at most {settings.iterations} rounds"
    )
    with Verifier(task.reward, workers=_VERIFIERS, path=str(Path.cwd()), unsafe_code=args.unsafe_code) as verify:
        result = asyncio.run(
            _search(bench, task, examples, experts, verify, settings, sampling, per_layer=args.per_layer)
        )
    last = result.history[-1]
    meta = {
        "task": args.task, "data": args.data, "shots": len(examples), "experts": list(experts),
        "accuracy": result.accuracy, "log_likelihood": result.log_likelihood, "rounds": len(result.history),
        "prompts": last.prompts, "seconds": last.seconds, "per_layer": args.per_layer,
        "max_tokens": sampling.max_tokens, "base_digest": bench.engine.model.base_digest,
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


def _labelled(args: argparse.Namespace) -> tuple[Task, list[Example]]:
    """The task and its first `--shots` labelled prompts: of a file any rows, of a built-in task training rows."""
    if Path(args.task).suffix not in FORMATS and not Path(args.task).is_file():
        task = builtin(args.task, args.data)
        return task, task.examples("train", args.shots)
    if args.data is not None:
        raise ConfigError(f"--data {args.data} is for a built-in task; --task {args.task} is a file already")
    read(args.task).need({args.gold: object})
    exact = args.reward is None
    domain = DomainConfig(
        data=args.task, prompt=args.prompt, gold=args.gold, reward=args.reward or "t2ray.tasks.equal:reward"
    )
    task = own("task", domain, str(Path.cwd()))
    if exact:
        rows = [{**row, "answer": row[args.gold]} for row in task.rows("all")]
        task = replace(task, rows=lambda split: rows)
    return task, task.examples("all", args.shots)


def _experts(bench: Workbench, only: str | None) -> tuple[str, ...]:
    bench.dispatch_labels("fewshot")  # there must be some
    if only is None:
        return bench.experts
    names = tuple(name.strip() for name in only.split(","))
    for name in names:
        if name not in bench.engine.model.svf.bank:
            raise UnknownExpert(f"--only {only!r}: no expert {name!r}{nearest(name, bench.engine.model.svf.bank)}")
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
            n_layers=max(target.layer for target in engine.model.svf.layout) + 1 if per_layer else None,
        )  # fmt: skip
