"""A command's options from a YAML file: `t2ray adapt --config FILE [key=value ...]`, and so the jobs in `jobs/`.

The file's keys are the command's own options (`max_tokens: 32` is `--max-tokens 32`); `settings` holds what the command
takes as key=value. Not here: training jobs and sweeps, which have models of their own (config.py,
sweep). Called by cli.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2ray.config.files import nearest, override, read_yaml
from t2ray.core import ConfigError

OPTION, SETTINGS = "--config", "settings"


def expand(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """A command's words with `--config FILE` replaced by the options that the file and the key=value words name.

    Raises:
        ConfigError: the file cannot be read, or a key is none of the command's options.
    """
    at = list(words).index(OPTION)
    if at + 1 == len(words):
        raise ConfigError(f"{OPTION} names no file")
    path, rest = words[at + 1], [*words[:at], *words[at + 2 :]]
    assignments = [word for word in rest if "=" in word and not word.startswith("-")]
    values = override(read_yaml(Path(path)), assignments)
    return [*_options(parser, values, path), *(word for word in rest if word not in assignments)]


def _options(parser: argparse.ArgumentParser, values: Mapping[str, Any], where: str) -> list[str]:
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    known = [dest for dest, action in actions.items() if action.option_strings or action.dest != SETTINGS]
    named: list[str] = []
    placed: list[str] = []
    for key, value in values.items():
        if key not in actions:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(str(key), [*known, SETTINGS])}")
        action = actions[key]
        if value is None or value is False:
            continue
        if key == SETTINGS:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: settings: a mapping of keys, not {value!r}")
            placed += [f"{name}={setting}" for name, setting in value.items()]
        elif value is True and action.nargs == 0:
            named.append(action.option_strings[0])
        else:
            items = [str(item) for item in (value if isinstance(value, list) else [value])]
            items = items if action.nargs == "+" else [",".join(items)]
            named += [action.option_strings[0], *items] if action.option_strings else []
            placed += [] if action.option_strings else items
    return [*placed, *named]
