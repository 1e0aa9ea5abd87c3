"""The command line: parses, then imports what the command needs. `t2ray --help` loads neither torch nor ray.

A mistake of the user's ends with one line and exit code 2; an interrupt with 130. The commands stand beside this file.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from t2ray.cli import cluster_options, jobfile, load
from t2ray.core import T2RayError, __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        args = build_parser().parse_args(argv)
        module, _, function = args.command.partition(":")
        return int(getattr(importlib.import_module(f"t2ray.cli.{module}"), function)(args) or 0)
    except T2RayError as error:
        print(f"t2ray: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("t2ray: interrupted", file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(130)  # threads that still wait for a cluster must not hold the exit back


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the options in one line, as every other mistake is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"t2ray: {' '.join(message.split())}; see {self.prog} --help\n")

    # argparse's own signature is a pair of overloads that says no more than this
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        if jobfile.OPTION in args and any(action.dest == "job" for action in self._actions):
            args = jobfile.expand(self, args)
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """Every command and option; parses without importing what they need."""
    parser = _Parser(
        prog="t2ray", description="Self-adaptive language models: SVF experts, trained by RL, mixed for every request."
    )
    parser.add_argument("--version", action="version", version=f"t2ray {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_training(commands)
    _add_experts(commands)
    _add_adapting(commands)
    _add_serving(commands)
    cluster_options.add(functools.partial(_command, commands))
    _add_measuring(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser], name: str, function: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(command=function)
    return parser


def _add_job(parser: argparse.ArgumentParser) -> None:
    """The command's options from a file, as `jobs/` has them."""
    parser.add_argument(
        jobfile.OPTION,
        dest="job",
        metavar="FILE.yaml",
        help="options from a file; those here, and key=value words, win over it",
    )


def _add_registry(parser: argparse.ArgumentParser) -> None:
    """Where experts are: a run folder, or a registry by itself."""
    parser.add_argument("--run", metavar="FOLDER", help="a training run (default: runs/demo where that is)")
    parser.add_argument("--experts", metavar="URI", help="the registry: a folder, s3:// or gs:// (default: the run's)")
    parser.set_defaults(model=None, factors=None)


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Where a model with its experts is: a run folder, or the parts by themselves."""
    _add_registry(parser)
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help='"tiny", a local Hugging Face folder or a hub id (default: the run\'s, else tiny)',
    )
    parser.add_argument(
        "--factors", metavar="DIR", help="the model's decomposition (default: the run's, or one in runs/factors)"
    )


def _add_training(commands: argparse._SubParsersAction[_Parser]) -> None:
    p = _command(commands, "decompose", "train:decompose", "factor a model's projections, W = U diag(s) V^T")
    p.add_argument("model", metavar="MODEL", help='"tiny", a local Hugging Face folder or a hub id')
    p.add_argument(
        "--out", required=True, metavar="DIR", help="receives one file a matrix; a run that was cut off resumes"
    )
    p.add_argument(
        "--targets", nargs="+", metavar="PATTERN", help='which matrices, e.g. "*.mlp.*" (default: every projection)'
    )
    p.add_argument("--layers", metavar="RANGES", help='which decoder layers, e.g. "0-15,20" (default: all)')
    p.add_argument(
        "--workers", type=int, default=1, metavar="N", help="matrices at once, as Ray tasks (default: 1, no Ray)"
    )
    p.add_argument(
        "--svd-dtype", choices=["float32", "float64"], default="float32", help="precision of the decomposition"
    )
    p.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="stored as (default: as the model)")
    _add_job(p)

    p = _command(commands, "train", "train:train", "train one expert for each domain by RL, in parallel on Ray")
    p.add_argument("config", metavar="CONFIG.yaml")
    p.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for instance run=second rl.lr=0.01 domains.math.rl.steps=60"
    )
    p.add_argument("--resume", action="store_true", help="go on with the run of that name")

    p = _command(
        commands, "demo", "demo:demo", "the main job on the tiny model: decompose, train, adapt, evaluate, report"
    )
    p.add_argument("--out", default="runs", metavar="DIR", help="receives demo/report.{json,md,html} (default: runs)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--limit", type=int, default=500, metavar="N", help="test prompts a task (default: all 500)")


_OF_MIXTURES = ("show", "delete")


def _add_experts(commands: argparse._SubParsersAction[_Parser]) -> None:
    group = commands.add_parser("experts", help="list, show, delete, import or export experts").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    for name, text in (
        ("list", "list the experts and mixtures of a registry"),
        ("show", "show an expert, its manifest and histograms of z, or a mixture"),
        ("delete", "delete an expert with all its versions, or a mixture"),
        ("import", "add an expert from a safetensors file, an exported folder or the reference code's .pt"),
        ("export", "write an expert into a folder of its own"),
    ):
        p = _command(group, name, f"experts:{name}_expert" if name != "list" else "experts:list_experts", text)
        if name != "list":
            p.add_argument(
                "name", metavar="NAME", help="of an expert" + (", or fewshot/NAME" if name in _OF_MIXTURES else "")
            )
        if name in ("import", "export"):
            p.add_argument("path", metavar="PATH")
        (_add_model if name == "import" else _add_registry)(p)


def _add_adapting(commands: argparse._SubParsersAction[_Parser]) -> None:
    p = _command(
        commands, "adapt", "adapt:adapt", "search the mixture of experts for a task from a few labelled prompts (CEM)"
    )
    p.add_argument(
        "--task",
        required=True,
        metavar="FILE|TASK",
        help='a file with the columns "prompt" and "answer", or a built-in task',
    )
    p.add_argument("--name", required=True, metavar="NAME", help="the mixture's name in the registry")
    p.add_argument("--data", metavar="FILE", help="the rows of a built-in task, instead of the hub")
    p.add_argument(
        "--prompt",
        metavar="TEMPLATE",
        default="{prompt}",
        help='of a file: a template of its columns, or a column of messages (default "{prompt}")',
    )
    p.add_argument(
        "--reward", metavar="MODULE:FUNCTION", help='of a file (default: the answer equals the column "answer")'
    )
    p.add_argument("--gold", metavar="COLUMN", default="answer", help='of a file: the right answers (default "answer")')
    p.add_argument("--shots", type=int, default=10, metavar="K", help="labelled prompts to use (default: 10)")
    p.add_argument(
        "--per-layer", action="store_true", help="a weight for each expert and layer, not one for each expert"
    )
    p.add_argument(
        "--only", metavar="NAMES", help="the experts to mix, separated by commas (default: all but the classifier)"
    )
    p.add_argument("--max-tokens", type=int, metavar="N", help="of an answer")
    p.add_argument("--unsafe-code", action="store_true", help="run model-written code where no isolation can be had")
    p.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="CEM: population, elite, iterations, low, high, seed, budget_prompts, budget_s ...",
    )
    _add_job(p)
    _add_model(p)

    p = _command(
        commands, "chat", "chat:chat", "chat in the terminal; shows which experts answered and both passes' times"
    )
    p.add_argument(
        "--strategy",
        default="cls",
        metavar="NAME",
        help="prompt, cls, fewshot/NAME, or a mixture such as math:0.7,code:0.3",
    )
    p.add_argument("--max-tokens", type=int, default=128, metavar="N")
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument(
        "--generate-label",
        action="store_true",
        help="pass 1 writes the label, as in the paper, instead of scoring all labels",
    )
    _add_model(p)


def _add_serving(commands: argparse._SubParsersAction[_Parser]) -> None:
    p = _command(commands, "serve", "serve:serve", "the OpenAI-compatible endpoint and its page, on Ray Serve")
    p.add_argument(
        "--config", metavar="FILE", help="a serve_config.yaml (default: the one that t2ray ships, for the tiny model)"
    )
    p.add_argument("--host", metavar="ADDRESS", help="default: the configuration's, 127.0.0.1; another needs API keys")
    p.add_argument("--port", type=int, metavar="N", help="default: the configuration's, 8000")

    p = _command(commands, "keys", "keys:keys", "make an API key for the endpoint; shows the secret once")
    p.add_argument("name", help="who it is for; appears in the log")
    p.add_argument("--admin", action="store_true", help="may also upload and delete experts and start adaptations")
    p.add_argument("--file", default="keys.txt", metavar="FILE", help="the keys file to add it to (default: keys.txt)")


def _add_measuring(commands: argparse._SubParsersAction[_Parser]) -> None:
    p = _command(commands, "eval", "evaluate:evaluate", "accuracy of strategies on tasks, with Wilson intervals")
    p.add_argument(
        "--tasks",
        required=True,
        metavar="NAMES",
        help="built-in tasks or the run's domains, separated by commas; NAME=FILE reads a built-in task's rows there",
    )
    p.add_argument(
        "--strategies",
        default="base",
        metavar="NAMES",
        help="of base, oracle, prompt, cls, fewshot (the mixture saved under the task's name), fewshot/NAME, or an "
        "expert's name (default: base)",
    )
    p.add_argument("--split", default="test", choices=["train", "validation", "test", "all"])
    p.add_argument("--limit", type=int, metavar="N", help="prompts a task (default: all)")
    p.add_argument("--max-tokens", type=int, metavar="N", help="of an answer")
    p.add_argument(
        "--generate-label",
        action="store_true",
        help="pass 1 writes the label, as in the paper, instead of scoring all labels",
    )
    p.add_argument("--unsafe-code", action="store_true", help="run model-written code where no isolation can be had")
    p.add_argument("--json", metavar="FILE", help="writes the figures there too")
    _add_job(p)
    _add_model(p)

    p = _command(commands, "verify", "evaluate:verify", "run a task's verifier over its right answers")
    p.add_argument("--task", metavar="NAME", help="a built-in task, or a domain of --config")
    p.add_argument("--data", metavar="FILE", help="the rows of a built-in task, instead of the hub")
    p.add_argument(
        "--config", metavar="CONFIG.yaml", help="a training job, for a domain of one's own with a gold column"
    )
    p.add_argument("--workers", type=int, default=2, metavar="N", help="verifier processes (default: 2)")
    p.add_argument("--unsafe-code", action="store_true", help="run model-written code where no isolation can be had")
    p.add_argument("--json", metavar="FILE", help="writes the result there too")

    load.add(functools.partial(_command, commands))
