"""The options that several commands share: the parser and its help, job files, and the places of models and experts.

A job file holds a command's own options: `t2ray adapt --config FILE [key=value ...]`, where `max_tokens: 32` is
`--max-tokens 32`, and `settings` holds what the command takes as key=value. Not here: training jobs, sweeps and
endpoints, which have models of their own (`t2ray.config`).
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from t2ray.core import ConfigError

if TYPE_CHECKING:
    from t2ray.workbench import Place

JOB, SETTINGS = "--config", "settings"
_WIDTH, _INDENT = 80, 26


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong. Its help is the same in every terminal and every Python.

    Args:
        module: the module of the command, with its options and its run; it is imported when the command is asked for.
    """

    def __init__(self, *, module: str | None = None, **settings: Any) -> None:
        super().__init__(add_help=False, **settings)
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")
        self.module = module

    def complete(self) -> Self:
        """Adds the options of the command, once, and returns the parser."""
        if self.module is not None:
            module, self.module = importlib.import_module(self.module), None
            module.add(self)
        return self

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"t2ray: {' '.join(message.split())}; see {self.prog} --help\n")

    # argparse's own signature is a pair of overloads that says no more than this
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses the words, after it has put the options of a job file in the place of its name."""
        self.complete()
        args = list(sys.argv[1:] if args is None else args)
        if JOB in args and any(action.dest == "job" for action in self._actions):
            args = expand(self, args)
        self._check_names(args)
        return super().parse_known_args(args, namespace)

    def _check_names(self, args: Sequence[str]) -> None:
        """Ends the program at an option that there is not, which explains what else may be missing."""
        known = [name for action in self._actions for name in action.option_strings]
        words = list(args)[: args.index("--")] if "--" in args else args
        for name in (word.partition("=")[0] for word in words if word.startswith("--")):
            if not self._subparsers and not any(option.startswith(name) for option in known):
                close = difflib.get_close_matches(name, known, n=1)
                self.error(f"unknown option {name}" + (f"; did you mean {close[0]}?" if close else ""))

    def format_help(self) -> str:
        """Returns how the command is written, what it does, and a sentence on each of its words and options."""
        groups = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        words = [action for action in self._actions if not action.option_strings and action not in groups]
        named = [action for action in self._actions if action.option_strings]
        needed = [action for action in [*words, *named] if action.required and action.nargs != "*"]
        usage = [self.prog, *(_written(action) for action in needed)]
        usage += [f"[{_written(action)}]" for action in words if action not in needed]
        usage += ["COMMAND ..." if groups else "[options]"]
        lines = [*textwrap.wrap(f"usage: {' '.join(usage)}", _WIDTH, subsequent_indent="  "), ""]
        lines += textwrap.wrap(self.description or "", _WIDTH)
        for group in groups:
            lines += _section("commands", ((action.dest, action.help or "") for action in group._choices_actions))
        for title, actions in (("arguments", words), ("options", named)):
            if actions:
                lines += _section(title, ((_written(action, short=True), _sentence(action)) for action in actions))
        return "\n".join(lines) + "\n"


def _written(action: argparse.Action, *, short: bool = False) -> str:
    """Returns an option as a user writes it, such as `--targets PATTERN ...`; with `short` also its other name."""
    value = str(action.metavar or ("|".join(action.choices) if action.choices else ""))
    more = " ..." if action.nargs in ("*", "+") else ""
    names = ", ".join(action.option_strings if short else action.option_strings[-1:])
    return f"{names} {value}{more}".strip()


def _sentence(action: argparse.Action) -> str:
    """Returns what an option is, and its default if it has one."""
    given = action.default
    if isinstance(given, bool | None) or given in (argparse.SUPPRESS, []):
        return action.help or ""
    return f"{action.help} Default: {f'{given:g}' if isinstance(given, float) else given}."


def _section(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    lines = ["", f"{title}:"]
    for name, text in rows:
        wrapped = textwrap.wrap(text, _WIDTH - _INDENT, break_on_hyphens=False, break_long_words=False)
        shown = f"  {name}".ljust(_INDENT - 1)
        lines += [f"{shown} {wrapped[0]}"] if len(shown) < _INDENT else [shown, " " * _INDENT + wrapped[0]]
        lines += [" " * _INDENT + line for line in wrapped[1:]]
    return lines


# ------------------------------------------------------------------------------------------------------ shared options


def add_job(parser: Parser) -> None:
    """Adds the option that names a job file."""
    parser.add_argument(
        JOB,
        dest="job",
        metavar="FILE.yaml",
        help="A file that holds options by their names; options and key=value words beside it win over it.",
    )


def add_registry(parser: Parser) -> None:
    """Adds the options that say where experts are: a run folder, or a registry by itself."""
    parser.add_argument(
        "--run", metavar="FOLDER", help="The folder of a training run. Default: runs/demo, if there is one."
    )
    parser.add_argument(
        "--experts", metavar="URI", help="The registry of experts: a folder, s3:// or gs://. Default: that of the run."
    )
    parser.set_defaults(model=None, factors=None)


def add_model(parser: Parser) -> None:
    """Adds the options that say where a model and its experts are: a run folder, or the parts by themselves."""
    add_registry(parser)
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help='The model: "tiny", "tiny-vision", a local folder or a hub id. Default: that of the run, else tiny.',
    )
    parser.add_argument(
        "--factors",
        metavar="DIR",
        help="The folder of the model's decomposition. Default: that of the run, else one in runs/factors.",
    )


def add_unsafe_code(parser: Parser) -> None:
    """Adds the option that lets model-written code run without isolation."""
    parser.add_argument(
        "--unsafe-code", action="store_true", help="Run model-written code even where it cannot be isolated."
    )


def add_json(parser: Parser) -> None:
    """Adds the option that names a file for the figures."""
    parser.add_argument("--json", metavar="FILE", help="Also write the figures to this file.")


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Refuses a number below 1.

    Raises:
        ConfigError: with the option and its value.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


# ----------------------------------------------------------------------------------------------------------- job files


def expand(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Returns the words of a command with the options of a file, and of key=value words, in place of `--config FILE`.

    Raises:
        ConfigError: the file cannot be read, or a key is none of the command's options.
    """
    from t2ray.config.files import override, read_yaml

    at = list(words).index(JOB)
    if at + 1 == len(words):
        raise ConfigError(f"{JOB} names no file")
    path, rest = words[at + 1], [*words[:at], *words[at + 2 :]]
    assignments = [word for word in rest if "=" in word and not word.startswith("-")]
    values = override(read_yaml(Path(path)), assignments)
    return [*_options(parser, values, path), *(word for word in rest if word not in assignments)]


def _options(parser: argparse.ArgumentParser, values: Mapping[str, Any], where: str) -> list[str]:
    from t2ray.config.files import nearest

    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "job")}
    named: list[str] = []
    placed: list[str] = []
    for key, value in values.items():
        if key not in actions:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(str(key), actions)}")
        action = actions[key]
        if value is None or value is False:
            continue
        if key == SETTINGS:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: settings: a mapping of keys, not {value!r}")
            placed += [f"{name}={json.dumps(setting, default=str)}" for name, setting in value.items()]
        elif value is True and action.nargs == 0:
            named.append(action.option_strings[0])
        else:
            items = [str(item) for item in (value if isinstance(value, list) else [value])]
            items = items if action.nargs == "+" else [",".join(items)]
            named += [action.option_strings[0], *items] if action.option_strings else []
            placed += [] if action.option_strings else items
    return [*placed, *named]


def locate(args: argparse.Namespace) -> Place:
    """Returns where the model and its experts are, by the options of `add_registry` and `add_model`."""
    from t2ray.config.files import expanded
    from t2ray.workbench import find_place

    named = (args.run, args.model, args.factors, args.experts)
    return find_place(*(name and expanded(name) for name in named))
