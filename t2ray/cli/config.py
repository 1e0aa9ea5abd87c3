"""`t2ray config` lists the keys of each kind of configuration, and prints a file with its defaults filled in.

Not here: the keys' types, defaults and descriptions, which stand in the models (`t2ray.config`) and, for few-shot
searches, in the options of `t2ray adapt`.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from t2ray.cli import adapt
from t2ray.cli.options import JOB, SETTINGS, Parser
from t2ray.cli.output import console
from t2ray.config import search, serve, tables, train
from t2ray.config.files import dump_yaml, nearest, override, read_yaml
from t2ray.config.keys import ConfigKey, keys, shown_default
from t2ray.config.rl import PRESETS
from t2ray.core import ConfigError

_WIDTH, _INDENT = 80, "    "
_say = partial(console.print, markup=False, emoji=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of configuration file.

    `text` says what it is for, `mark` is the key that tells it from the others, `presets` are the values of each preset
    by their keys, and `read(path, words)` are a file's values, checked and complete.
    """

    text: str
    mark: str
    list_keys: Callable[[], list[ConfigKey]]
    read: Callable[[str, list[str]], Mapping[str, Any]]
    presets: Mapping[str, Mapping[str, Any]]


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help=f"The kind whose keys are listed, one of {', '.join(KINDS)}. Default: an overview of all. With --show: "
        "key=value words that win over the file's.",
    )
    p.add_argument(
        "--show",
        metavar="FILE",
        help="Print a file's configuration as YAML: checked, its preset applied, its defaults filled in.",
    )


def run(args: argparse.Namespace) -> None:
    """Prints the configuration of a file, a list of keys, or the overview."""
    if args.show is not None:
        _say(shown(args.show, args.words), end="")
    elif not args.words:
        _say(_overview())
    elif len(args.words) > 1 or args.words[0] not in KINDS:
        given = " ".join(args.words)
        raise ConfigError(f"there is no kind of configuration {given!r}{nearest(given, KINDS)}")
    else:
        kind = KINDS[args.words[0]]
        _say("\n".join([*textwrap.wrap(kind.text, _WIDTH), *preset_lines(kind), *map(_entry, kind.list_keys())]))


def shown(path: str, words: list[str]) -> str:
    """Returns the configuration of a file as YAML, which says the same when it is read again.

    Raises:
        ConfigError: the file is of no kind that is known, or a key or a value is wrong.
    """
    given = override(read_yaml(Path(path)), words)
    kind = next((kind for kind in KINDS.values() if kind.mark in given), None)
    if kind is None:
        marks = ", ".join(f"{kind.mark} ({name})" for name, kind in KINDS.items())
        raise ConfigError(
            f"{path}: its keys ({', '.join(map(str, given)) or 'none'}) do not tell what kind of configuration it is; "
            f"each kind has one of these: {marks}"
        )
    return dump_yaml(kind.read(path, words))


def preset_lines(kind: Kind) -> list[str]:
    """Returns what each preset sets, as words of the command line."""
    return [
        f"preset={name} sets {' '.join(f'{key}={json.dumps(value)}' for key, value in values.items())}"
        for name, values in kind.presets.items()
        if values
    ]


def _overview() -> str:
    lines = ["`t2ray config KIND` lists all keys of a kind, and what they mean."]
    for name, kind in KINDS.items():
        tops = dict.fromkeys(key.path.partition(".")[0] for key in kind.list_keys())
        lines += ["", *textwrap.wrap(f"{name}: {kind.text}", _WIDTH)]
        lines += textwrap.wrap(", ".join(tops), _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    return "\n".join(lines)


def _entry(key: ConfigKey) -> str:
    given = key.default if key.default in ("", "required") else f"default {key.default}"
    text = textwrap.wrap(key.text, _WIDTH - len(_INDENT), break_on_hyphens=False, break_long_words=False)
    return "\n".join(["", f"{key.path}  ({'; '.join(filter(None, (key.type, given)))})", *(_INDENT + x for x in text)])


# --------------------------------------------------------------------------------------------------------------- kinds


def _train(path: str, words: list[str]) -> Mapping[str, Any]:
    return train.load(path, words).model_dump(mode="json")


def _sweep(path: str, words: list[str]) -> Mapping[str, Any]:
    config = search.load(path, words)
    space = {
        name: dimension["values"] or {key: value for key, value in dimension.items() if value is not None}
        for name, dimension in config.model_dump(mode="json")["space"].items()
    }
    job = search.job_at(config, {}).model_dump(mode="json")
    return config.model_dump(mode="json") | {"job": job, "space": space}


def _serve(path: str, words: list[str]) -> Mapping[str, Any]:
    document, config = serve.load(path, words)
    document["applications"][0]["args"] = config.model_dump(mode="json")
    return document


def _search_parser() -> Parser:
    return Parser(prog="t2ray adapt", module=adapt.__name__).complete()


def _search(path: str, words: list[str]) -> Mapping[str, Any]:
    args = _search_parser().parse_args([JOB, path, *words])
    given = {key: value for key, value in vars(args).items() if key not in ("job", "command")}
    return given | {SETTINGS: adapt.settings_of(args).model_dump(mode="json")}


def _search_keys() -> list[ConfigKey]:
    """Returns the options of `t2ray adapt`, and the settings of the search."""
    options = [
        ConfigKey(
            path=action.dest,
            type="true or false" if action.nargs == 0 else "whole number" if action.type is int else "text",
            default="required" if action.required else shown_default(action.default),
            text=action.help or "",
        )
        for action in _search_parser()._actions
        if action.dest not in ("help", "job", SETTINGS)
    ]
    return [*options, *keys(search.CEMConfig, f"{SETTINGS}.")]


KINDS = {
    "train": Kind(
        text="A training job, for `t2ray train FILE`: one expert per domain.",
        mark="domains",
        list_keys=lambda: keys(train.TrainConfig),
        read=_train,
        presets={name: {f"rl.{key}": value for key, value in rl.items()} for name, rl in PRESETS.items()},
    ),
    "serve": Kind(
        text="An endpoint, for `t2ray serve --config FILE`: the `args` of the application in a serve_config.yaml.",
        mark="applications",
        list_keys=lambda: keys(serve.ServeConfig),
        read=_serve,
        presets={},
    ),
    "sweep": Kind(
        text="A sweep, for `t2ray sweep FILE`: a job, and what its settings may be.",
        mark="kind",
        list_keys=lambda: [*keys(search.SweepConfig), *keys(search.CEMJob, "job.")],
        read=_sweep,
        presets=search.PRESETS,
    ),
    "tables": Kind(
        text="A grid of measurements, for `t2ray tables FILE`: models, methods and seeds over a job, and its tables.",
        mark="tables",
        list_keys=lambda: keys(tables.TablesConfig),
        read=lambda path, words: tables.load(path, words).model_dump(mode="json"),
        presets={},
    ),
    "adapt": Kind(
        text="A few-shot search, for `t2ray adapt --config FILE`: the command's options, and settings of the search.",
        mark="task",
        list_keys=_search_keys,
        read=_search,
        presets={},
    ),
}
